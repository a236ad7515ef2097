"""The four questions, each as the runs that answer it: arms by x by seeds. No torch here.

What an arm or an x changes in the recipe stands in this file; everything else the arms share: seeds, the images and
their order, the budget, the augmentation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vitrail.config import ModelConfig, RunConfig
from vitrail.errors import VitrailError

FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)
LEVELS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {
        "augment": {"crop_padding": 0, "flip": False},
        "optim": {"label_smoothing": 0.0, "weight_decay": 0.0, "muon_weight_decay": 0.0},
    },
    "light": {},
    "strong": {
        "augment": {"policy": "trivialaugment", "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0},
        "optim": {"weight_decay": 0.1, "muon_weight_decay": 0.2},
    },
}
"""`light` is the recipe as it is: crop, mirror where that is allowed, smoothing, its own decay."""
FEW = 0.05
"""Share of the training images in `regularisation`, which only matters where images come round many times; and in
`transfer`, of those of the classes that are fine-tuned on."""
SHARES = (0.125, 0.25, 0.5, 1.0)
"""What of the budget fine-tuning gets."""
SIZES = (0.75, 1.0, 1.25, 1.5)
"""Width and depth over the recipe's own; heads keep their width."""
RESNET_LR = {"lr": 2.0, "muon_lr": 8.0}
"""The ResNet's peak learning rates over the recipe's, which are the ViT's; chosen on val, as the lab notebook tells."""


@dataclass(frozen=True)
class Arm:
    """A contender: what it is called, and what it changes in the recipe's model and in its learning rates."""

    label: str
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lr: Mapping[str, float] = field(default_factory=dict[str, float])


_RESNET = {"arch": "resnet", "match": "vit"}
ARMS = {
    "vit": Arm("ViT"),
    "vit-label-query": Arm("ViT with label queries", {"head": "label-query"}),
    "vit-conv-stem": Arm("ViT with conv stem", {"stem": "conv"}),
    "vit-plain": Arm("plain ViT", {"rel_pos": "none", "init": "paper"}),
    "vit-scratch": Arm("ViT from scratch"),
    "resnet": Arm("ResNet", _RESNET, RESNET_LR),
    "resnet-scratch": Arm("ResNet from scratch", _RESNET, RESNET_LR),
}


@dataclass(frozen=True)
class Cell:
    """One run: `config` says all of it but its length, for which `share` of the budget pays.

    Args:
        x: what the question varies within an arm.
        regime: how the length is found where this cell's own speed does not decide: equal epochs, those that the
            budget pays for in the slowest cell of the question; or equal compute, for all as many operations as the
            costliest cell takes at equal epochs.
        begins_with: the name of the cell whose weights it starts from.
    """

    arm: str
    x: float | str
    config: RunConfig
    share: float = 1.0
    kind: Literal["training", "pretraining"] = "training"
    regime: Literal["", "equal epochs", "equal compute"] = ""
    begins_with: str = ""

    @property
    def name(self) -> str:
        """What its run folder is called."""
        words = (self.arm, str(self.x), self.regime.replace(" ", "-"), f"seed{self.config.seed}")
        return "-".join(word for word in words if word)


@dataclass(frozen=True)
class Question:
    """What is asked, of whom, and how.

    Args:
        pairs: which arms are compared: the first minus the second.
        x_label: what x is called; `x_words` how a value of it is said.
        lay_out: the cells of one arm and seed, from the arm's name, the recipe as the arm has it and the source's
            classes.
    """

    title: str
    arms: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    x_label: str
    x_words: str
    lay_out: Callable[[str, RunConfig, Sequence[str]], Iterator[Cell]]


def _vary_data(arm: str, config: RunConfig, classes: Sequence[str]) -> Iterator[Cell]:
    for fraction in FRACTIONS:
        yield Cell(arm, fraction, replace(config, input=replace(config.input, train_fraction=fraction)))


def _vary_regularisation(arm: str, config: RunConfig, classes: Sequence[str]) -> Iterator[Cell]:
    for level, groups in LEVELS.items():
        changed = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
        few = replace(config.input, train_fraction=FEW)
        yield Cell(arm, level, replace(config, input=few, **changed))


