"""The weights of another model under our names, with what is known of it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.config import Preprocessing
from vitrail.errors import VitrailError


@dataclass(frozen=True)
class Weights:
    """A model's `state` by our names and in our shapes, but for the patch projection [D, C, P, P]: as a
    convolution it tells its channels and its patch size. What is None is not told by the source.

    `pool`: what the head reads, as in ModelConfig or another library's word. `mean` and `std`: of each channel, 0..1.
    `val_cut`: share and seed by which a run of ours held out its val.
    """

    source: str
    state: Mapping[str, Tensor]
    num_heads: int | None = None
    pool: str | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    val_cut: tuple[float, int] | None = None

    def adopt(self, measured: Preprocessing) -> Preprocessing:
        """`measured` with the mean and std these weights were trained with, if they are told and the channels fit."""
        if self.mean is None or self.std is None or not len(self.mean) == len(self.std) == measured.num_channels:
            return measured
        return replace(measured, mean=self.mean, std=self.std)


def check_tensors(source: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp32. Raises VitrailError if one is empty, or not of finite numbers with a fraction."""
    for name, tensor in state.items():
        if not (tensor.numel() and tensor.is_floating_point() and tensor.float().isfinite().all()):
            what = "numbers that are not finite" if tensor.is_floating_point() else str(tensor.dtype)
            what = what if tensor.numel() else "nothing"
            raise VitrailError(f"{source}: {name} holds {what}; expected finite floating point weights")
    return {name: tensor.float() for name, tensor in state.items()}


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """A tensor's name with each pattern replaced, one after the other."""
    for theirs, ours in patterns:
        name = re.sub(theirs, ours, name)
    return name


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of each block as the one layer `qkv` that ours is; what does not fit is left alone."""
    fused = dict(state)
    for name in state:
        if not (found := re.fullmatch(r"(blocks\.\d+\.attn\.)query(\.weight|\.bias)", name)):
            continue
        names = [f"{found[1]}{part}{found[2]}" for part in ("query", "key", "value")]
        shapes = {state[part].shape if part in state else None for part in names}
        if len(shapes) == 1 and state[name].ndim:
            fused[f"{found[1]}qkv{found[2]}"] = torch.cat([fused.pop(part) for part in names])
    return fused


def import_timm(purpose: str) -> Any:
    """timm, which only some weights need. Raises VitrailError with the command that installs it."""
    try:
        import timm
    except ImportError as error:
        raise VitrailError(f"{purpose} needs timm, which is not installed: pip install 'timm>=1.0.20'") from error
    return timm
