"""The model that a config describes, and what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.config import ModelConfig
from vitrail.errors import VitrailError
from vitrail.resnet import ResNet
from vitrail.vit import VisionTransformer

# How far a matched ResNet may be from the ViT, and which depths and widths are tried for it, the usual depth first.
MATCH_TOLERANCE = 0.05
MATCH_DEPTHS = (2, 1, 3, 4, 5, 6)
MATCH_WIDTHS = range(1, 1025)


def build_model(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> nn.Module:
    """A model with fresh weights drawn from torch's global generator; seed that first."""
    if config.arch == "resnet":
        return ResNet(config.resnet_depth, config.resnet_width, num_channels, num_classes)
    return VisionTransformer(config, image_size, num_channels, num_classes)


def count_parameters(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in _build_shapes(config, image_size, num_channels, num_classes).parameters())


@cache
def count_flops(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> float:
    """Floating-point operations of one image's forward pass in matrix products and convolutions: two for each
    multiply-add. Norms, activations and softmax are not counted."""
    model = _build_shapes(config, image_size, num_channels, num_classes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_channels, image_size, image_size, device="meta"))
    return float(counter.get_total_flops())


def _build_shapes(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> nn.Module:
    """The model without its numbers: nothing is drawn, and no memory taken."""
    with torch.device("meta"):
        return build_model(config, image_size, num_channels, num_classes)


def match_resnet(config: ModelConfig, sides: Mapping[int, int], num_channels: int, num_classes: int) -> ModelConfig:
    """`config` with the ResNet that costs what `match` says: as much as the ViT that its other fields describe.

    Args:
        sides: how many training steps take images of which side in pixels; the largest is the model's own.

    Raises:
        VitrailError: if no ResNet comes within 5%.
    """

    def flops(model: ModelConfig) -> float:
        total = sum(n * count_flops(model, side, num_channels, num_classes) for side, n in sides.items())
        return total / sum(sides.values())

    def parameters(model: ModelConfig) -> float:
        return count_parameters(model, max(sides), num_channels, num_classes)

    cost: Callable[[ModelConfig], float] = flops if config.match == "vit" else parameters
    target = cost(replace(config, arch="vit", match="none"))
    for depth in MATCH_DEPTHS:
        resnets = [replace(config, resnet_depth=depth, resnet_width=width) for width in MATCH_WIDTHS]
        # Either cost is a polynomial of the second degree in the width.
        curve = np.polyfit(MATCH_WIDTHS[:3], [cost(resnet) for resnet in resnets[:3]], 2)
        nearest = resnets[int(np.abs(np.polyval(curve, MATCH_WIDTHS) - target).argmin())]
        if abs(cost(nearest) - target) <= MATCH_TOLERANCE * target:
            return nearest
    kind = "FLOPs an image" if config.match == "vit" else "parameters"
    raise VitrailError(
        f"no ResNet comes within {MATCH_TOLERANCE:.0%} of this ViT's {target:.3g} {kind}; give another ViT to match, "
        "or --model.match none with --model.resnet-depth and --model.resnet-width"
    )
