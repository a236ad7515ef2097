"""This machine's speed: vitrail beside its peers, and beside the machine's own limit."""

import os
import platform
import statistics
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from vitrail.bench.peers import CHOOSES_ATTENTION, MODEL, PEERS, RUNTIMES, Precision, Setup, is_installed
from vitrail.bench.session import Entry, Session, Stage, spread
from vitrail.bench.worker import Worker
from vitrail.errors import Listener, VitrailError, ignore_events

TRAIN_BATCH_SIZES = (32, 64, 128)
MEMORY_BATCH_SIZE = 64
INFER_BATCH_SIZES = (1, 64, 512)
# What inference takes in rounds and builds; training's rounds end early rather than leave less.
INFERENCE_S = 100
# Compiling a training step takes about a minute on two cores.
COMPILE_S = 90


def run_benchmark(minutes: float, threads: int, fast_bf16: bool, listener: Listener = ignore_events) -> dict[str, Any]:
    """Time vitrail beside its peers for about `minutes`; returns what `vitrail bench --json` prints.

    Args:
        minutes: when to stop; with too few, rounds and compiled peers are left out, and named.
        threads: CPU threads for each contender.
        fast_bf16: whether the machine is fast at bf16, which then is our precision and a switch to try on the peers.

    Raises:
        VitrailError: if `minutes` is not positive.
    """
    if minutes <= 0:
        raise VitrailError(f"minutes is {minutes}; give a number above 0")
    names = [name for name in ("vitrail", *PEERS, *RUNTIMES) if is_installed(name)]
    precisions: tuple[Precision, ...] = ("bf16", "fp32") if fast_bf16 else ("fp32",)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(threads)) for name in names}
        session = Session(workers, minutes, listener)
        missing = [name for name in (*PEERS, *RUNTIMES) if name not in names]
        session.left_out += [f"{name}: not installed; pip install 'vitrail[bench]'" for name in missing]
        memory = {
            name: session.peak_memory_mb(Entry("train", Setup(name), MEMORY_BATCH_SIZE))
            for name in ("vitrail", *PEERS)
            if session.has(name)
        }
        training, limit = _time_training(session, precisions, minutes)
        inference = {size: _time_inference(session, precisions, size) for size in INFER_BATCH_SIZES}
        trace = _time_trace(session, precisions[0])
        stages = {"training": training} | {f"inference_{size}": stage for size, stage in inference.items()}
        _time_compiled(session, stages)
    return {
        "machine": _describe_machine(threads, fast_bf16),
        "versions": {name: version(name) for name in ("vitrail", "torch", *names[1:])},
        "dimensions": asdict(MODEL),
        "latency_1": _tell_latency(inference[1]),
        "training": _tell_best(training) | limit,
        **{f"inference_{size}": _tell_best(stage) for size, stage in inference.items()},
        "trace_over_forward": trace,
        "peak_memory_mb": memory,
        "peers": {
            name: {task: [stage.figures(e) for e in _entries_of(stage, name)] for task, stage in stages.items()}
            for name in names[1:]
        },
        "left_out": session.left_out,
        "minutes": round(session.spent_s / 60, 2),
    }


def _time_training(session: Session, precisions: tuple[Precision, ...], minutes: float) -> tuple[Stage, dict[str, Any]]:
    """Training steps of all, and beside them the bare matrix products of ours and its augmentation."""

    def fastest(setups: list[Setup], sizes: tuple[int, ...]) -> Entry:
        # Longer trials in a longer run: one second mistakes a slow moment for a slow choice.
        return session.screen([Entry("train", setup, size) for setup in setups for size in sizes], minutes / 5)

    stage = Stage(fastest([Setup("vitrail", precisions[0])], TRAIN_BATCH_SIZES))
    entries = [stage.ours]
    for name in filter(session.has, PEERS):
        readme = fastest([Setup(name)], TRAIN_BATCH_SIZES)
        switched = fastest(_switches(name, precisions), (readme.batch_size,))
        entries += [readme, fastest([switched.setup], TRAIN_BATCH_SIZES)]
    parts = [replace(stage.ours, task=task) for task in ("augment", "products_shared", "products_apart")]
    rounds = session.alternate([*entries, *parts], turn_s=1, reserve_s=INFERENCE_S)
    step = rounds[stage.ours]
    augment, *limits = (rounds.pop(part) for part in parts)
    limit = max(limits, key=statistics.median)
    stage.add(rounds)
    return stage, {
        "limit_share": statistics.median(a / b for a, b in zip(step, limit, strict=True)),
        "data_share": statistics.median(a / b for a, b in zip(step, augment, strict=True)),
        "limit_images_per_s": spread(limit),
    }


