"""What a run derives, once, before its first step: from the machine, from the data, from the budget."""

import ctypes
import itertools
import os
import platform
import shutil
import statistics
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from vitrail.config import MIN_TOKENS, Preprocessing, ResolvedConfig, RunConfig, check_patches
from vitrail.data import ImageSet, SampleStream, fingerprint
from vitrail.distributed import World
from vitrail.errors import VitrailError, VitrailWarning
from vitrail.evaluate import compute_logits
from vitrail.learner import MAX_REPLICAS, Learner
from vitrail.model import count_flops, match_resnet
from vitrail.schedule import Budget, image_side, plan_steps

PROBE_S = 10.0
PROBE_SHARE = 0.1
# The probe takes steps of a run of this length, one for each size its images have.
PROBE_RUN_STEPS = 1000
# Below this, what bf16 gains in the products is less than the noise of telling so.
MIN_BF16_SPEEDUP = 1.1


def choose_machine(config: RunConfig, world: World | None = None) -> RunConfig:
    """The config with device, precision and threads chosen where it left them open, the same in all of `world`.

    Raises:
        VitrailError: if it asks for what this machine does not have, or not all processes would have work.
    """
    world = world or World()
    check_world(config, world)
    device = _choose_device(config)
    if config.compile and device == "cpu" and not has_compiler():
        raise VitrailError("--compile needs a C++ compiler and none is found; install g++ or leave --compile out")
    # Measured, so that two processes may come to differ.
    precision = "bf16" if world.agree(_choose_precision(config, device) == "bf16") else "fp32"
    return replace(config, device=device, precision=precision, threads=config.threads or share_cores(world))


def check_world(config: RunConfig, world: World) -> None:
    """Raise VitrailError if `config` cannot be trained by so many processes."""
    if config.optim.batch_size < world.size:
        raise VitrailError(
            f"batch_size {config.optim.batch_size} leaves some of the {world.size} processes without an image; "
            f"give --optim.batch-size {world.size} or more, or start fewer"
        )
    if world.size > 1 and config.compile and config.distributed == "fsdp":
        raise VitrailError("--compile with --distributed fsdp was never tried here; leave one of them out")
    if not config.model.batch_norm:
        return
    if world.size > 1 and config.distributed == "fsdp":
        raise VitrailError("--distributed fsdp is for models without batch norm; use ddp, or a ViT with stem patch")
    # Every replica's every piece has two images or more to take a mean of.
    fewest, micro = 2 * MAX_REPLICAS * world.size, config.optim.micro_batch_size
    if config.optim.batch_size < fewest or 0 < micro < 4:
        raise VitrailError(
            f"batch_size {config.optim.batch_size} with micro_batch_size {micro} is too few for batch norm; "
            f"give --optim.batch-size {fewest} or more and --optim.micro-batch-size 0, or 4 or more"
        )


