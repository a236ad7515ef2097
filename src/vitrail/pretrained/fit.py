"""Another model's weights in ours: what fits is taken, what does not is resampled, begun anew or refused, and told."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config import ResolvedConfig
from vitrail.errors import VitrailError
from vitrail.model import build_model
from vitrail.optim import in_head
from vitrail.pretrained.weights import Weights, import_timm

PATCHES, POSITIONS, OFFSETS = "patch_embed.proj.weight", "pos_embed", ".relative_position_bias_table"
# What stands between the encoder and another model's head, so that its head reads something else than ours.
BEFORE_HEAD = re.compile(r"(fc_norm|pre_logits|attn_pool)\.")
# What a model may leave behind without its blocks doing anything else; names with a stroke are of another tower.
NEEDLESS = re.compile(r"(head|fc|head_dist|fc_norm|pre_logits|attn_pool|pooler)\.|mask_token$|.*/")
# What a model may lack: ours then begins it anew.
LACKING = re.compile(r"cls_token$|norm\.|.*\.qkv\.bias$|.*" + re.escape(OFFSETS))
# What a block adds to its input: at zero it adds nothing.
WRITES = re.compile(r"\.(attn\.proj|mlp\.fc2)\.")


@dataclass(frozen=True)
class Part:
    """A tensor by its name here, with its shape; `was` is the source's shape where it was resampled."""

    name: str
    shape: tuple[int, ...]
    was: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shapes = (shape for shape in (self.was, self.shape) if shape is not None)
        return f"{self.name} " + " → ".join("×".join(map(str, shape)) for shape in shapes)


