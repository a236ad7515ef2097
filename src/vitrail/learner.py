"""One training step, and all the state it moves."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrail.augment import Augment
from vitrail.batch import Batch
from vitrail.config import ResolvedConfig
from vitrail.metrics import weighted_cross_entropy
from vitrail.optim import build_ema, build_optimizers, set_lr
from vitrail.schedule import lr_factor
from vitrail.vit import build_vit


class Learner:
    """The model, its optimizers and its average, moved one step at a time.

    The weights live in fp32. In bf16 a second copy of the model, refreshed from them once a step,
    runs forward and backward, and its gradients come back in fp32: no weight is ever cast twice, and
    activations stay in bf16 throughout. In fp32 the copy is the model itself.

    A step is a pure function of this state, the batch and the step's number: dropout is drawn from a
    seed of its own for each step.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        pre = config.preprocessing
        self._config, self._num_steps = config.optim, config.num_steps
        self._seed, self._device = config.seed, torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_vit(config.model, pre.image_size, pre.num_channels, len(config.classes))
        self.model.to(self._device).train()
        self._worker = self.model if config.precision == "fp32" else copy.deepcopy(self.model).bfloat16()
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self._forward = torch.compile(self._worker) if config.compile else self._worker
        self._optimizers = build_optimizers(self.model, config.optim)
        self._ema = build_ema(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self._augment = Augment(config.augment, pre, len(config.classes), config.seed)

    def step(self, batch: Batch, step: int) -> float:
        """Learn from one batch of uint8 images at step number `step`; returns the loss in nats."""
        torch.manual_seed(self._seed * 1_000_003 + step)
        batch = self._augment(batch, step * self._config.batch_size)
        images = batch.images.to(self._device, self._dtype)
        self._refresh_worker()
        logits = self._forward(images).float()
        loss = weighted_cross_entropy(
            logits, batch.labels.to(self._device), batch.weight.to(self._device), self._config.label_smoothing
        )
        loss.backward()
        self._collect_gradients()
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip_norm)
        set_lr(self._optimizers, self.lr_factor(step))
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update_parameters(self.model)
        return loss.item()

    def lr_factor(self, step: int) -> float:
        """The share of the peak learning rate in use at `step`."""
        return lr_factor(step, self._num_steps, self._config.warmup_fraction, self._config.decay)

    @torch.no_grad()
    def _refresh_worker(self) -> None:
        if self._worker is not self.model:
            for working, parameter in zip(self._worker.parameters(), self.model.parameters(), strict=True):
                working.copy_(parameter)

    def _collect_gradients(self) -> None:
        if self._worker is self.model:
            return
        for parameter, working in zip(self.model.parameters(), self._worker.parameters(), strict=True):
            assert working.grad is not None
            parameter.grad, working.grad = working.grad.float(), None

    @property
    def result(self) -> nn.Module:
        """The fp32 model to evaluate and keep: the averaged weights if there are any."""
        return self.model if self._ema is None else self._ema.module

    def working_copy(self) -> nn.Module:
        """`result` in the working precision, in eval mode, for a quick look at the validation images."""
        return copy.deepcopy(self.result).to(self._dtype).eval()

    def state(self) -> dict[str, Tensor]:
        """Everything a step moves, under flat names, for a checkpoint."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self._ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self._ema.module.state_dict().items()}
            tensors["num_averaged"] = self._ema.n_averaged
        for i, optimizer in enumerate(self._optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optim.{i}.{index}.{slot}": value for slot, value in slots.items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.model.load_state_dict(_under("model.", tensors))
        if self._ema is not None:
            self._ema.module.load_state_dict(_under("ema.", tensors))
            self._ema.n_averaged.copy_(tensors["num_averaged"])
        for i, optimizer in enumerate(self._optimizers):
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in _under(f"optim.{i}.", tensors).items():
                index, slot = name.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
