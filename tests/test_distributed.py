"""Many processes train, stop and evaluate as one: torchrun starts real ones, on gloo."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import world
from vitrail.distributed import World
from vitrail.errors import Event, Interrupted, VitrailError, VitrailWarning
from vitrail.resolve import choose_machine
from vitrail.run import load_run
from vitrail.train import resume

TRAIN = ["-m", "vitrail", "train", "tiny", "--data", "digits", "--precision", "fp32", "--quiet"]


def torchrun(count: int, *arguments: str | Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    said, _ = process.communicate(timeout=timeout)
    return said


def wait_for(found: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of torchrun's worker number `rank`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment, parent = (
                (entry / "environ").read_bytes(),
                (entry / "stat").read_text().rsplit(")")[1].split()[1],
            )
        except OSError:
            continue  # it has just ended
        if int(parent) == process.pid and f"\0RANK={rank}\0".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"torchrun has no worker {rank}")


@pytest.fixture(scope="module", params=[2, 3])
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two or three processes made of six steps, by every strategy."""
    out = tmp_path_factory.mktemp("world") / "steps.safetensors"
    process = torchrun(request.param, world.__file__, "steps", out)
    said = finish(process)
    assert process.returncode == 0, said
    return load_file(out)


def part(figures: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{name}/"): v for k, v in figures.items() if k.startswith(f"{name}/")}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro", [0, 3])
def test_many_processes_take_the_steps_of_one(figures: dict[str, torch.Tensor], strategy: str, micro: int) -> None:
    """With everything random on, mixing across the border of two parts, pieces of 3 and world sizes that do not fit."""
    alone = world.take_steps(world.make_resolved(), World())
    together = part(figures, f"{strategy}-{micro}-None")
    assert (together["losses"] - alone["losses"]).abs().max() < 1e-5
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    assert len(set(alone["losses"].tolist())) == world.NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro", [0, 3])
def test_a_checkpoint_of_many_processes_goes_on_to_the_bit(
    figures: dict[str, torch.Tensor], strategy: str, micro: int
) -> None:
    whole, resumed = (part(figures, f"{strategy}-{micro}-{stop}") for stop in (None, 3))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_checkpoint_fits_any_number_of_processes(figures: dict[str, torch.Tensor]) -> None:
    state = {k: v for k, v in part(figures, "fsdp-0-None").items() if k != "losses"}
    learner = world.Learner(world.make_resolved())
    learner.load_state(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in learner.state().items())


def test_nonfinite_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    out = tmp_path / "spoilt.safetensors"
    process = torchrun(2, world.__file__, "spoil", out)
    said = finish(process)
    assert process.returncode == 0, said
    for strategy in ("ddp", "fsdp"):
        found = part(load_file(out), strategy)
        assert {name: tensor.item() for name, tensor in found.items()} == {"skipped": 2.0, "moved": 0.0}


def test_accum() -> None:
    """Pieces of a batch, the last one shorter, add up to the gradients of the whole."""
    for micro in (1, 3, 7, 19, 20, 64):
        gradients = []
        for size in (0, micro):
            learner = world.Learner(world.make_resolved(micro_batch_size=size, clip_norm=0.0))
            for optimizer in learner._optimizers:
                optimizer.step = lambda: None
                optimizer.zero_grad = lambda: None
            sizes = []
            learner._replicas[0].register_forward_pre_hook(lambda _, x, sizes=sizes: sizes.append(len(x[0])))
            learner.step(world.make_images(world.BATCH_SIZE).take(learner.share), 0)
            gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]))
            assert sum(sizes) == world.BATCH_SIZE
            assert max(sizes) <= (size or world.BATCH_SIZE)
        assert (gradients[0] - gradients[1]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1, 2, 3])
def test_eval_exact(tmp_path: Path, size: int) -> None:
    out = tmp_path / "logits.safetensors"
    process = torchrun(size, world.__file__, "evaluate", out)
    said = finish(process)
    assert process.returncode == 0, said
    assert f'"size": {size}' in said
    found = load_file(out)
    assert found["seen"].tolist() == [1.0] * 97
    assert found["logits"].tolist() == [[float(i), 2.0 * i] for i in range(97)]


@pytest.mark.slow
def test_ddp_sigterm(tmp_path: Path) -> None:
    """SIGTERM to one process: all stop after the same step, saved once, within 30 s; then the run goes on alone."""
    run = tmp_path / "run"
    process = torchrun(2, *TRAIN, "--budget", "200epochs", "--out", run)
    wait_for((run / "metrics.jsonl").exists)
    began = time.monotonic()
    os.kill(worker_of(process, 1), signal.SIGTERM)
    said = finish(process, timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    stops = re.findall(r"stopped at step (\d+) of", said)
    assert len(set(stops)) == 1
    assert load_run(run).checkpoints[-1].name == f"step_{int(stops[0]):08d}"
    assert "Connection closed" not in said

    def stop(event: Event) -> None:
        if event.task == "training":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(VitrailWarning, match="began with 2 processes and goes on with 1"), pytest.raises(Interrupted):
        resume(run, stop)
    assert load_run(run).checkpoints[-1].name == f"step_{int(stops[0]) + 1:08d}"


@pytest.mark.slow
def test_ddp_restart(tmp_path: Path) -> None:
    """One process killed outright: torchrun starts all again, and the weights are those of an undisturbed run."""
    command = [*TRAIN, "--budget", "6epochs", "--checkpoint-steps", "7", "--out"]
    undisturbed = torchrun(2, *command, tmp_path / "whole")
    said = finish(undisturbed)
    assert undisturbed.returncode == 0, said
    disturbed = torchrun(2, *command, tmp_path / "run", restarts=1)
    wait_for(lambda: len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) > 1)
    os.kill(worker_of(disturbed, 1), signal.SIGKILL)
    said = finish(disturbed)
    assert disturbed.returncode == 0, said
    whole, run = load_run(tmp_path / "whole"), load_run(tmp_path / "run")
    assert run.weights.read_bytes() == whole.weights.read_bytes()
    assert [row["train_loss"] for row in run.read_metrics()] == [row["train_loss"] for row in whole.read_metrics()]


def test_more_processes_than_images_in_a_batch_are_refused() -> None:
    config = replace(world.make_resolved(batch_size=2).asked())
    with pytest.raises(VitrailError, match="batch_size 2 leaves some of the 3 processes without an image"):
        choose_machine(config, World(size=3))