@dataclass(frozen=True)
class InitReport:
    """What a run began with: every tensor of its model is in one of the first three, every other of the source's
    in `unused`. `notes` say what was taken on trust."""

    source: str
    loaded: tuple[Part, ...]
    resampled: tuple[Part, ...]
    new: tuple[Part, ...]
    unused: tuple[Part, ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """The report in a few lines: how many of each, and which, but for those loaded as they are."""
        kinds = {"resampled": self.resampled, "new": self.new, "unused": self.unused}
        counts = ", ".join(f"{len(parts)} {kind}" for kind, parts in kinds.items())
        lines = [f"weights from {self.source}: {len(self.loaded)} loaded, {counts}"]
        for kind, parts in kinds.items():
            if parts:
                rest = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
                lines.append(f"  {kind}: {', '.join(map(str, parts[:4]))}{rest}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def fit_weights(weights: Weights, config: ResolvedConfig) -> tuple[dict[str, Tensor], InitReport]:
    """The tensors that the model of `config` begins with in place of those drawn at random, and the report.

    Positions and patches are resampled as timm does; a relative position bias bicubically, so that an offset over the
    same part of the picture keeps its bias on a coarser or finer grid. One that the source lacks begins at
    zero, so that the blocks do what they did. A deeper model than theirs has new blocks before its last, which begin
    by adding nothing. Of three channels one is made by their sum. The head is taken only if it tells the same classes
    apart, as far as that is told, from the same tokens.

    Raises:
        VitrailError: with both sides if the architectures differ, or naming what either has and the other cannot do
            without.
    """
    pre = config.preprocessing
    ours = build_model(config.model, pre.image_size, pre.num_channels, len(config.classes)).state_dict()
    _check_dimensions(weights, ours, config)
    weights, added = _deepen(weights, ours)
    _check_names(weights, ours, added)
    new_head = _why_new_head(weights, ours, config)
    theirs = {n: tensor for n, tensor in weights.state.items() if n in ours and not (new_head and in_head(n))}
    state = {n: _fit(n, theirs[n], tensor, config) for n, tensor in ours.items() if n in theirs}
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            there, here = _part(name, tensor), _part(name, ours[name])
            raise VitrailError(f"{weights.source}: {there} does not fit this model's {here}")
    same = {name for name, tensor in state.items() if torch.equal(tensor.flatten(), theirs[name].flatten())}
    report = InitReport(
        weights.source,
        loaded=tuple(_part(name, ours[name]) for name in state if name in same),
        resampled=tuple(_part(name, ours[name], theirs[name]) for name in state if name not in same),
        new=tuple(_part(name, tensor) for name, tensor in ours.items() if name not in state),
        unused=tuple(_part(name, tensor) for name, tensor in weights.state.items() if name not in theirs),
        notes=tuple(_notes(weights, ours, config, new_head, added)),
    )
    offsets = [n for n in ours if n.endswith(OFFSETS) and n not in state and not n.startswith(added)]
    silent = [n for n in ours if n.startswith(added) and WRITES.search(n)]
    return state | {n: torch.zeros_like(ours[n]) for n in (*offsets, *silent)}, report


def _deepen(weights: Weights, ours: Mapping[str, Tensor]) -> tuple[Weights, tuple[str, ...]]:
    """The weights with their last block as the last of ours, and what the names of the blocks added begin with.

    The new ones come before it: where the head reads the class token, nobody reads what the last block makes of the
    patches, so it may have learnt to make nothing of them.
    """
    there, here = (int(_dimensions(state, None).get("depth") or 0) for state in (weights.state, ours))
    if not 0 < there < here:
        return weights, ()
    last, wanted = f"blocks.{there - 1}.", f"blocks.{here - 1}."
    state = {wanted + n.removeprefix(last) if n.startswith(last) else n: tensor for n, tensor in weights.state.items()}
    return replace(weights, state=state), tuple(f"blocks.{index}." for index in range(there - 1, here - 1))


def _part(name: str, tensor: Tensor, was: Tensor | None = None) -> Part:
    return Part(name, tuple(tensor.shape), None if was is None else tuple(was.shape))


def _fit(name: str, theirs: Tensor, ours: Tensor, config: ResolvedConfig) -> Tensor:
    """Their tensor in our shape, where there is a way; else in another."""
    if name == POSITIONS and theirs.ndim == 3 and len(theirs) == 1:
        return _fit_positions(theirs, ours.shape[1])
    if name.endswith(OFFSETS) and theirs.ndim == 2 and math.isqrt(theirs.shape[1]) ** 2 == theirs.shape[1]:
        return _fit_offsets(theirs, ours.shape[1])
    if theirs.ndim != 4 or not (ours.ndim == 4 or name == PATCHES):
        return theirs
    patch_size, num_channels = config.model.patch_size, config.preprocessing.num_channels
    wanted = ours.shape if ours.ndim == 4 else torch.Size((len(ours), num_channels, patch_size, patch_size))
    if theirs.shape[1] == 3 and wanted[1] == 1:
        theirs = import_timm("3 channels in 1").models.adapt_input_conv(1, theirs)
    if name == PATCHES and theirs.shape[2:] != wanted[2:]:
        theirs = import_timm("another patch size").layers.resample_patch_embed(theirs, list(wanted[2:]))
    return theirs.reshape(ours.shape) if theirs.shape == wanted else theirs


def _fit_positions(theirs: Tensor, count: int) -> Tensor:
    """Positions [1, T, D] for `count` tokens. Where the class token had none, it gets zeros: it was added nothing."""
    grid, grid_there = math.isqrt(count), math.isqrt(theirs.shape[1])
    prefix, prefix_there = count - grid**2, theirs.shape[1] - grid_there**2
    if prefix_there not in (0, prefix):
        return theirs
    theirs = F.pad(theirs, (0, 0, prefix - prefix_there, 0))
    if grid == grid_there:
        return theirs
    return import_timm("another grid of patches").layers.resample_abs_pos_embed(
        theirs, [grid, grid], num_prefix_tokens=prefix
    )


def _fit_offsets(theirs: Tensor, count: int) -> Tensor:
    """A table [H, (2G - 1)²] of relative positions for another grid size G of the same picture."""
    span, span_there = math.isqrt(count), math.isqrt(theirs.shape[1])
    table = theirs.unflatten(1, (span_there, span_there))[None]
    return F.interpolate(table, size=(span, span), mode="bicubic", align_corners=True)[0].flatten(1)


def _dimensions(state: Mapping[str, Tensor], num_heads: int | None) -> dict[str, float | None]:
    """What ModelConfig calls a ViT's dimensions, told by the shapes of its tensors; nothing for another model."""
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if hidden is None or hidden.ndim != 2:
        return {}
    depth = 1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,4})\.", name)))
    width = hidden.shape[1]
    return {"embed_dim": width, "depth": depth, "num_heads": num_heads, "mlp_ratio": len(hidden) / width}


