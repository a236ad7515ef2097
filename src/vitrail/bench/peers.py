"""Who is timed: vitrail, its peers and two runtimes, all with the same dimensions."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vitrail.config import ModelConfig

MODEL = ModelConfig(patch_size=4, embed_dim=192, depth=9, num_heads=3, mlp_ratio=2.0)
IMAGE_SIZE, NUM_CLASSES = 32, 10
MLP_DIM = int(MODEL.embed_dim * MODEL.mlp_ratio)

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Setup:
    """One way to use one library."""

    name: str
    precision: Precision = "fp32"
    compile: bool = False
    fused_attn: bool = True
    """Whether attention is one fused kernel, where the library leaves the choice."""

    def __str__(self) -> str:
        plain = self.precision == "fp32" or self.name in NO_AUTOCAST
        parts = [self.precision if plain else f"{self.precision} autocast"]
        if self.name in CHOOSES_ATTENTION:
            parts.append("fused attention" if self.fused_attn else "plain attention")
        return ", ".join([*parts, "compiled"] if self.compile else parts)


def _build_timm(fused_attn: bool) -> nn.Module:
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    set_fused_attn(fused_attn)
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=MODEL.patch_size,
        num_classes=NUM_CLASSES,
        embed_dim=MODEL.embed_dim,
        depth=MODEL.depth,
        num_heads=MODEL.num_heads,
        mlp_ratio=MODEL.mlp_ratio,
    )


def _build_vit_pytorch(fused_attn: bool) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=IMAGE_SIZE,
        patch_size=MODEL.patch_size,
        num_classes=NUM_CLASSES,
        dim=MODEL.embed_dim,
        depth=MODEL.depth,
        heads=MODEL.num_heads,
        mlp_dim=MLP_DIM,
    )


def _build_transformers(fused_attn: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    build_config: Any = ViTConfig  # its fields are given by name, and are not typed
    config = build_config(
        image_size=IMAGE_SIZE,
        patch_size=MODEL.patch_size,
        num_labels=NUM_CLASSES,
        hidden_size=MODEL.embed_dim,
        num_hidden_layers=MODEL.depth,
        num_attention_heads=MODEL.num_heads,
        intermediate_size=MLP_DIM,
        attn_implementation="sdpa" if fused_attn else "eager",
    )
    return _Logits(ViTForImageClassification(config))


class _Logits(nn.Module):
    """A transformers model that answers as the others do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _build_torchvision(fused_attn: bool) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=IMAGE_SIZE,
        patch_size=MODEL.patch_size,
        num_classes=NUM_CLASSES,
        num_layers=MODEL.depth,
        num_heads=MODEL.num_heads,
        hidden_dim=MODEL.embed_dim,
        mlp_dim=MLP_DIM,
    )


PEERS: dict[str, Callable[[bool], nn.Module]] = {
    "timm": _build_timm,
    "vit_pytorch": _build_vit_pytorch,
    "transformers": _build_transformers,
    "torchvision": _build_torchvision,
}
RUNTIMES = ("onnxruntime", "openvino")
NO_AUTOCAST = ("vitrail", *RUNTIMES)
CHOOSES_ATTENTION = ("timm", "transformers")


def is_installed(name: str) -> bool:
    """Whether the library can be imported here, with what exporting to it needs."""
    needed = (name, "onnx", "onnxscript") if name in RUNTIMES else (name,)
    return all(importlib.util.find_spec(module) is not None for module in needed)
