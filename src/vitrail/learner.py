"""One training step, and all the state it moves."""

import copy
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.augment import Augment
from vitrail.batch import Batch
from vitrail.config import ResolvedConfig
from vitrail.optim import build_ema, build_optimizers, set_lr
from vitrail.schedule import image_side, lr_factor
from vitrail.vit import build_vit

# More replicas than this were never measured; the threads beyond them go to the replicas' own operations.
MAX_REPLICAS = 4


class Learner:
    """The model, its optimizers and its average, moved one step at a time.

    The weights live in fp32. Replicas in the working precision, refreshed from them once a step, run
    forward and backward on a part of the batch each, and their gradients are summed in fp32: no weight
    is cast twice, and in bf16 activations stay so throughout. On a CPU there is a replica per thread,
    1.29 times as fast on two cores as one that shares them (benchmarks/step.py); elsewhere there is one.

    A step is a pure function of this state, the batch and the step's number: parts and sums have a
    fixed order, and dropout, which draws from one generator in turn, keeps to one replica.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        pre = config.preprocessing
        self._config, self._num_steps = config.optim, config.num_steps
        self._image_size, self._patch_size = pre.image_size, config.model.patch_size
        self._seed, self._device = config.seed, torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_vit(config.model, pre.image_size, pre.num_channels, len(config.classes))
        self.model.to(self._device).train()
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        num_replicas = count_replicas(config)
        self._replicas = [copy.deepcopy(self.model).to(self._dtype) for _ in range(num_replicas)]
        self._forwards = [torch.compile(r) if config.compile else r for r in self._replicas]
        self._pool = ThreadPoolExecutor(
            num_replicas, "replica", torch.set_num_threads, (config.threads // num_replicas,)
        )
        self._optimizers = build_optimizers(self.model, config.optim, num_replicas, self._dtype)
        self._ema = build_ema(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self._augment = Augment(config.augment, pre, len(config.classes), config.seed)

    def step(self, batch: Batch, step: int) -> float:
        """Learn from one batch of uint8 images at step number `step`; returns the loss in nats.

        Where the loss or a gradient is not finite, nothing is moved and the loss returned is NaN.
        """
        torch.manual_seed(self._seed * 1_000_003 + step)
        batch = self._shrink(self._augment(batch, step * self._config.batch_size), step)
        self._refresh_replicas()
        parts = batch.split(len(self._replicas))
        loss = sum(self._pool.map(self._backward, self._forwards, parts, repeat(batch.weight.sum())))
        self._collect_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not math.isfinite(loss + norm.item()):
            self.model.zero_grad()
            return math.nan
        self._collect_statistics()
        if self._config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._config.clip_norm, norm)
        set_lr(self._optimizers, self.lr_factor(step))
        list(self._pool.map(_update, self._optimizers))
        if self._ema is not None:
            self._ema.update_parameters(self.model)
        return loss

    def _backward(self, forward: Callable[[Tensor], Tensor], part: Batch, total_weight: Tensor) -> float:
        """A part's share of the batch's mean loss, with its gradients left in the replica."""
        logits = forward(part.images.to(self._device, self._dtype)).float()
        losses = F.cross_entropy(
            logits, part.labels.to(self._device), label_smoothing=self._config.label_smoothing, reduction="none"
        )
        loss = (losses * part.weight.to(self._device)).sum() / total_weight
        loss.backward()
        return loss.item()

    def _shrink(self, batch: Batch, step: int) -> Batch:
        """The batch with its images at the size that `step` asks for; area means, as pixels are means over areas."""
        size = self._image_size
        side = image_side(step, self._num_steps, self._config.coarse_fraction, size, self._patch_size)
        if side == size:
            return batch
        return replace(batch, images=F.interpolate(batch.images, size=(side, side), mode="area"))

    def lr_factor(self, step: int) -> float:
        """The share of the peak learning rate in use at `step`."""
        return lr_factor(step, self._num_steps, self._config.warmup_fraction, self._config.decay)

    @torch.no_grad()
    def _refresh_replicas(self) -> None:
        for replica in self._replicas:
            working_tensors = chain(replica.parameters(), _statistics(replica))
            kept_tensors = chain(self.model.parameters(), _statistics(self.model))
            for working, kept in zip(working_tensors, kept_tensors, strict=True):
                working.copy_(kept)

    @torch.no_grad()
    def _collect_statistics(self) -> None:
        """Bring home what the replicas keep beside weights: of a batch norm's running figures, the mean."""
        for kept, *workings in zip(_statistics(self.model), *map(_statistics, self._replicas), strict=True):
            kept.copy_(torch.stack(workings).mean(0, dtype=kept.dtype))

    def _collect_gradients(self) -> None:
        for parameter, *workings in zip(
            self.model.parameters(), *(r.parameters() for r in self._replicas), strict=True
        ):
            gradients = [working.grad for working in workings if working.grad is not None]
            parameter.grad = torch.stack(gradients).sum(0, dtype=torch.float32)
            for working in workings:
                working.grad = None

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


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def count_replicas(config: ResolvedConfig) -> int:
    """How many replicas share a batch: one for each CPU thread, up to four, where nothing speaks against it."""
    drops = config.model.drop_rate > 0 or config.model.drop_path_rate > 0
    if config.device != "cpu" or config.compile or drops:
        return 1
    return min(config.threads, MAX_REPLICAS, config.optim.batch_size)


def _statistics(model: nn.Module) -> list[Tensor]:
    """What a model measures in training rather than learns; other buffers are constants."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
