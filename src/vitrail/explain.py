"""Where a model looks in one picture: attention, rollout, relevance for a class, and a label query's evidence.

Shapes are written with L blocks, B images, K classes, H heads, T tokens, of which the model's first
`num_prefix_tokens` stand for no place, and N = G·G patches. Maps go row by row from the top left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.batch import normalize
from vitrail.config import Preprocessing
from vitrail.data import open_picture, to_pixels
from vitrail.errors import VitrailError
from vitrail.label_query import LabelQuery
from vitrail.run import Run
from vitrail.vit import VisionTransformer

Method = Literal["attention", "rollout", "relevance", "evidence"]
Fusion = Literal["mean", "max", "min"]
# What every transformer has a map by; evidence is for those with label queries.
METHODS: tuple[Method, ...] = get_args(Method)[:3]
# All maps of a batch of images together stay below this, whatever the model and the data.
MAX_MAP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Explanation:
    """What a model made of B images; all tensors on the CPU.

    `logits` [B, K]. `labels` int64 [B]: the class each relevance map speaks for. `attention`
    [L, B, H, G, G]: how much of its look the token that the head reads gives each patch; what is
    missing to a sum of one went to prefix tokens. `maps`: for each method, [B, G, G], 0 or more.
    `evidence` [B, K, G, G]: how much of its look each label's query gives each patch, the mean of its heads,
    summing to one, be it for or against the label; None without label queries. With them, the head reads
    many tokens, as the query of `labels` looks at them.
    """

    logits: Tensor
    labels: Tensor
    attention: Tensor
    maps: dict[Method, Tensor]
    evidence: Tensor | None = None

    def rivals(self) -> tuple[int, int]:
        """The first image's class that is explained, and the likeliest of the others."""
        label = int(self.labels[0])
        others = self.logits[0].clone()
        others[label] = -torch.inf
        return label, int(others.argmax())

    def choose(self, method: Method) -> Tensor:
        """The first image's map [G, G] by one method.

        Raises:
            VitrailError: if the model has no such map.
        """
        if method not in self.maps:
            raise VitrailError(
                f"this model has no {method} for each label, only one trained with --model.head label-query has; "
                "give another --method, such as relevance"
            )
        return self.maps[method][0]

    def pick(self, layer: int, head: int | None = None) -> Tensor:
        """The first image's attention [G, G] in block `layer`, counted from 1, of one head or the mean of all.

        Raises:
            VitrailError: if there is no such block or head.
        """
        for name, value, count in (("layer", layer, len(self.attention)), ("head", head, self.attention.shape[2])):
            if value is not None and not 1 <= value <= count:
                raise VitrailError(f"no {name} {value}; this model's go from 1 to {count}")
        block = self.attention[layer - 1, 0]
        return block.mean(0) if head is None else block[head - 1]


@dataclass(frozen=True)
class ExplainedPicture:
    """One picture's `Explanation`, with what the model was shown of it.

    `pixels` uint8 [C, S, S] is the model's view; `size` the picture's own (width, height) in pixels.
    """

    path: str
    size: tuple[int, int]
    pixels: Tensor
    classes: tuple[str, ...]
    explanation: Explanation