def _vary_fine_tuning(arm: str, config: RunConfig, classes: Sequence[str]) -> Iterator[Cell]:
    """Every second class to pretrain on, the others to fine-tune on: kinds that lie together fall on both sides.

    Fine-tuning takes an arm's own learning rates: a half and an eighth of them were no better on val (lab notebook).
    """
    before = replace(config, input=replace(config.input, classes=tuple(classes[::2])))
    after = replace(config, input=replace(config.input, classes=tuple(classes[1::2]), train_fraction=FEW))
    pretraining = Cell(arm, "pretraining", before, kind="pretraining")
    begins_with = ""
    if not arm.endswith("-scratch"):
        yield pretraining
        begins_with = pretraining.name
    for share in SHARES:
        yield Cell(arm, share, after, share, begins_with=begins_with)


def _vary_scale(arm: str, config: RunConfig, classes: Sequence[str]) -> Iterator[Cell]:
    for factor in SIZES:
        sized = replace(config, model=scale_model(config.model, factor))
        for regime in ("equal epochs", "equal compute"):
            yield Cell(arm, sized.model.embed_dim, sized, regime=regime)


def scale_model(model: ModelConfig, factor: float) -> ModelConfig:
    """The model with `factor` times the width and depth, and heads as wide as before."""
    head_dim = model.embed_dim // model.num_heads
    num_heads = max(1, round(factor * model.num_heads))
    depth = max(1, round(factor * model.depth))
    return replace(model, embed_dim=num_heads * head_dim, num_heads=num_heads, depth=depth)


QUESTIONS = {
    "data": Question(
        title="Accuracy against the amount of data, in equal time",
        arms=("vit", "vit-label-query", "vit-conv-stem", "resnet"),
        pairs=(
            ("vit", "resnet"),
            ("vit-label-query", "resnet"),
            ("vit-conv-stem", "resnet"),
            ("vit-label-query", "vit"),
            ("vit-conv-stem", "vit"),
        ),
        x_label="share of the training images",
        x_words="{:.0%} of the data",
        lay_out=_vary_data,
    ),
    "regularisation": Question(
        title="Accuracy by regularisation, on few images",
        arms=("vit", "vit-plain", "resnet"),
        pairs=(("vit", "resnet"), ("vit-plain", "resnet")),
        x_label="regularisation",
        x_words="regularisation {}",
        lay_out=_vary_regularisation,
    ),
    "transfer": Question(
        title="Accuracy against fine-tuning compute, on classes that pretraining did not see",
        arms=("vit", "vit-scratch", "resnet", "resnet-scratch"),
        pairs=(("vit", "resnet"), ("vit", "vit-scratch"), ("resnet", "resnet-scratch")),
        x_label="share of the budget",
        x_words="{:.4g} of the budget",
        lay_out=_vary_fine_tuning,
    ),
    "scale": Question(
        title="Accuracy against training operations, in four sizes",
        arms=("vit", "resnet"),
        pairs=(("vit", "resnet"),),
        x_label="width of the ViT, or of that which the ResNet is matched to",
        x_words="width {}",
        lay_out=_vary_scale,
    ),
}


def get_question(name: str, arms: Sequence[str] = ()) -> Question:
    """The question called `name`, of which `arms` must be arms. Raises VitrailError naming those there are."""
    if name not in QUESTIONS:
        raise VitrailError(f"no question '{name}'; give one of {', '.join(QUESTIONS)}")
    question = QUESTIONS[name]
    for arm in arms:
        if arm not in question.arms:
            raise VitrailError(f"no arm '{arm}' in the question {name}; its arms are {', '.join(question.arms)}")
    return question


def lay_out_grid(name: str, base: RunConfig, num_seeds: int, classes: Sequence[str]) -> list[Cell]:
    """Every cell of a question, seed after seed, so that a grid that is stopped early has whole seeds.

    Args:
        base: the recipe, with data and budget.
        classes: the source's.

    Raises:
        VitrailError: for an unknown question, or too few seeds or classes.
    """
    question = get_question(name)
    if num_seeds < 1:
        raise VitrailError(f"seeds is {num_seeds}; give at least 1, or 3 for an interval worth the name")
    if name == "transfer" and len(classes) < 4:
        raise VitrailError(f"transfer needs two classes to pretrain on and two others; {base.data} has {len(classes)}")
    cells: list[Cell] = []
    for seed in range(num_seeds):
        for arm in question.arms:
            config = replace(base, seed=seed, model=replace(base.model, **ARMS[arm].model))
            cells += question.lay_out(arm, _scale_lr(config, ARMS[arm].lr), classes)
    return cells


def _scale_lr(config: RunConfig, factors: Mapping[str, float]) -> RunConfig:
    rates = {name: factor * getattr(config.optim, name) for name, factor in factors.items()}
    return replace(config, optim=replace(config.optim, **rates))