def _time_inference(session: Session, precisions: tuple[Precision, ...], size: int) -> Stage:
    """Inference of all, and of our weights in the runtimes, at one batch size."""
    turn_s = min(1.0, 0.15 + size / 200)

    def fastest(setups: list[Setup]) -> Entry:
        return session.screen([Entry("infer", setup, size) for setup in setups], turn_s)

    stage = Stage(fastest([Setup("vitrail", precision) for precision in precisions]))
    entries = [stage.ours]
    for name in filter(session.has, PEERS):
        entries += [Entry("infer", Setup(name), size), fastest(_switches(name, precisions))]
    for name in filter(session.has, RUNTIMES):
        # ONNX Runtime has no bf16 on a CPU.
        tried: tuple[Precision, ...] = precisions if name == "openvino" else ("fp32",)
        entries += [Entry("infer", Setup(name, precision), size) for precision in tried]
    stage.add(session.alternate(entries, turn_s))
    return stage


def _time_trace(session: Session, precision: Precision) -> dict[str, float]:
    """How much longer `trace` takes than `forward`."""
    forward, trace = (Entry(task, Setup("vitrail", precision), 64) for task in ("forward", "trace"))
    rounds = session.alternate([forward, trace], turn_s=0.4)
    return spread([a / b for a, b in zip(rounds[forward], rounds[trace], strict=True)])


def _time_compiled(session: Session, stages: dict[str, Stage]) -> None:
    """With the time that is left, the peers' best setups compiled as well, the fastest peers first."""
    skipped: dict[str, list[str]] = {}
    for task, stage in stages.items():
        best = {name: stage.fastest(_entries_of(stage, name)) for name in PEERS if _entries_of(stage, name)}
        for name in sorted(best, key=lambda name: statistics.median(stage.ratios[best[name]])):
            if session.left_s < COMPILE_S:
                skipped.setdefault(name, []).append(task)
                continue
            compiled = replace(best[name], setup=replace(best[name].setup, compile=True))
            stage.add(session.alternate([stage.ours, compiled], turn_s=1))
    for name, tasks in skipped.items():
        session.left_out.append(f"{name}, compiled, in {', '.join(tasks)}: no time left; give more --minutes")


def _switches(name: str, precisions: tuple[Precision, ...]) -> list[Setup]:
    """Every way to use a peer without compiling; its README's is among them."""
    fused = (True, False) if name in CHOOSES_ATTENTION else (True,)
    return [Setup(name, precision, fused_attn=choice) for precision in precisions for choice in fused]


def _entries_of(stage: Stage, *names: str) -> list[Entry]:
    return [entry for entry in stage.ratios if entry.setup.name in names]


def _readme_entries(stage: Stage) -> list[Entry]:
    return [entry for entry in _entries_of(stage, *PEERS) if entry.setup == Setup(entry.setup.name)]


def _tell_best(stage: Stage) -> dict[str, Any]:
    """Ours beside the fastest peer, or runtime, as its README writes it and at its best."""
    told: dict[str, Any] = {"vitrail": stage.figures(stage.ours)}
    for kind, entries in (("readme", _readme_entries(stage)), ("best", list(stage.ratios))):
        if entries:
            fastest = stage.fastest(entries)
            ratio = spread(stage.ratios[fastest])
            told |= {f"ratio_{kind}": ratio["median"], f"ratio_{kind}_spread": ratio}
            told[f"fastest_{kind}"] = f"{fastest.setup.name}, {fastest.setup}"
    return told


def _tell_latency(stage: Stage) -> dict[str, Any]:
    """The same of one image at a time, as times: below 1 ours is the faster."""
    told: dict[str, Any] = {"vitrail_ms": 1e3 / statistics.median(stage.rates[stage.ours])}
    if stage.ratios:
        fastest = stage.fastest(list(stage.ratios))
        times = spread([1 / ratio for ratio in stage.ratios[fastest]])
        told |= {"time_ratio_best": times["median"], "time_ratio_best_spread": times}
        told |= {"fastest_best": f"{fastest.setup.name}, {fastest.setup}"}
    return told


def _describe_machine(threads: int, fast_bf16: bool) -> dict[str, Any]:
    import torch

    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": threads,
        "cores": os.cpu_count(),
        "fast_bf16": fast_bf16,
        "system": platform.platform(),
    }
