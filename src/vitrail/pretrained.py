"""Weights from elsewhere: timm's `VisionTransformer`."""

from collections.abc import Mapping

from torch import Tensor


def convert_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm `VisionTransformer` state dict under our shapes: load it with `load_state_dict`.

    Names are the same. Only the patch projection, a strided convolution [D, C, P, P] there, is
    flattened to our linear layer's [D, C·P·P]. timm's mean pooling matches ours with `fc_norm=False`.
    """
    converted = dict(state)
    weight = converted["patch_embed.proj.weight"]
    converted["patch_embed.proj.weight"] = weight.flatten(1)
    return converted
