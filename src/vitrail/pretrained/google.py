"""Google's .npz files, of vision_transformer and of big_vision."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.pretrained.weights import Weights, check_tensors, fuse_qkv, rename

# Weights hardly compress; a file that grows more than this is made to fill the memory.
MAX_GROWTH = 10
# What zipfile and NumPy raise of a file that is cut, damaged or made to mislead.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
NAMES = (
    (r"^embedding/", "patch_embed.proj/"),
    (r"^cls$", "cls_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attn/proj/"),
    (r"/MultiHeadDotProductAttention_[01]/", "/attn/"),
    (r"/MlpBlock_[03]/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_[03]/Dense_1/", "/mlp/fc2/"),
    (r"^MAPHead_0/", "attn_pool/"),
    (r"/(kernel|scale)$", "/weight"),
)


def read_google(path: Path) -> Weights:
    """Read an .npz of Google's ViT, in the layout of vision_transformer or of big_vision.

    In flax a kernel has its inputs before its outputs, and attention keeps the heads apart.

    Raises:
        VitrailError: if it is none, holds pickles, or unpacks to far more than its size.
    """
    arrays = _load(path)
    anchor = next((name for name in arrays if name.endswith("embedding/kernel")), None)
    if anchor is None:
        raise VitrailError(f"{path} is not a ViT of Google's: it has no embedding/kernel, but {_first(arrays)}")
    prefix = anchor.removesuffix("embedding/kernel")
    ours: dict[str, Tensor] = {}
    num_heads = None
    for name, tensor in _unstack(arrays).items():
        if not name.startswith(prefix):
            ours[name if "/" in name else f"/{name}"] = tensor  # of another tower; fit.py tells it by the stroke
            continue
        renamed = rename(name.removeprefix(prefix), NAMES)
        if renamed.endswith("attn/query/weight") and tensor.ndim == 3:
            num_heads = tensor.shape[1]
        ours[renamed.replace("/", ".")] = _turn(renamed, tensor)
    pool = "cls" if "cls_token" in ours else "mean"
    return Weights(str(path), fuse_qkv(ours), num_heads, pool, None, (0.5,) * 3, (0.5,) * 3)


def _turn(name: str, tensor: Tensor) -> Tensor:
    """A flax array as PyTorch lays it out: outputs first, heads in one dimension."""
    if not re.search(r"/(weight|bias)$", name) or tensor.ndim < 2:
        return tensor
    if name.endswith("/bias"):
        return tensor.flatten()
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 3:
        tensor = tensor.flatten(0, 1) if name.endswith("/proj/weight") else tensor.flatten(1)
    return tensor.mT


def _unstack(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that big_vision scanned over are stacked in one array; here each has its own."""
    single: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        if "/encoderblock/" in name and tensor.ndim:
            single |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): part for i, part in enumerate(tensor)}
        else:
            single[name] = tensor
    return single


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as file:
            growth = sum(member.file_size for member in file.infolist()) / path.stat().st_size
        if growth > MAX_GROWTH:
            raise VitrailError(f"{path} unpacks to {growth:.0f} times its size; weights do not, so it was not read")
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        odd = next((name for name, array in arrays.items() if getattr(array, "dtype", np.dtype("O")).kind != "f"), None)
        if odd is not None:
            raise VitrailError(f"{path}: {odd} is no array of floating point numbers; expected weights alone")
    except UNREADABLE as error:
        raise VitrailError(f"cannot read {path} as an .npz of weights: {error}") from error
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in arrays.items()}
    return check_tensors(path, tensors)


def _first(names: Any) -> str:
    return ", ".join(list(names)[:3]) or "nothing"
