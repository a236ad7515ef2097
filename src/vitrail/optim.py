"""What moves the weights: the optimizers, their learning rates, and the average of the path."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitrail.config import OptimConfig


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (hidden matrices, other matrices, the rest), each in the model's order.

    Hidden matrices are the weights of the linear layers inside `blocks`; the patch projection and
    the head are matrices too, but face the data and the classes. Tokens, positions, norms, biases and
    relative position tables are the rest, and are never decayed.
    """
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in linear:
            rest.append(parameter)
        elif "blocks." in name:
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    return hidden, matrices, rest


def build_optimizers(model: nn.Module, config: OptimConfig, num_muons: int = 1) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101) for everything, or Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) for the hidden matrices and AdamW for the rest.

    The hidden matrices may be dealt out to several Muons, to step side by side: each matrix moves alone,
    so the result is the same.
    """
    hidden, matrices, rest = split_parameters(model)
    adamw_matrices = matrices if config.optimizer == "muon" else hidden + matrices
    groups = [
        {"params": adamw_matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), foreach=True)
    ]
    for i in range(num_muons if config.optimizer == "muon" else 0):
        optimizers.append(
            torch.optim.Muon(
                hidden[i::num_muons], lr=config.muon_lr, weight_decay=config.muon_weight_decay, momentum=0.95
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` (0..1) of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, updated with `update_parameters(model)`.

    The decay grows as (1 + t) / (10 + t) up to `decay`, so that a short run is not held back by its
    first weights (the warm-up of TensorFlow's ExponentialMovingAverage).
    """
    return AveragedModel(model, multi_avg_fn=_warm_average(decay))


def _warm_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    def update(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        t = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(averaged, current, num_averaged)

    return update
