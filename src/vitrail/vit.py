"""The Vision Transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), from tokens on.

Shapes are written with B images, C channels, N patches, T = N + 1 tokens, D wide, H heads.

There is one path: `forward`, training and `trace` all run the same blocks, and a block always has
its attention at hand. `forward` alone leaves out what the last block would make of tokens that the head
does not read: all but the class token, nearly all of that block's work. Attention is two batched matrix products
around a softmax. On a CPU that trains about twice as fast as the fused kernel, whose backward pass is slow there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.config import ModelConfig, check_patches
from vitrail.errors import VitrailError
from vitrail.label_query import LabelQuery
from vitrail.linear import Linear, ResidualLinear
from vitrail.rel_pos import RelPosBias, first_looks
from vitrail.stem import ConvStem, PatchEmbed


class Similarity(torch.autograd.Function):
    """From what `qkv` makes, [B, T, 3D], the heads' scaled dot products Q·Kᵀ / √(D / H), [B, H, T, T], and the
    values [B, H, T, D / H].

    Autograd's own gradient of the same lines goes over memory more often: it scales apart from the product, comes out
    transposed for the keys, and is joined from three parts and then put in order.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        heads = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2).contiguous() for part in heads)
        ctx.scale = key.shape[3] ** -0.5
        ctx.save_for_backward(query, key)
        return scaled_product(query, key.mT, ctx.scale), value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        of_similarity, of_value = grad_outputs
        query, key = ctx.saved_tensors
        b, h, t, d = key.shape
        of_qkv = key.new_empty(b, t, 3, h, d)
        of_queries, of_keys, of_values = of_qkv.transpose(1, 3).unbind(2)
        of_queries.copy_(scaled_product(of_similarity, key, ctx.scale))
        of_keys.copy_(scaled_product(of_similarity.mT, query, ctx.scale))
        of_values.copy_(of_value)
        return of_qkv.flatten(2), None


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a @ b for [B, H, m, k] and [B, H, k, n], scaled within the product and not in a pass of its own."""
    product = a.new_empty(a.shape[0] * a.shape[1], a.shape[2], b.shape[3])
    torch.baddbmm(product, a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale, out=product)
    return product.unflatten(0, a.shape[:2])


class Attention(nn.Module):
    """Multi-head self-attention (appendix A) of x [B, T, D], added to `onto` [B, T, D], and the weights [B, H, T, T].

    Where `onto` is [B, 1, D], the class token alone looks at all T: [B, 1, D] and [B, H, 1, T].
    """

    def __init__(self, config: ModelConfig, grid_size: int, block: int = 0) -> None:
        super().__init__()
        width = config.embed_dim
        looks = first_looks(block, config.depth, config.num_heads) if config.rel_pos == "neighbour" else []
        self.num_heads = config.num_heads
        self.qkv = Linear(width, 3 * width)
        self.rel_pos = None if config.rel_pos == "none" else RelPosBias(grid_size, config.num_heads, looks)
        self.proj = end_branch(config, width, block)

    def forward(self, x: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
        heads, weights = self._look_once(x) if onto.shape[1] == 1 else self._look(x)
        return self.proj(heads.transpose(1, 2).flatten(2), onto), weights

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What every token's heads see, [B, H, T, D / H], and the weights."""
        similarity, value = Similarity.apply(self.qkv(x), self.num_heads)
        if self.rel_pos is not None:
            similarity = similarity + self.rel_pos(math.isqrt(x.shape[1]))
        weights = similarity.softmax(dim=-1)
        return weights @ value, weights

    def _look_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the class token, [B, H, 1, D / H], without the keys and values of the others.

        As q · (W x) = (Wᵀ q) · x, the query takes the keys' weights upon itself; and the values' weights, being linear,
        may wait for the tokens' mean. The keys' bias adds the same to every similarity, so that softmax drops it.
        """
        weight, bias = (tensor.unflatten(0, (3, self.num_heads, -1)) for tensor in (self.qkv.weight, self.qkv.bias))
        query = F.linear(x[:, 0], weight[0].flatten(0, 1), bias[0].flatten()) / math.sqrt(weight.shape[2])
        query = query.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [H, B, D / H]
        similarity = (query @ weight[1]).transpose(0, 1) @ x.mT  # [B, H, T]
        if self.rel_pos is not None:
            similarity = similarity + self.rel_pos(math.isqrt(x.shape[1]))[:, 0]
        weights = similarity.softmax(dim=-1)
        seen = (weights @ x).transpose(0, 1)  # [H, B, D]
        heads = (seen @ weight[2].mT).transpose(0, 1) + bias[2]  # [B, H, D / H]
        return heads.unsqueeze(2), weights.unsqueeze(2)


class Mlp(nn.Module):
    """Two linear layers with GELU between, on each token alone, added to `onto`: twice [B, T, D] to [B, T, D]."""

    def __init__(self, config: ModelConfig, block: int) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, hidden)
        self.drop = nn.Dropout(config.drop_rate)
        self.fc2 = end_branch(config, hidden, block)

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))), onto)


def end_branch(config: ModelConfig, fan_in: int, block: int) -> ResidualLinear:
    """The last layer of a residual branch in a block; branches are dropped the more often the deeper they are."""
    drop_path_rate = config.drop_path_rate * block / max(1, config.depth - 1)
    return ResidualLinear(fan_in, config.embed_dim, config.drop_rate, drop_path_rate)


class Block(nn.Module):
    """One encoder block (equations 2 and 3): attention, then the MLP, each behind a LayerNorm and around
    a residual. Returns the tokens [B, T, D] and the attention weights [B, H, T, T]; with `class_only` those of
    the class token alone, [B, 1, D] and [B, H, 1, T]."""

    def __init__(self, config: ModelConfig, grid_size: int, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config, grid_size, index)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = Mlp(config, index)

    def forward(self, x: Tensor, class_only: bool = False) -> tuple[Tensor, Tensor]:
        x, weights = self.attn(self.norm1(x), x[:, :1] if class_only else x)
        return self.mlp(self.norm2(x), x), weights


class VisionTransformer(nn.Module):
    """A plain ViT: images [B, C, S, S], normalised, to logits [B, K]. Its weights are drawn from torch's global
    generator; seed that first.

    Parameter names are timm's. Two differences there: our patch projection is a linear layer, so its
    weight is timm's flattened from dimension 1 on; `rel_pos` is ours. The head's input is
    normalised before pooling in both modes (timm does so after pooling for the mean).

    Raises:
        VitrailError: if the patch size does not divide the image size.
    """

    # Tokens before the patches, which stand for no place in the picture: here the class token alone.
    num_prefix_tokens = 1

    def __init__(self, config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> None:
        super().__init__()
        num_patches = check_patches(config, image_size)
        self.grid_size = grid_size = image_size // config.patch_size
        width = config.embed_dim
        self.pool, self.num_heads = config.pool, config.num_heads
        stem = ConvStem if config.stem == "conv" else PatchEmbed
        self.patch_embed = stem(config.patch_size, num_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + num_patches, width))
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList([Block(config, grid_size, i) for i in range(config.depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if config.head == "linear" else LabelQuery(config, num_classes)
        self._reads_class_only = config.pool == "cls" and config.head == "linear"
        self._init_weights(config.init)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        *blocks, last = self.blocks
        for block in blocks:
            x, _ = block(x)
        x, _ = last(x, self._reads_class_only)
        return self.classify(x)

    def trace(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [B, K], and the attention of every block [L, B, H, T, T], rows summing to one."""
        logits, attention = self.trace_blocks(images)
        return logits, torch.stack(attention)

    def trace_blocks(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `trace`, with each block's attention [B, H, T, T] as it stands in autograd's graph, so that
        one can ask for the logits' gradient on it."""
        return self.trace_labels(images)[:2]

    def trace_labels(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """As `trace_blocks`, and each label's look at the patches [B, K, H, N], in the graph too; None without
        label queries."""
        x, attention = self.embed(images), list[Tensor]()
        for block in self.blocks:
            x, weights = block(x)
            attention.append(weights)
        logits, looks = self.read(x)
        return logits, attention, looks

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] to tokens [B, T, D]: the class token first, then the patches (equation 1).

        S may be smaller than what the model was built for. Raises VitrailError if it is larger.
        """
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        pos_embed = self._resample_pos_embed(images.shape[-1] // self.patch_embed.patch_size)
        return self.pos_drop(torch.cat([cls_token, patches], dim=1) + pos_embed)

    def _resample_pos_embed(self, grid_size: int) -> Tensor:
        """The position embeddings for a grid, bilinearly between those learned (section 3.2, for finer grids there)."""
        if grid_size == self.grid_size:
            return self.pos_embed
        if grid_size > self.grid_size:
            raise VitrailError(
                f"images of {grid_size}×{grid_size} patches, "
                f"the model was built for {self.grid_size}×{self.grid_size}; make them smaller"
            )
        prefix, patches = self.pos_embed.split([self.num_prefix_tokens, self.grid_size**2], dim=1)
        grid = patches.mT.unflatten(2, (self.grid_size, self.grid_size))
        resampled = F.interpolate(grid, size=(grid_size, grid_size), mode="bilinear")
        return torch.cat([prefix, resampled.flatten(2).mT], dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """Encoded tokens [B, T, D] to logits [B, K] (equation 4)."""
        return self.read(x)[0]

    def read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `classify`, and each label's look at the patches [B, K, H, N], or None if the head is linear."""
        x = self.norm(x)
        patches = x[:, self.num_prefix_tokens :]
        if isinstance(self.head, LabelQuery):
            return self.head(patches)
        return self.head(x[:, 0] if self.pool == "cls" else patches.mean(dim=1)), None

    @torch.no_grad()
    def _init_weights(self, init: str) -> None:
        """Begin as timm does (truncated normals of 0.02, zero biases), or, at "zero_residual", with
        Xavier-uniform matrices, a zero head, and zero outputs of both residual branches and zero queries.

        Muon moves every matrix by the same spectral length whatever its size, so the branches may
        begin at nothing; each block then starts as the identity (cf. Fixup, arXiv 1901.09321). Without
        queries a head first looks where its position bias points, and learns to look for content from there.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if init == "paper":
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif name in ("head", "head.classes") or (name.endswith((".proj", ".fc2")) and name.startswith("blocks")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if name.endswith(".qkv") and init == "zero_residual":
                nn.init.zeros_(module.weight[: module.in_features])