def explain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
) -> Explanation:
    """Trace normalised images [B, C, S, S] and explain each by every method, from one pass forward and one back.

    Args:
        labels: int64 [B], the classes relevance and evidence are asked for; by default those predicted.
        fusion: how rollout makes one map of a block's heads.
        discard_ratio: the share, 0 to below 1, of each row's smallest looks at patches that rollout drops.

    Raises:
        VitrailError: if the model has no attention or is not finite, or the images do not fit it.
    """
    model = check_model(model)
    _check_fit(model, images, discard_ratio)
    with torch.enable_grad():
        logits, attention, looks = model.trace_labels(images)
        labels = logits.argmax(1) if labels is None else labels.to(logits.device)
        inputs = attention if looks is None else [*attention, looks]
        gradients = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), inputs)
    with torch.no_grad():
        attention = [weights.detach() for weights in attention]
        relevant = relevance(attention, gradients[: len(attention)])
        reading, speaking = _read_tokens(model, looks, gradients[-1], labels)
        blocks = torch.stack([_read_patches(model, weights, reading) for weights in attention])
        maps: dict[Method, Tensor] = {
            "attention": blocks[-1].mean(1),
            "rollout": _read_patches(
                model, rollout(attention, fusion, discard_ratio, model.num_prefix_tokens), reading
            ),
            "relevance": _read_patches(model, relevant if looks is None else level(relevant), speaking),
        }
        if looks is not None:
            looks = looks.mean(2).unflatten(-1, (model.grid_size, model.grid_size)).cpu()
            maps["evidence"] = looks[torch.arange(len(labels)), labels.cpu()]
        maps = {method: found.cpu() for method, found in maps.items()}
        return Explanation(logits.detach().cpu(), labels.cpu(), blocks.cpu(), maps, looks)


def _check_fit(model: VisionTransformer, images: Tensor, discard_ratio: float) -> None:
    side = model.grid_size * model.patch_embed.patch_size
    if images.shape[-2:] != (side, side):
        height, width = images.shape[-2:]
        raise VitrailError(f"images of {width}×{height} pixels, the model reads {side}×{side}; resize them to that")
    if not 0 <= discard_ratio < 1:
        raise VitrailError(f"discard ratio is {discard_ratio}; give a share of at least 0 and below 1")


def rollout(
    attention: Sequence[Tensor], fusion: Fusion = "mean", discard_ratio: float = 0.0, num_prefix_tokens: int = 1
) -> Tensor:
    """How much of each input token reaches each output token: L tensors [B, H, T, T] to [B, T, T], rows summing to one.

    Each block passes on half of a token itself (the residual) and half of what it looks at.

    Source: Abnar & Zuidema 2020 (arXiv 2005.00928), section 3, where the heads are averaged. Our
    additions: max and min over heads, and `discard_ratio`, which sets the smallest share of every row's
    looks at patches to 0; looks at prefix tokens are kept. After both, rows are brought back to sum to one.
    """
    fuse = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}[fusion]  # type: ignore[misc]
    result = torch.eye(attention[0].shape[-1], dtype=attention[0].dtype, device=attention[0].device)
    for weights in attention:
        fused: Tensor = fuse(weights).clone()
        patches = fused[..., num_prefix_tokens:]
        smallest = patches.topk(int(discard_ratio * patches.shape[-1]), dim=-1, largest=False).indices
        patches.scatter_(-1, smallest, 0.0)
        fused /= fused.sum(-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)
        mixed = fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
        result = (mixed / mixed.sum(-1, keepdim=True)) @ result
    return result


