"""What moves the weights: the optimizers, their learning rates, and the average of the path."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.config import OptimConfig
from vitrail.distributed import gather, spread

# Where the hidden matrices are: a ViT's blocks, a ResNet's stages.
HIDDEN = ("blocks.", "layer1.", "layer2.", "layer3.", "layer4.")


def in_head(name: str) -> bool:
    """Whether a tensor of a model's is of its head, which knows the classes: all else is the backbone."""
    return name.startswith(("head.", "fc."))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (hidden matrices, other matrices, the rest), each in the model's order.

    Hidden matrices are the weights of the linear and convolution layers inside a ViT's blocks or a ResNet's stages;
    the stem and the head have matrices too, but face the data and the classes. Tokens, positions, norms,
    biases and relative position tables are the rest, and are never decayed.
    """
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in weights:
            rest.append(parameter)
        elif name.startswith(HIDDEN):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    return hidden, matrices, rest


def lr_shares(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """The share of the learning rate for each parameter: `layer_decay` to the power of the layers after its own.

    Layer 0 embeds, layer i is block i counted from 1, and one more holds the last norm and the head.

    Source: BEiT (arXiv 2106.08254), `optim_factory.py`. timm's `param_groups_layer_decay` agrees but for the last
    norm, which it takes with the last block.
    """
    blocks = {name: re.match(r"blocks\.(\d+)\.", name) for name, _ in model.named_parameters()}
    last = 1 + max((int(block[1]) + 1 for block in blocks.values() if block), default=0)
    shares: dict[nn.Parameter, float] = {}
    for name, parameter in model.named_parameters():
        block = blocks[name]
        layer = int(block[1]) + 1 if block else last if in_head(name) or name.startswith("norm.") else 0
        shares[parameter] = layer_decay ** (last - layer)
    return shares


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest matrix whose singular values are all alike, as the step (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon): Nesterov momentum, five Newton-Schulz steps, and a length of
    lr · √max(1, rows / columns), with decoupled weight decay. A convolution's filters are a matrix with a row
    for each output channel.

    Differs from torch.optim.Muon in speed alone: matrices of one shape are orthogonalised together, in
    `dtype`. That one works in bf16 always, which a CPU without bf16 products only emulates: there its step
    took as long as a fifth of forward and backward together, this one a twenty-fifth.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix that has a gradient."""
        same: dict[torch.Size, list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same.setdefault(parameter.flatten(1).shape, []).append((parameter, group))
        for (rows, columns), matrices in same.items():
            directions = orthogonalize(torch.stack([self._momentum(m, group["momentum"]) for m, group in matrices]))
            for (matrix, group), direction in zip(matrices, directions.to(matrices[0][0].dtype), strict=True):
                length = group["lr"] * max(1.0, rows / columns) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(spread(direction.view(matrix.shape), like=matrix), alpha=length)

    def _momentum(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        gradient = cast(Tensor, matrix.grad)
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gather(gradient.lerp(average, momentum)).flatten(1).to(self._dtype)


def orthogonalize(matrices: Tensor) -> Tensor:
    """U·Vᵀ of each U·S·Vᵀ in `matrices` [n, rows, columns], nearly: singular values between about 0.7 and 1.2.

    Source: the quintic Newton-Schulz iteration of Jordan et al. 2024, its coefficients and its five steps.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide is matrices else x.mT


def build_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101) for everything, or Muon for the hidden matrices and AdamW for the rest.

    `dtype`: what Muon orthogonalises in.
    """
    hidden, matrices, rest = split_parameters(model)
    adamw_matrices = matrices if config.optimizer == "muon" else hidden + matrices
    shares = lr_shares(model, config.layer_decay)
    groups = [
        *_group_by_lr(adamw_matrices, shares, config.lr, weight_decay=config.weight_decay),
        *_group_by_lr(rest, shares, config.lr, weight_decay=0.0),
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
    ]
    if config.optimizer == "muon":
        groups = _group_by_lr(hidden, shares, config.muon_lr)
        optimizers.append(Muon(groups, config.muon_lr, config.muon_weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _group_by_lr(
    parameters: Sequence[nn.Parameter], shares: Mapping[nn.Parameter, float], lr: float, **settings: float
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups: one for each share of the learning rate among `parameters`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(shares[parameter], []).append(parameter)
    return [{"params": members, "lr": lr * share, **settings} for share, members in groups.items()]


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` (0..1) of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


class WeightAverage:
    """An exponential moving average of `parameters`.

    The decay grows as (1 + t) / (10 + t) up to `decay`, so that a short run is not held back by its
    first weights (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self._parameters]
        self.num_averaged = torch.tensor(0)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they stand now; the first time, simply take them."""
        t = int(self.num_averaged)
        decay = min(self._decay, (1 + t) / (10 + t)) if t else 0.0
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter, 1 - decay)
        self.num_averaged += 1
