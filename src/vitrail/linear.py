"""Linear layers that pass over memory once: bias and residual are added while the product is written.

Where a CPU is fast at bf16 products, passes over memory are much of a step. There `torch.nn.Linear` first fills the
outcome with the bias, then reads it again to add the product, and a residual is a pass of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Inputs of fewer values are left to torch: passes over so little memory cost less than a gradient made in Python
# (with 133,000 in most layers `quick`'s step would be 0.99 times as fast; `hour`'s, with 532,000, is 1.04 to 1.13).
MIN_VALUES = 2**18


class Linear(nn.Linear):
    """x Wᵀ + b: [..., fan_in] to [..., fan_out]; `torch.nn.Linear`, to the bit."""

    def forward(self, input: Tensor) -> Tensor:
        if not _writes_once(input):
            return super().forward(input)
        return _WrittenOnce.apply(input, self.weight, self.bias, None)


class ResidualLinear(nn.Linear):
    """The last layer of a residual branch, and the sum behind it: onto + x Wᵀ + b.

    x [B, T, fan_in] and onto [B, T, fan_out] to [B, T, fan_out]; in bf16 rounded once, where torch's rounds twice.
    In training, dropout and then stochastic depth fall on the branch before the sum.
    """

    def __init__(self, fan_in: int, fan_out: int, drop_rate: float, drop_path_rate: float) -> None:
        super().__init__(fan_in, fan_out)
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] # on purpose
        drop_rate, drop_path_rate = (self.drop_rate, self.drop_path_rate) if self.training else (0.0, 0.0)
        if drop_rate == drop_path_rate == 0.0 and _writes_once(x):
            return _WrittenOnce.apply(x, self.weight, self.bias, onto)
        branch = F.dropout(super().forward(x), drop_rate)
        return onto + (drop_path(branch, drop_path_rate) if drop_path_rate else branch)


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): drop a residual branch per image, scaling up the kept ones."""
    kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


def _writes_once(x: Tensor) -> bool:
    """Whether to have oneDNN add as it writes: in fp32 that gains nothing, and a compiler does so by itself."""
    fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return fast and x.numel() >= MIN_VALUES and not torch.compiler.is_compiling()


class _WrittenOnce(torch.autograd.Function):
    """x Wᵀ + b, and + onto if given, by the operators of oneDNN that torch.compile calls for the same.

    The weight's gradient is made as (xᵀ G)ᵀ; autograd would make Gᵀ x, which takes 1.06 to 1.35 times as long (a core
    with AMX, the shapes of `vitrail bench`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, weight, bias, "none", [], "") if onto is None else linear.binary(x, onto, weight, bias, "add")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        of_x, of_weight, of_bias, of_onto = ctx.needs_input_grad
        return (
            grad @ weight if of_x else None,
            (rows.mT @ grad_rows).mT if of_weight else None,
            grad_rows.sum(0) if of_bias else None,
            grad if of_onto else None,
        )