def relevance(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """How each input token speaks for the class whose logit was differentiated: L tensors [B, H, T, T] to [B, T, T].

    A look counts as far as more of it would raise the logit: R ← R + mean over heads of max(0, ∇A ⊙ A) · R.

    Source: Chefer, Gur & Wolf 2021 (arXiv 2103.15679), equations 5 and 6. A label query's own look, weighted in the
    same way, is multiplied by this after `level` (equation 10; labels do not look at each other).
    """
    result = torch.eye(attention[0].shape[-1], dtype=attention[0].dtype, device=attention[0].device)
    for weights, gradient in zip(attention, gradients, strict=True):
        result = result + (weights * gradient).clamp_min(0).mean(1) @ result
    return result


def level(relevance: Tensor) -> Tensor:
    """Bring what each token has taken from all, beside itself, to a sum of one: [B, T, T] to the same.

    Without this a label's look would count for more where tokens have mixed much, whatever they tell.

    Source: Chefer et al. 2021, equations 8 and 9; a token that took nothing stays as it is.
    """
    itself = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    taken = relevance - itself
    return itself + taken / taken.sum(-1, keepdim=True).clamp_min(torch.finfo(taken.dtype).tiny)


def _read_tokens(
    model: VisionTransformer, looks: Tensor | None, gradient: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """How much the head reads of each token, and how much of that speaks for the label: twice [B, T].

    A label query reads as it looks [B, K, H, N], the mean of its heads, and what speaks is max(0, ∇A ⊙ A), of which
    `gradient` is ∇A. Without, both are the class token alone, or all patches alike.
    """
    first = model.num_prefix_tokens
    if looks is not None:
        own = torch.arange(len(labels), device=labels.device), labels
        speaking = (looks * gradient).clamp_min(0)
        return F.pad(looks[own].mean(1), (first, 0)), F.pad(speaking[own].mean(1), (first, 0))
    reading = gradient.new_zeros(gradient.shape[0], gradient.shape[-1])
    if model.pool == "cls":
        reading[:, 0] = 1
    else:
        reading[:, first:] = 1 / (reading.shape[1] - first)
    return reading, reading


def _read_patches(model: VisionTransformer, weights: Tensor, reading: Tensor) -> Tensor:
    """What the head draws from each patch through tokens [B, …, T, T], reading so much of each [B, T]: [B, …, G, G]."""
    drawn = torch.einsum("bt,b...tn->b...n", reading, weights)[..., model.num_prefix_tokens :]
    return drawn.unflatten(-1, (model.grid_size, model.grid_size))


def check_model(model: nn.Module) -> VisionTransformer:
    """The model, if it can be explained. Raises VitrailError if it has no attention, or weights that are not finite."""
    if not has_attention(model):
        raise VitrailError(
            f"{type(model).__name__} has no attention to show; evaluate and predict take it, and report "
            "draws everything for it but the attention"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise VitrailError(f"the weights {name} hold NaN or infinity; a map of these is no map: train again")
    return model


def has_attention(model: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether the model is a transformer that can be traced."""
    return hasattr(model, "trace_blocks")


def map_batches(
    model: VisionTransformer, images: Tensor, preprocessing: Preprocessing
) -> Iterator[tuple[slice, Tensor]]:
    """uint8 images [N, C, S, S] as normalised batches, each with its place, small enough to keep their attention."""
    parameter = next(model.parameters())
    num_tokens = model.num_prefix_tokens + model.grid_size**2
    num_looks = len(model.blocks) * num_tokens**2
    if isinstance(model.head, LabelQuery):
        num_looks += len(model.head.queries) * num_tokens
    size = max(1, MAX_MAP_BYTES // (num_looks * model.num_heads * parameter.element_size()))
    for start in range(0, len(images), size):
        place = slice(start, min(start + size, len(images)))
        yield place, normalize(images[place].to(parameter.device), preprocessing).to(parameter.dtype)


def explain_picture(
    run: Run,
    picture: str | Path | Image.Image,
    label: str | None = None,
    fusion: Fusion = "mean",
    discard_ratio: float = 0.0,
) -> ExplainedPicture:
    """Explain one picture to a run's model, brought to its size as in training.

    Args:
        label: the class relevance and evidence are asked for; by default the one predicted.

    Raises:
        VitrailError: if it is no picture, there is no such class, or the model cannot be explained.
    """
    pre, classes = run.config.preprocessing, run.config.classes
    if label is not None and label not in classes:
        shown = ", ".join(classes[:20]) + (" …" if len(classes) > 20 else "")
        raise VitrailError(f"no class '{label}'; the model knows {shown}")
    opened = open_picture(picture)
    pixels = torch.tensor(to_pixels(opened, pre.image_size, pre.num_channels))
    labels = None if label is None else torch.tensor([classes.index(label)])
    result = explain(run.load_model(), normalize(pixels[None], pre), labels, fusion, discard_ratio)
    return ExplainedPicture(
        type(picture).__name__ if isinstance(picture, Image.Image) else str(picture),
        opened.size,
        pixels,
        classes,
        result,
    )
