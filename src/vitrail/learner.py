"""One training step, and all the state it moves."""

import copy
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.augment import Augment
from vitrail.batch import Batch
from vitrail.config import ResolvedConfig
from vitrail.distributed import World, gather, replicate, shard, sharing_gradients, spread
from vitrail.model import build_model
from vitrail.optim import WeightAverage, build_optimizers, in_head, set_lr
from vitrail.schedule import image_side, lr_factor

# More replicas than this were never measured; the threads beyond them go to the replicas' own operations.
MAX_REPLICAS = 4


class Learner:
    """The model, its optimizers and its average, moved one step at a time.

    The weights live in fp32. Replicas in the working precision, refreshed from them once a step, run
    forward and backward on a part of the batch each, and their gradients are summed in fp32: no weight
    is cast twice, and in bf16 activations stay so throughout. On a CPU there is a replica per thread,
    1.29 times as fast on two cores as one that shares them (benchmarks/step.py); elsewhere there is one.

    Of many processes each has one replica, whose gradients DistributedDataParallel sums; or, with "fsdp",
    the fp32 model itself is cut into shares, and gathered block by block in the working precision.

    A step is a pure function of this state, the batch and the step's number: parts and sums have a
    fixed order, and dropout, which draws from one generator in turn, keeps to one replica.
    """

    def __init__(self, config: ResolvedConfig, world: World | None = None) -> None:
        pre = config.preprocessing
        self._world = world or World()
        self._config, self._num_steps = config.optim, config.num_steps
        self._image_size, self._patch_size = pre.image_size, config.model.patch_size
        self._seed, self._device = config.seed, torch.device(config.device)
        self._build = partial(build_model, config.model, pre.image_size, pre.num_channels, len(config.classes))
        torch.manual_seed(config.seed)
        self.model = self._build().to(self._device).train()
        if config.freeze == "backbone":
            _freeze_backbone(self.model)
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self._forwards = self._begin_replicas(config)
        num_replicas = len(self._forwards)
        self._pool = ThreadPoolExecutor(
            num_replicas, "replica", torch.set_num_threads, (config.threads // num_replicas,)
        )
        self._optimizers = build_optimizers(self.model, config.optim, self._dtype)
        decay = config.optim.ema_decay
        self._average = WeightAverage(self.model.parameters(), decay) if decay else None
        mix_end = config.augment.mix_fraction * config.num_steps * config.optim.batch_size
        self._augment = Augment(config.augment, pre, len(config.classes), config.seed, mix_end)
        # Mixing pairs each image with the one before it, so a part begins with one that is only mixed in.
        self._num_lent = int(self._world.size > 1 and self._augment.mixes)

    def _begin_replicas(self, config: ResolvedConfig) -> list[Callable[[Tensor], Tensor]]:
        """Make the replicas; what to call for their logits, with the gradients shared among the processes."""
        self._replicas: list[nn.Module] = []
        self._gradient_scale = 1.0
        if self._world.size > 1 and config.distributed == "fsdp":
            shard(self.model, self._dtype, self._world)
            self._gradient_scale = float(self._world.size)  # FSDP2 takes means; ours are sums
            return [self.model]
        count = 1 if self._world.size > 1 else count_replicas(config)
        self._replicas = [copy.deepcopy(self.model).to(self._dtype) for _ in range(count)]
        forwards = self._replicas
        if self._world.size > 1:
            pre = config.preprocessing
            example = torch.zeros(2, pre.num_channels, pre.image_size, pre.image_size)
            forwards = [replicate(r, example.to(self._device, self._dtype)) for r in self._replicas]
        return [torch.compile(forward) if config.compile else forward for forward in forwards]

    @property
    def share(self) -> Tensor:
        """Which images of every batch this process needs: int64 indices into it."""
        share = self._world.share(self._config.batch_size)
        return torch.cat([share[:1] - 1, share])[1 - self._num_lent :] % self._config.batch_size

    def step(self, batch: Batch, step: int) -> float:
        """Learn from this process's `share` of the batch of step number `step`, uint8; the whole batch's loss in nats.

        Where the loss or a gradient is not finite, nothing is moved, on any process, and the loss returned is NaN.
        """
        torch.manual_seed(self._seed * 1_000_003 + step + self._world.rank * 2**40)
        offsets = self.share if self._world.size > 1 else None
        augmented = self._augment(batch, step * self._config.batch_size, offsets)
        batch = self._shrink(augmented[self._num_lent :], step)
        self._refresh_replicas()
        total_weight = self._world.sum(batch.weight.sum())
        parts = batch.split(len(self._forwards))
        loss = sum(self._pool.map(self._backward, self._forwards, parts, repeat(total_weight)))
        loss = self._world.sum(torch.tensor(loss, dtype=torch.float64)).item()
        self._collect_gradients()
        norm = gather(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if not math.isfinite(loss + norm.item()):
            self.model.zero_grad()
            return math.nan
        self._collect_statistics()
        if self._config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self._config.clip_norm, norm)
        set_lr(self._optimizers, self.lr_factor(step))
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self._average is not None:
            self._average.update()
        return loss

    def _backward(self, forward: Callable[[Tensor], Tensor], part: Batch, total_weight: Tensor) -> float:
        """A part's share of the batch's mean loss, with its gradients left in the replica.

        With a `micro_batch_size` the part is taken in pieces of at most that many images, one after the other.
        """
        # FSDP2 gathers for each piece, so that every process needs as many: as many as the largest part takes.
        largest = -(-self._config.batch_size // (self._world.size * len(self._forwards)))
        pieces = part.split(-(-largest // (self._config.micro_batch_size or largest)))
        total = 0.0
        for i, piece in enumerate(pieces):
            with sharing_gradients(forward, now=i == len(pieces) - 1):
                logits = forward(piece.images.to(self._device, self._dtype)).float()
                labels, weight = piece.labels.to(self._device), piece.weight.to(self._device)
                smoothing = self._config.label_smoothing
                losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
                loss = (losses * weight).sum() / total_weight
                (loss * self._gradient_scale).backward()
            total += loss.item()
        return total

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
        replicas = self._replicas or [self.model]
        for kept, *workings in zip(_statistics(self.model), *map(_statistics, replicas), strict=True):
            mean = torch.stack(workings).mean(0, dtype=kept.dtype)
            kept.copy_(self._world.sum(mean) / self._world.size)

    def _collect_gradients(self) -> None:
        if not self._replicas:
            return  # they are the model's own
        for parameter, *workings in zip(
            self.model.parameters(), *(r.parameters() for r in self._replicas), strict=True
        ):
            gradients = [working.grad for working in workings if working.grad is not None]
            for working in workings:
                working.grad = None
            if gradients:  # what is frozen has none
                parameter.grad = gradients[0].float()  # in fp32 the replica's own, which it has just let go
                for gradient in gradients[1:]:
                    parameter.grad += gradient

    def result(self) -> dict[str, Tensor]:
        """The fp32 weights to evaluate and keep, whole: the averaged ones if there are any."""
        state = {name: gather(tensor) for name, tensor in self.model.state_dict().items()}
        return state | self._averaged()

    def working_copy(self) -> nn.Module:
        """A model of `result` in the working precision, in eval mode, for a quick look at the validation images."""
        model = self._build()
        model.load_state_dict(self.result())
        return model.to(self._device, self._dtype).eval()

    def _averaged(self) -> dict[str, Tensor]:
        if self._average is None:
            return {}
        names = (name for name, _ in self.model.named_parameters())
        return {name: gather(value) for name, value in zip(names, self._average.values, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Everything a step moves, under flat names and whole, for a checkpoint: alike for any number of processes."""
        tensors = {f"model.{name}": gather(tensor) for name, tensor in self.model.state_dict().items()}
        if self._average is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.result().items()}
            tensors["num_averaged"] = self._average.num_averaged
        for name, slots in self._slots().items():
            tensors |= {f"optim.{name}.{slot}": gather(value) for slot, value in slots.items()}
        return tensors

    @torch.no_grad()
    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Put these in the place of the weights drawn at random, whole and by name; the others stay as they are."""
        state = self.model.state_dict()
        for name, tensor in weights.items():
            state[name].copy_(spread(tensor, like=state[name]))
        if self._average is not None:
            for value, parameter in zip(self._average.values, self.model.parameters(), strict=True):
                value.copy_(parameter)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, be it of another number of processes."""
        self.begin_with({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        if self._average is not None:
            for (name, _), value in zip(self.model.named_parameters(), self._average.values, strict=True):
                value.copy_(spread(tensors[f"ema.{name}"], like=value))
            self._average.num_averaged.copy_(tensors["num_averaged"])
        for (name, parameter), slots in zip(self.model.named_parameters(), self._slots().values(), strict=True):
            for slot, value in _under(f"optim.{name}.", tensors).items():
                # A count of steps is one number, everything else has the parameter's shape.
                slots[slot] = spread(value.reshape(parameter.shape), like=parameter) if value.ndim else value

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers keep for each parameter, by its name, in the model's order."""
        owners = {parameter: o for o in self._optimizers for group in o.param_groups for parameter in group["params"]}
        return {name: owners[parameter].state[parameter] for name, parameter in self.model.named_parameters()}


def _freeze_backbone(model: nn.Module) -> None:
    """Let nothing learn but the head; the rest works as in evaluation, so that what it measures stays too."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name))
    for name, part in model.named_children():
        part.train(in_head(f"{name}."))


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
