"""What a model has learned to be: its patch filters, its sense of place, how far its heads look.

These are the three panels of Figure 7 of Dosovitskiy et al. 2020 (arXiv 2010.11929), and two of ours.
Shapes are written with L blocks, H heads, D wide, N = G·G patches of P×P pixels and C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.config import Preprocessing
from vitrail.errors import Event, Listener, VitrailError, ignore_events
from vitrail.explain import check_model, map_batches
from vitrail.rel_pos import RelPosBias
from vitrail.vit import VisionTransformer

NUM_FILTERS = 28


@dataclass(frozen=True)
class PatchFilters:
    """The principal components of the patch embedding.

    `components` [K, C, P, P], each of length one, its largest value positive; `variance_share` [K]:
    how much of the variance over the D filters each one holds, in falling order.
    """

    components: Tensor
    variance_share: Tensor


@dataclass(frozen=True)
class AttentionReach:
    """How far and how widely each head looks, from patch to patch, over a set of images.

    `distance_px` [L, H]: pixels between the middles of the looking patch and those it looks at, weighted
    by the attention. `entropy_bits` [L, H] of a patch's attention over all tokens; 0 is a single token.
    `uniform_distance_px` and `uniform_entropy_bits`: those of a head that looks everywhere alike.
    """

    distance_px: Tensor
    entropy_bits: Tensor
    uniform_distance_px: float
    uniform_entropy_bits: float
    num_images: int


def patch_filters(model: VisionTransformer, count: int = NUM_FILTERS) -> PatchFilters:
    """The first `count` principal components of the patch filters, fewer if a patch has fewer values; of a
    convolutional stem, those of its first convolution.

    Source: Figure 7, left; like there, over the filters and centred.

    Raises:
        VitrailError: if the model has no attention or is not finite.
    """
    check_model(model)
    first = next(m for m in model.patch_embed.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    side = first.kernel_size[0] if isinstance(first, nn.Conv2d) else model.patch_embed.patch_size
    weight = first.weight.detach().double().cpu().flatten(1)
    _, lengths, axes = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return PatchFilters(
        axes[:count].reshape(len(axes[:count]), -1, side, side).float(),
        (lengths**2 / (lengths**2).sum())[:count].float(),
    )


def position_vectors(model: VisionTransformer) -> dict[str, Tensor]:
    """What tells patches apart by place, as vectors [N, any]: "embedding" added to the tokens, "bias" on the attention.

    A patch's bias vector is how it would share its look among all patches by the bias alone, in all heads and blocks.
    """
    first = model.num_prefix_tokens
    vectors = {"embedding": model.pos_embed.detach()[0, first:].cpu()}
    tables = _bias_tables(model)
    if tables:
        rows = torch.cat([table(model.grid_size).detach()[:, first:, first:].cpu() for table in tables])  # [L·H, N, N]
        vectors["bias"] = rows.softmax(-1).transpose(0, 1).flatten(1)
    return vectors


def position_similarity(vectors: Tensor) -> Tensor:
    """The cosine of each patch's position vector [N, any] to all others: [G, G, G, G], its own place first.

    Source: Figure 7, centre. It takes learned positions, sin-cos, or bias rows alike.

    Raises:
        VitrailError: if N is not a square.
    """
    side = round(len(vectors) ** 0.5)
    if side**2 != len(vectors):
        raise VitrailError(f"{len(vectors)} position vectors do not make a square; leave the prefix tokens out")
    unit = F.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).reshape(side, side, side, side).float()


def relative_bias(model: VisionTransformer) -> Tensor | None:
    """How each head would share its look among all offsets by the learned relative position bias alone
    [L, H, 2G-1, 2G-1]: no offset in the middle, a head's shares sum to one. None without such a bias."""
    span = 2 * model.grid_size - 1
    tables = [table.relative_position_bias_table.detach().softmax(1).cpu() for table in _bias_tables(model)]
    return torch.stack(tables).unflatten(2, (span, span)) if tables else None


def _bias_tables(model: VisionTransformer) -> list[RelPosBias]:
    return [module for module in model.modules() if isinstance(module, RelPosBias)]


@torch.no_grad()
def attention_reach(
    model: VisionTransformer, images: Tensor, preprocessing: Preprocessing, listener: Listener = ignore_events
) -> AttentionReach:
    """Mean attention distance and entropy over uint8 images [N, C, S, S].

    Source: Figure 7, right, and appendix D.7. The patches look; the prefix tokens do not, as they have
    no place. For the distance, what goes to them is left out and the rest brought to a sum of one.

    Raises:
        VitrailError: if the model has no attention or is not finite.
    """
    check_model(model)
    first = model.num_prefix_tokens
    distances = _patch_distances(model).to(next(model.parameters()))
    sums = torch.zeros(2, len(model.blocks), model.num_heads, dtype=torch.float64)
    for place, batch in map_batches(model, images, preprocessing):
        for block, weights in enumerate(model.trace_blocks(batch)[1]):
            looks = weights[:, :, first:]
            to_patches = looks[..., first:]
            distance = (to_patches * distances).sum(-1) / to_patches.sum(-1)
            entropy = torch.special.entr(looks).sum(-1) / torch.log(torch.tensor(2.0))
            sums[0, block] += distance.mean(-1).sum(0).cpu()
            sums[1, block] += entropy.mean(-1).sum(0).cpu()
        listener(Event(task="measuring attention", done=place.stop, total=len(images)))
    distance_px, entropy_bits = (sums / len(images)).float()
    uniform_bits = torch.tensor(float(first + model.grid_size**2)).log2().item()
    return AttentionReach(distance_px, entropy_bits, distances.mean().item(), uniform_bits, len(images))


def _patch_distances(model: VisionTransformer) -> Tensor:
    """Pixels between the middles of every two patches: [N, N]."""
    places = torch.cartesian_prod(torch.arange(model.grid_size), torch.arange(model.grid_size)).double()
    return torch.cdist(places, places) * model.patch_embed.patch_size
