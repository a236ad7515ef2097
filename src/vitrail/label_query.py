"""A head that asks once for each label: where in the picture is the evidence for it?

Shapes are written with B images, K labels, N patches, D wide, H heads.
"""

import torch
from torch import Tensor, nn

from vitrail.config import ModelConfig


class LabelQuery(nn.Module):
    """Encoded patches [B, N, D] to logits [B, K] and each label's look at the patches [B, K, H, N], summing to one.

    A label's query is a learned vector; keys and values come from the patches. What a query finds is added
    to it and normalised, and read by the weights of its label alone, so that a logit rests on its own look
    and no other.

    Source: the decoder of Query2Label (Liu et al. 2021, arXiv 2107.10834, section 3.2), as a single layer with
    neither self-attention among the labels nor an MLP; CaiT (arXiv 2103.17239, section 3) asks so for its class token.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5
        self.queries = nn.Parameter(torch.empty(num_classes, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Row k reads what query k found; never called as a layer, which would let all read all.
        self.classes = nn.Linear(width, num_classes)
        # Short, so that every label first looks everywhere alike and finds the patches' mean.
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        query = self.q(self.queries).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # [H, K, D/H]
        kv = self.kv(patches).unflatten(2, (2, self.num_heads, -1))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D/H]
        similarity = (query * self.scale) @ key.mT
        weights = similarity.transpose(1, 2).softmax(dim=-1)
        heads = (weights.transpose(1, 2) @ value).transpose(1, 2).flatten(2)  # [B, K, D]
        found = self.norm(self.queries + self.proj(heads))
        return (found * self.classes.weight).sum(-1) + self.classes.bias, weights