def _check_dimensions(weights: Weights, ours: Mapping[str, Tensor], config: ResolvedConfig) -> None:
    """Raise VitrailError, with both sides and the flags that make them equal, if the architectures differ.

    That ours alone is deeper is no difference.
    """
    theirs, here = _dimensions(weights.state, weights.num_heads), _dimensions(ours, config.model.num_heads)
    differ = {name: value for name, value in theirs.items() if here and value not in (None, here[name])}
    deeper = differ.keys() == {"depth"} and config.model.depth > (differ["depth"] or 0)
    if differ and not deeper:
        table = [("", "there", "here"), *((name, f"{value:g}", f"{here[name]:g}") for name, value in differ.items())]
        flags = " ".join(f"--model.{name.replace('_', '-')} {value:g}" for name, value in differ.items())
        raise VitrailError(f"{weights.source} is of another model than this; give {flags}", table)


def _check_names(weights: Weights, ours: Mapping[str, Tensor], added: tuple[str, ...]) -> None:
    """Raise VitrailError if either side's backbone has what the other has not and cannot do without."""
    theirs, may_lack = weights.state, LACKING.match
    lacking = [n for n in ours if n not in theirs and not (in_head(n) or n.startswith(added) or may_lack(n))]
    homeless = [name for name in theirs if name not in ours and not NEEDLESS.match(name)]
    if lacking or homeless:
        sides = [f"it lacks {_list(lacking)}"] * bool(lacking)
        sides += [f"there is no place here for its {_list(homeless)}"] * bool(homeless)
        offsets_alone = not lacking and all(name.endswith(OFFSETS) for name in homeless)
        hint = "give --model.rel-pos zero" if offsets_alone else "give the weights of one like this"
        raise VitrailError(f"{weights.source} is of another kind of model: {' and '.join(sides)}; {hint}")


def _list(names: Mapping[str, Tensor] | list[str]) -> str:
    return ", ".join(list(names)[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def _why_new_head(weights: Weights, ours: Mapping[str, Tensor], config: ResolvedConfig) -> str | None:
    """Why their head cannot be taken over, or None if it can."""
    heads = [{n: tuple(t.shape) for n, t in state.items() if in_head(n)} for state in (weights.state, ours)]
    if not heads[0]:
        return "the source has none"
    if heads[0] != heads[1]:
        there, here = (Part(*max(head.items(), key=lambda item: len(item[1]))) for head in heads)
        return f"{there} there, {here} here"
    if weights.classes is not None and weights.classes != config.classes:
        return "the classes there have other names"
    between = sorted({found[1] for name in weights.state if (found := BEFORE_HEAD.match(name))})
    if between:
        return f"the head there reads what {' and '.join(between)} makes"
    if weights.pool not in (None, config.model.pool):
        return f"the head there reads {weights.pool}, here {config.model.pool}"
    return None


def _notes(
    weights: Weights,
    ours: Mapping[str, Tensor],
    config: ResolvedConfig,
    new_head: str | None,
    added: tuple[str, ...],
) -> list[str]:
    """What a person should know who reads the report."""
    model, notes = config.model, list[str]()
    if added:
        notes.append(f"depth: new are {', '.join(n.rstrip('.') for n in added)}; they begin by adding nothing")
    if new_head:
        notes.append(f"head: new ({new_head})")
    elif weights.classes is None:
        notes.append(f"head: taken, its {len(config.classes)} classes on trust: the source does not name them")
    if weights.num_heads is None and "blocks.0.attn.qkv.weight" in weights.state:
        usual = f"; of the usual width, 64, they would be {model.embed_dim / 64:g}"
        notes.append(f"heads: not told by the source, taken as {model.num_heads}{usual}")
    if weights.pool is None and not new_head and "cls_token" in weights.state:
        notes.append(f"pool: not told by the source, taken as {model.pool}")
    if any(name.endswith(OFFSETS) for name in ours) and not any(name.endswith(OFFSETS) for name in weights.state):
        notes.append("relative position bias: new, at zero, so that the blocks do what they did")
    if weights.classes == config.classes and weights.val_cut is not None:
        (share, seed), (our_share, our_seed) = weights.val_cut, config.input.val_cut(config.seed)
        if our_seed != seed or our_share > share:  # by one seed, a smaller share is part of a larger
            notes.append(
                "val: other images than the source held out; if it was trained on this data, it has seen some of them, "
                f"and --input.val-fraction {share} --input.val-seed {seed} holds out its own"
            )
    told = (weights.mean, weights.std) == (config.preprocessing.mean, config.preprocessing.std)
    notes.append(f"mean and std of the pixels: {'those of the source' if told else 'measured on the new images'}")
    return notes