def share_cores(world: World) -> int:
    """CPU threads for each process of this machine."""
    return max(1, _num_cores() // world.local_size)


def resolve(
    config: RunConfig,
    train_set: ImageSet,
    val_set: ImageSet,
    preprocessing: Preprocessing,
    world: World | None = None,
) -> ResolvedConfig:
    """The config with all that the data decides; its `num_steps`, which takes a probe, is 1 as yet.

    Raises:
        VitrailError: if the patches do not fit the images, or no ResNet matches. Warns if the patches are too few.
    """
    _check_model(config, preprocessing)
    asked: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    resolved = ResolvedConfig(
        **asked,
        classes=train_set.class_names,
        preprocessing=preprocessing,
        num_train=len(train_set),
        num_val=len(val_set),
        num_skipped=train_set.num_skipped + val_set.num_skipped,
        epoch_images=SampleStream(train_set.labels, config.seed, config.input.balanced).epoch_images,
        num_steps=1,
        data_sha256=fingerprint(train_set, val_set),
        num_processes=(world or World()).size,
    )
    if config.model.match == "none":
        return resolved
    steps = _count_sides(replace(resolved, num_steps=PROBE_RUN_STEPS))
    model = match_resnet(config.model, steps, preprocessing.num_channels, len(resolved.classes))
    return replace(resolved, model=model)


def plan_num_steps(
    config: ResolvedConfig, train_set: ImageSet, val_set: ImageSet, spent_s: float, world: World | None = None
) -> int:
    """Turn the budget, of which `spent_s` is gone, into a number of steps; the first process of `world` decides.

    A budget in minutes is probed with a learner that is then thrown away.
    """
    world = world or World()
    budget, batch_size = Budget.parse(config.budget), config.optim.batch_size
    if budget.unit != "s":
        return plan_steps(budget, config.epoch_images, batch_size, step_s=0, val_s=0)
    began = time.monotonic()
    probe = SpeedProbe(config, train_set, val_set, world)
    step_s, val_s = probe.time_step(min(PROBE_S, PROBE_SHARE * budget.amount)), probe.time_validation()
    left = replace(budget, amount=budget.amount - spent_s - (time.monotonic() - began))
    num_steps = plan_steps(left, config.images_per_val, batch_size, step_s, val_s)
    return int(world.agree(num_steps))


class SpeedProbe:
    """A learner of `config` that learns nothing worth keeping: its steps are timed, then it is thrown away."""

    def __init__(
        self, config: ResolvedConfig, train_set: ImageSet, val_set: ImageSet, world: World | None = None
    ) -> None:
        self._preprocessing, self._world = config.preprocessing, world or World()
        self._train_set, self._val_set = train_set, val_set
        config = replace(config, num_steps=PROBE_RUN_STEPS)
        counts = _count_sides(config).values()
        first_steps = itertools.accumulate(counts, initial=0)
        self._shares = {step: count / PROBE_RUN_STEPS for step, count in zip(first_steps, counts, strict=False)}
        self.learner = Learner(config, world)

    def time_step(self, seconds: float = 0.0) -> float:
        """Seconds of a training step, with each size of the images weighed by its share of a run.

        Each is timed for its share of about `seconds`, and in a row, as in a run: right after steps of another size,
        one finds memory cut for those and takes up to a fifth longer. The first of each row is left out.
        """
        batch, step_s = self._train_set.take(self.learner.share % len(self._train_set)), 0.0
        for step, share in self._shares.items():
            began, times = time.monotonic(), list[float]()
            while self._world.agree(time.monotonic() - began) < share * seconds or len(times) < 2:
                start = time.monotonic()
                self.learner.step(batch, step)
                times.append(time.monotonic() - start)
            step_s += share * statistics.median(times[1:])
        return step_s

    def time_validation(self) -> float:
        """Seconds of one look at the validation images, from some of them."""
        part = replace(self._val_set, images=self._val_set.images[:500], labels=self._val_set.labels[:500])
        start = time.monotonic()
        compute_logits(self.learner.working_copy(), part, self._preprocessing)
        return (time.monotonic() - start) * len(self._val_set) / len(part) / self._world.size


def count_training_flops(config: ResolvedConfig) -> float:
    """Floating-point operations of a whole run: a backward pass costs two forward ones.

    Validation, augmentation and the optimizers' own work are not counted.
    """
    pre, num_classes = config.preprocessing, len(config.classes)
    forward = (
        count * count_flops(config.model, side, pre.num_channels, num_classes)
        for side, count in _count_sides(config).items()
    )
    return 3.0 * config.optim.batch_size * sum(forward)


def _count_sides(config: ResolvedConfig) -> Counter[int]:
    """How many of a run's steps take images of each side in pixels, in the order in which the sides come."""
    size, patch = config.preprocessing.image_size, config.model.patch_size
    steps, fraction = config.num_steps, config.optim.coarse_fraction
    return Counter(image_side(step, steps, fraction, size, patch) for step in range(steps))


def _check_model(config: RunConfig, preprocessing: Preprocessing) -> None:
    """Raise VitrailError if a ViT's patches do not fit the image; warn if they are too few."""
    if config.model.arch == "resnet" and config.model.match == "none":
        return
    num_patches = check_patches(config.model, preprocessing.image_size)
    if num_patches < MIN_TOKENS:
        warnings.warn(
            f"patch size {config.model.patch_size} leaves {num_patches} patches of a "
            f"{preprocessing.image_size}-pixel image; with fewer than {MIN_TOKENS} a ViT sees too little of where "
            "things are (the usual cause of 50% on CIFAR-10); use a smaller --model.patch-size",
            VitrailWarning,
            stacklevel=4,
        )


def prepare_cpu(threads: int, trains: bool = True) -> None:
    """Set the threads, and have glibc keep freed memory instead of returning it to the system.

    A step frees and takes again the same large tensors; giving them back costs a page fault for every
    4 KiB, about a tenth of the step (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD). A thread's own arena
    gives memory back all the same, so that in training all share one (M_ARENA_MAX); inference, which takes less, is
    0.94 times as fast with one. Other C libraries are left alone.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)
        libc.mallopt(-1, 2**31 - 1)
        if trains:
            libc.mallopt(-8, 1)


def has_compiler() -> bool:
    """Whether torch.compile will find a C++ compiler for the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_device(config: RunConfig) -> Literal["cpu", "cuda", "mps"]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[config.device]:
        raise VitrailError(f"device {config.device} is not on this machine; leave --device out or give cpu")
    return config.device


def _choose_precision(config: RunConfig, device: str) -> Literal["fp32", "bf16"]:
    """bf16 where it is fast: a GPU that has it, a CPU that shows it."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cpu" and _bf16_speedup() > MIN_BF16_SPEEDUP else "fp32"


def _bf16_speedup() -> float:
    """How many times as fast a matrix product of a training step's size is in bf16 as in fp32, on the CPU.

    Measured, in a few hundredths of a second, because the CPU's flags do not tell: where one with AVX512-BF16
    took 0.4 of the time, another took twice as long.
    """
    dtypes = (torch.bfloat16, torch.float32)
    pairs = [(torch.ones(2048, 192, dtype=dtype), torch.ones(192, 192, dtype=dtype)) for dtype in dtypes]
    times = [[_time_product(a, b) for a, b in pairs] for _ in range(6)]
    bf16, fp32 = (min(column) for column in zip(*times, strict=True))
    return fp32 / bf16


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
