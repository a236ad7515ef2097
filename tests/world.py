"""What `test_distributed` has torchrun start: a few steps, or an evaluation, whose figures the first process writes.

python tests/world.py steps OUT.safetensors     losses and weights of every strategy
python tests/world.py spoil OUT.safetensors     what a step does when one process's part is not finite
python tests/world.py evaluate OUT.safetensors  logits, and how often each image was looked at
"""

import itertools
import json
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conftest import make_config
from vitrail.config import AugmentConfig, ModelConfig, OptimConfig, Preprocessing, ResolvedConfig
from vitrail.data import ImageSet
from vitrail.distributed import World, join_world
from vitrail.evaluate import compute_logits
from vitrail.learner import Learner

NUM_STEPS, BATCH_SIZE, NUM_CLASSES = 6, 20, 4
MODEL = ModelConfig(patch_size=2, embed_dim=32, depth=2, num_heads=4, rel_pos="neighbour")
OPTIM = OptimConfig(batch_size=BATCH_SIZE, ema_decay=0.9, clip_norm=0.5, coarse_fraction=0.4, lr=1e-3)
AUGMENT = AugmentConfig(crop_padding=1, policy="trivialaugment", erasing=0.5, mixup=0.5, cutmix=1.0)


def make_resolved(**optim: object) -> ResolvedConfig:
    asked = make_config(model=MODEL, optim=replace(OPTIM, **optim), augment=AUGMENT, device="cpu")
    return ResolvedConfig(
        **{name: getattr(asked, name) for name in asked.__dataclass_fields__},
        classes=tuple("abcd"),
        preprocessing=Preprocessing(image_size=8, num_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
        num_train=BATCH_SIZE,
        num_val=1,
        num_skipped=0,
        epoch_images=BATCH_SIZE,
        num_steps=NUM_STEPS,
        data_sha256="",
    )


def make_images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % NUM_CLASSES, tuple("abcd"), 0)


def take_steps(config: ResolvedConfig, world: World, stop_at: int | None = None) -> dict[str, Tensor]:
    """The loss of each step, and all state after the last; with `stop_at`, by way of a checkpoint there."""
    images, learner, losses = make_images(BATCH_SIZE), Learner(config, world), []
    for step in range(NUM_STEPS):
        if step == stop_at:
            state = {name: tensor.clone() for name, tensor in learner.state().items()}
            learner = Learner(config, world)
            learner.load_state(state)
        losses.append(learner.step(images.take(learner.share), step))
    return {"losses": torch.tensor(losses, dtype=torch.float64), **learner.state()}


def steps(world: World) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for strategy, micro, stop_at in itertools.product(("ddp", "fsdp"), (0, 3), (None, 3)):
        config = replace(make_resolved(micro_batch_size=micro), distributed=strategy)
        taken = take_steps(config, world, stop_at)
        found |= {f"{strategy}-{micro}-{stop_at}/{name}": tensor for name, tensor in taken.items()}
    return found


def spoil(world: World) -> dict[str, Tensor]:
    """How many processes skipped the step, and by how much all state moved in the worst of them."""
    found: dict[str, Tensor] = {}
    for strategy in ("ddp", "fsdp"):
        learner = Learner(replace(make_resolved(), distributed=strategy), world)
        before = {name: tensor.clone() for name, tensor in learner.state().items()}
        if not world.leads:
            learner.model.head.register_forward_hook(lambda *seen: seen[2] * math.nan)
            for replica in learner._replicas:
                replica.head.register_forward_hook(lambda *seen: seen[2] * math.nan)
        skipped = torch.tensor(float(math.isnan(learner.step(make_images(BATCH_SIZE).take(learner.share), 0))))
        moved = max((tensor - before[name]).abs().max().item() for name, tensor in learner.state().items())
        found |= {f"{strategy}/skipped": world.sum(skipped), f"{strategy}/moved": world.sum(torch.tensor(moved))}
    return found


class Counting(nn.Module):
    """Answers with the first two pixels of an image, which are its number, and counts whom it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = torch.zeros(97)

    def forward(self, images: Tensor) -> Tensor:
        numbers = images[:, 0, 0, 0].round().long()
        for number in numbers:
            self.seen[number] += 1
        assert len(images) <= 16
        return torch.stack([numbers.float(), 2 * numbers.float()], 1)


def evaluate(world: World) -> dict[str, Tensor]:
    import_module("vitrail.evaluate").CPU_BATCH_SIZE = 16
    images = torch.arange(97, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    model, plain = Counting(), Preprocessing(image_size=2, num_channels=1, mean=(0.0,), std=(1 / 255,))
    logits = compute_logits(model, ImageSet(images, torch.zeros(97), ("a", "b"), 0), plain, world=world)
    return {"logits": logits, "seen": world.sum(model.seen)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_world() as joined:
        figures = {"steps": steps, "spoil": spoil, "evaluate": evaluate}[sys.argv[1]](joined)
        if joined.leads:
            save_file({name: tensor.contiguous().clone() for name, tensor in figures.items()}, Path(sys.argv[2]))
            print(json.dumps({"size": joined.size}))
