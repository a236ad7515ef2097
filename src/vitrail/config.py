"""The configuration of a run: frozen dataclasses that become command-line flags and `config.json`.

A `RunConfig` is asked for by a person, then resolved once against the data and the machine. The
resolved one holds everything training depends on, so a run is a pure function of it. No torch here.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from vitrail.errors import VitrailError, require
from vitrail.schedule import Budget

# Fewer patches than this and the picture is too coarse to tell classes apart.
MIN_TOKENS = 16
# Larger ones were never meant, and would be refused by the memory instead.
MAX_WIDTH, MAX_DEPTH, MAX_IMAGE_SIZE = 2**16, 1000, 4096
MAX_THREADS, MAX_BATCH_SIZE = 1024, 2**20
# Attention weights of one image, over all blocks and heads: 8 GiB in fp32.
MAX_LOOKS = 2**31


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Vision Transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1, or a ResNet beside it."""

    arch: Literal["vit", "resnet"] = "vit"
    """Vision Transformer, or ResNet (arXiv 1512.03385), of which the fields that begin with `resnet` tell."""
    patch_size: int = 4
    """Side of the square patches, in pixels (P)."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes tokens of pixels: one linear layer on each patch (the paper), or a few 3×3 convolutions of stride 2
    (arXiv 2106.14881)."""
    embed_dim: int = 128
    """Width of every token (D)."""
    depth: int = 6
    """Number of encoder blocks (L)."""
    num_heads: int = 8
    """Attention heads per block; must divide the width."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLP over the width of a token."""
    pool: Literal["cls", "mean"] = "cls"
    """What a linear head reads: the class token (the paper), or the mean of the patch tokens."""
    head: Literal["linear", "label-query"] = "linear"
    """What answers: one linear layer (the paper), or a learned query for each class that looks at the patches for
    itself, and so has a map of its own. The latter does not use `pool`."""
    drop_rate: float = 0.0
    """Dropout after the position embedding, the attention's projection and the MLP's layers."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the last block's chance to be skipped per image, rising linearly from 0."""
    rel_pos: Literal["none", "zero", "neighbour"] = "none"
    """Learned relative position bias on the attention: none (the paper), started at zero, or started
    so that each head looks around one patch nearby."""
    init: Literal["paper", "zero_residual"] = "paper"
    """How the weights begin: as timm starts them, or with residual branches that add nothing and queries that
    ask for nothing at first."""
    resnet_depth: int = 2
    """Residual blocks in each of the ResNet's four stages."""
    resnet_width: int = 64
    """Channels of the ResNet's first stage; each later one has twice as many."""
    match: Literal["none", "vit", "vit-parameters"] = "none"
    """Choose the ResNet's depth and width so that it trains with as many operations, or has as many parameters, as
    the ViT that the other fields describe, within 5%."""

    @property
    def batch_norm(self) -> bool:
        """Whether the model has batch norms, which look at all images of a forward pass together."""
        return self.arch == "resnet" or self.stem == "conv"

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "resnet_depth", "resnet_width"):
            value, most = getattr(self, name), MAX_DEPTH if name.endswith("depth") else MAX_WIDTH
            require(1 <= value <= most, f"{name} is {value}; give a whole number from 1 to {most}")
        require(
            self.embed_dim % self.num_heads == 0,
            f"{self.num_heads} heads do not divide the width {self.embed_dim}; "
            "change --model.num-heads or --model.embed-dim",
        )
        resnet = self.arch == "resnet"
        require(resnet or self.match == "none", f"match {self.match} is for a ResNet; give --model.arch resnet with it")
        require(not resnet or self.stem == "patch", "stem conv is for a ViT; leave it or --model.arch resnet out")
        require(
            not resnet or self.head == "linear",
            "head is label-query, which attends over tokens, and a ResNet has none; leave it out, or give arch vit",
        )
        require(
            self.stem == "patch" or self.patch_size.bit_count() == 1,
            f"patch_size is {self.patch_size}; stem conv halves the image again and again, so give a power of two",
        )
        require(0 < self.mlp_ratio <= 100, f"mlp_ratio is {self.mlp_ratio}; give a number above 0, at most 100")
        for name in ("drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; give a probability of at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights move: the optimizer, its schedule and the average kept of its path."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for the hidden matrices with AdamW for the rest, or AdamW for all."""
    batch_size: int = 128
    """Images per step, of all processes together."""
    micro_batch_size: int = 0
    """Images per forward and backward at most: a process takes its part of a step in pieces and adds up their
    gradients, for less memory. 0 takes it whole."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.005
    """Peak learning rate of Muon."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices only."""
    muon_weight_decay: float = 0.0
    """Muon's weight decay."""
    beta2: float = 0.99
    """AdamW's decay of the squared gradient."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 leaves it alone."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rates rise from 0."""
    coarse_fraction: float = 0.0
    """Share of the steps, from the first, on smaller images: half of it at half their side, half at three
    quarters. Fewer patches make many more images a second."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rates fall to 0 at the end of the budget."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are evaluated and saved; 0 keeps the last ones."""
    label_smoothing: float = 0.1
    """Share of the label spread over all classes."""
    layer_decay: float = 1.0
    """A block's learning rates over those of the block after it; patches and positions come before the first block,
    the head, after the last, has the full rate. For weights that already know something; 1 is off."""

    def __post_init__(self) -> None:
        require(0 < self.layer_decay <= 1, f"layer_decay is {self.layer_decay}; give above 0 and at most 1")
        size = self.batch_size
        require(1 <= size <= MAX_BATCH_SIZE, f"batch_size is {size}; give at least 1, at most {MAX_BATCH_SIZE}")
        require(self.micro_batch_size >= 0, f"micro_batch_size is {self.micro_batch_size}; give 0 (the whole) or more")
        for name in ("lr", "muon_lr"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; give a number above 0")
        for name in ("weight_decay", "muon_weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; give 0 or more")
        for name in ("beta2", "warmup_fraction", "coarse_fraction", "ema_decay", "label_smoothing"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; give at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to the training images, each drawn anew for every image and pass."""

    crop_padding: int = 4
    """Pixels by which the image is mirrored beyond its edges before a crop of the old size."""
    flip: bool = True
    """Mirror half of the images left to right; turn it off where the side has a meaning (digits)."""
    policy: Literal["none", "trivialaugment", "randaugment"] = "none"
    """TrivialAugment: one operation at a random strength (arXiv 2103.10158). RandAugment: `num_ops`
    operations at `magnitude` (arXiv 1909.13719)."""
    num_ops: int = 2
    """Operations per image of RandAugment."""
    magnitude: int = 9
    """Strength of RandAugment's operations, 0 to 30."""
    erasing: float = 0.0
    """Chance to blank a random rectangle (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Mixup's alpha (arXiv 1710.09412); 0 is off."""
    cutmix: float = 0.0
    """CutMix's alpha (arXiv 1905.04899); 0 is off. With both on, each batch draws one of the two."""
    mix_fraction: float = 1.0
    """Share of the steps, from the first, with mixup and cutmix; the last see each image by itself
    (arXiv 1909.09148)."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "mixup", "cutmix"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; give 0 or more")
        require(self.num_ops >= 1, f"num_ops is {self.num_ops}; give at least 1")
        require(0 <= self.magnitude <= 30, f"magnitude is {self.magnitude}; give 0 to 30")
        for name in ("erasing", "mix_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}; give a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How images are read and served."""

    image_size: int | None = None
    """Side in pixels every image is brought to; by default the images' own side when all share one
    of at most 64, else 32."""
    val_fraction: float = 0.1
    """Share of the training images held out to choose on, where the source has no `val` of its own."""
    val_seed: int | None = None
    """Draws the images held out; by default the run's seed does. With it runs of several seeds hold out the same, and
    one that goes on from another (init_from) can keep its `val` and still see other orders and crops."""
    balanced: bool = False
    """Every batch holds the classes in equal share, repeating images of the rare ones."""
    skip_bad: bool = False
    """Leave out images that cannot be read, instead of refusing."""
    train_fraction: float = 1.0
    """Share of each class's training images to use, after val is cut. For one seed a smaller share is part of
    every larger one, and val is looked at as often as with all of them."""
    classes: tuple[str, ...] = ()
    """Train and evaluate on these classes alone, numbered in the source's order; by default on all."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            side = self.image_size
            require(1 <= side <= MAX_IMAGE_SIZE, f"image_size is {side}; give 1 to {MAX_IMAGE_SIZE} pixels")
        require(
            0 < self.train_fraction <= 1, f"train_fraction is {self.train_fraction}; give a share above 0, 1 at most"
        )
        require(
            not self.classes or len(set(self.classes)) == len(self.classes) >= 2,
            f"classes are {', '.join(self.classes)}; give at least two, each once",
        )
        require(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}; give a share between 0 and 1")
        if self.val_seed is not None:
            require(self.val_seed >= 0, f"val_seed is {self.val_seed}; give 0 or more")

    def val_cut(self, seed: int) -> tuple[float, int]:
        """The share of each class that a run of `seed` holds out for val, and the seed that draws it."""
        return self.val_fraction, seed if self.val_seed is None else self.val_seed


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image file to the model's input; kept with the model and used by every verb.

    `mean` and `std` are per channel, of pixel values scaled to 0..1, measured on the training images.
    """

    image_size: int
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        side, channels = self.image_size, self.num_channels
        require(1 <= side <= MAX_IMAGE_SIZE, f"image_size is {side}; give 1 to {MAX_IMAGE_SIZE} pixels")
        require(channels in (1, 3), f"num_channels is {channels}; give 1 (grey) or 3 (colour)")
        fits = len(self.mean) == len(self.std) == channels and all(0 <= m <= 1 for m in self.mean)
        require(
            fits and all(0 < deviation < math.inf for deviation in self.std),
            f"mean {self.mean} and std {self.std} do not fit {channels} channels of 0..1",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a person asks for: a preset's values, overridden by flags."""

    preset: str = "quick"
    """The recipe the other values come from; also the first word after `train`."""
    data: str = "cifar10"
    """Where the images come from: digits, cifar10, or a folder of images by class or of parquet files."""
    budget: str = "10min"
    """How long to train, as `30min`, `90s`, `20epochs` or `800steps`; the schedule ends where the budget ends."""
    seed: int = 0
    """Fixes the validation split, the weights' start, the order of the images and their augmentation."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    threads: int = 0
    """CPU threads of each process; 0 takes one for each core."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward and backward pass; auto takes bf16 where the machine is fast at it.
    The weights themselves are always kept in fp32."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler on CPU)."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """What the processes of `torchrun` share: gradients (DistributedDataParallel), or, for a model that does not
    fit, weights and optimizer too (FSDP2). Alone it changes nothing."""
    checkpoint_minutes: float = 5.0
    """A checkpoint at least this often, beside the one after each pass; 0 for none by the clock."""
    checkpoint_steps: int = 0
    """A checkpoint every so many steps; 0 for none by steps."""
    init_from: str = ""
    """Begin with the weights of another model: a run folder, a checkpoint in one or a model that ships; a name from
    the hub (timm:vit_tiny_patch16_224); a .safetensors file in timm's names; a folder of a ViT from timm or Hugging
    Face; a .npz of a ViT from Google. Positions and patches are resampled, the head is new for other classes, and
    blocks that a deeper model has more begin by adding nothing."""
    freeze: Literal["none", "backbone"] = "none"
    """What does not learn: backbone leaves everything but the head as it began."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    input: InputConfig = field(default_factory=InputConfig)

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        for name in ("checkpoint_minutes", "checkpoint_steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; give 0 (never) or more")
        threads = self.threads
        require(0 <= threads <= MAX_THREADS, f"threads is {threads}; give 0 (all cores) to {MAX_THREADS}")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; give 0 to {2**31 - 1}")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RunConfig):
    """What is saved and trained: the above with no `auto` or 0 left, and all that was derived, once,
    from the data and the machine. A run is a pure function of it."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    num_train: int
    num_val: int
    num_skipped: int
    """Unreadable images left out, of train and val together."""
    epoch_images: int
    """Images in one pass; more than `num_train` when balanced sampling repeats some."""
    num_steps: int
    data_sha256: str
    """Of the pixels, labels and class names of train and val."""
    num_processes: int = 1
    """How many processes the run began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_train", "num_val", "epoch_images", "num_steps", "num_processes"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; no run has fewer than 1")
        distinct = len(set(self.classes))
        require(2 <= distinct == len(self.classes), f"{distinct} different classes of {len(self.classes)} are named")

    @property
    def images_per_val(self) -> int:
        """Training images between two looks at val: a pass over all the data, be it many over the share in use."""
        return round(self.epoch_images / self.input.train_fraction)

    def asked(self) -> RunConfig:
        """The part a person can ask for."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)})


def check_patches(model: ModelConfig, image_size: int) -> int:
    """The number of patches an image is cut into. Raises VitrailError if they do not fit the image."""
    side, patch = image_size, model.patch_size
    if side % patch:
        fitting = ", ".join(str(p) for p in range(1, side + 1) if side % p == 0 and (side // p) ** 2 >= MIN_TOKENS)
        raise VitrailError(
            f"patch size {patch} does not divide the image size {side}; use --model.patch-size with one of {fitting}"
        )
    num_patches = (side // patch) ** 2
    if model.depth * model.num_heads * num_patches**2 > MAX_LOOKS:
        raise VitrailError(
            f"{num_patches} patches that all look at each other, in {model.depth} blocks of {model.num_heads} heads, "
            "take more memory than there is; use a larger --model.patch-size or a smaller --input.image-size"
        )
    return num_patches
