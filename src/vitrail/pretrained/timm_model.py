"""Weights from elsewhere: timm's `VisionTransformer`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelConfig
from vitrail.errors import VitrailError
from vitrail.vit import VisionTransformer


def convert_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm `VisionTransformer` state dict under our shapes: load it with `load_state_dict`.

    Names are the same. Only the patch projection, a strided convolution [D, C, P, P] there, is
    flattened to our linear layer's [D, C·P·P]. timm's mean pooling matches ours with `fc_norm=False`.
    """
    converted = dict(state)
    weight = converted["patch_embed.proj.weight"]
    converted["patch_embed.proj.weight"] = weight.flatten(1)
    return converted


def build_from_timm(model: Any) -> VisionTransformer:
    """Our model, in eval mode, with the shape and the weights of a timm `VisionTransformer`; timm itself is not needed.

    Raises:
        VitrailError: if it is no such model, or has parts ours does not (registers, layer scale, …).
    """
    try:
        projection, (height, width), block = model.patch_embed.proj, model.patch_embed.img_size, model.blocks[0]
        pool = {"token": "cls", "avg": "mean"}[model.global_pool]
    except (AttributeError, KeyError, TypeError) as error:
        raise VitrailError(
            f"{type(model).__name__} is not timm's VisionTransformer with token or avg pooling"
        ) from error
    if height != width:
        raise VitrailError(f"the model reads images of {width}×{height} pixels; only square ones can be shown")
    config = ModelConfig(
        patch_size=projection.kernel_size[0],
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        pool="cls" if pool == "cls" else "mean",
    )
    ours = VisionTransformer(config, height, projection.in_channels, model.num_classes)
    state = convert_timm(model.state_dict())
    odd = sorted(set(state) ^ set(ours.state_dict()))
    if odd:
        raise VitrailError(f"this timm model differs from a plain ViT in {', '.join(odd[:3])}; it cannot be shown")
    ours.load_state_dict(state)
    return ours.eval()
