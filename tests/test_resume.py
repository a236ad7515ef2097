"""Nothing is lost: checkpoints that tell of damage, full disks, kills at any moment, steps that are not finite."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_config
from vitrail.checkpoint import find_damage, list_checkpoints, load_newest_checkpoint, save_checkpoint
from vitrail.config import AugmentConfig, ModelConfig, OptimConfig
from vitrail.errors import Event, Interrupted, VitrailError, VitrailWarning
from vitrail.evaluate import evaluate
from vitrail.learner import Learner
from vitrail.predict import load
from vitrail.run import Run, create_run, load_run
from vitrail.train import resume, train
from vitrail.verify import timeless_metrics

ALL = {
    "model": ModelConfig(patch_size=2, embed_dim=32, depth=2, num_heads=4, drop_rate=0.1, rel_pos="neighbour"),
    "optim": OptimConfig(batch_size=64, ema_decay=0.9, clip_norm=1.0, coarse_fraction=0.4),
    "augment": AugmentConfig(crop_padding=1, flip=False, mixup=0.2, cutmix=1.0),
}
PASS_STEPS = 21  # 1,295 digits in batches of 64


def same_bytes(a: Run, b: Run) -> bool:
    return a.weights.read_bytes() == b.weights.read_bytes()


def stop_at(*steps: int) -> object:
    """A listener that asks training to stop after these steps."""

    def listen(event: Event) -> None:
        if event.task == "training" and event.done in steps:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two passes that nothing disturbed."""
    return train(make_config(**ALL, budget="2epochs"), tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("stop_after", [1, 10, PASS_STEPS - 1, PASS_STEPS, PASS_STEPS + 1, 40])
def test_resume_bitwise(whole: Run, tmp_path: Path, stop_after: int) -> None:
    with pytest.raises(Interrupted, match=f"stopped at step {stop_after} of"):
        train(whole.config.asked(), tmp_path / "run", stop_at(stop_after))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = resume(tmp_path / "run")
    assert same_bytes(resumed, whole)
    assert timeless_metrics(resumed) == timeless_metrics(whole)


@pytest.mark.slow
def test_resume_bitwise_in_bf16_with_replicas(tmp_path: Path) -> None:
    config = make_config(precision="bf16", threads=2, budget="1epochs", optim=OptimConfig(batch_size=64, ema_decay=0.9))
    undisturbed = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", stop_at(7))
    assert same_bytes(resume(tmp_path / "run"), undisturbed)


def test_resume_bitwise_with_a_budget_in_seconds(tmp_path: Path) -> None:
    """The probe turns seconds into steps once; time already spent is told on, not spent anew."""
    with pytest.raises(Interrupted):
        train(make_config(**ALL, budget="8s"), tmp_path / "run", stop_at(2))  # a busy machine plans only a few
    spent = load_run(tmp_path / "run").load_checkpoint()[1]["elapsed_s"]
    config = load_run(tmp_path / "run").config
    resumed = resume(tmp_path / "run")
    undisturbed = resume(create_run(tmp_path / "whole", config).folder)
    assert same_bytes(resumed, undisturbed)
    assert timeless_metrics(resumed) == timeless_metrics(undisturbed)
    assert resumed.read_metrics()[-1]["step"] == config.num_steps
    assert resumed.read_metrics()[-1]["elapsed_s"] > spent > 0


def test_resume_twice(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(whole.config.asked(), tmp_path / "run", stop_at(5))
    with pytest.raises(Interrupted, match="stopped at step 30"):
        resume(tmp_path / "run", stop_at(30))
    resumed = resume(tmp_path / "run")
    assert same_bytes(resumed, whole)
    assert timeless_metrics(resumed) == timeless_metrics(whole)
    with pytest.raises(VitrailError, match="is finished"):
        resume(tmp_path / "run")


def test_resume_lr(whole: Run, tmp_path: Path) -> None:
    """The learning rate goes on where it stood, told step by step."""

    def told(rates: dict[int, object], *stops: int) -> object:
        def listen(event: Event) -> None:
            if event.task == "training":
                assert event.done not in rates
                rates[event.done] = event.fields["lr"]
                if event.done in stops:
                    os.kill(os.getpid(), signal.SIGINT)

        return listen

    undisturbed, parts = {}, {}
    train(whole.config.asked(), tmp_path / "whole", told(undisturbed))
    with pytest.raises(Interrupted):
        train(whole.config.asked(), tmp_path / "run", told(parts, 17))
    resume(tmp_path / "run", told(parts))
    assert parts == undisturbed
    assert len(set(parts.values())) > PASS_STEPS


def test_ckpt_corrupt(whole: Run, tmp_path: Path) -> None:
    """A changed byte, a cut file, a lost manifest: found, named, and the checkpoint before is used."""
    with pytest.raises(Interrupted):
        train(whole.config.asked(), tmp_path / "run", stop_at(30))
    older, newest = load_run(tmp_path / "run").checkpoints
    tensors = newest / "state.safetensors"
    sound = tensors.read_bytes()
    for hurt in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[: len(sound) // 2], b""):
        tensors.write_bytes(hurt)
        with pytest.raises(VitrailError, match=r"state\.safetensors has changed since it was saved"):
            load_run(newest).load_model()
    with pytest.warns(VitrailWarning, match=r"step_00000030/state\.safetensors has changed .* going back"):
        resumed = resume(tmp_path / "run")
    assert same_bytes(resumed, whole)
    assert timeless_metrics(resumed) == timeless_metrics(whole)
    (whole_again := load_run(tmp_path / "run")).weights.unlink()
    for path in whole_again.checkpoints:
        (path / "manifest.json").unlink()
    with (
        pytest.warns(VitrailWarning, match=r"manifest\.json is missing"),
        pytest.raises(VitrailError, match="is sound"),
    ):
        resume(tmp_path / "run")
    assert not older.exists()  # two are kept


def test_kill_save(tmp_path: Path) -> None:
    """SIGKILL at 50 random moments of saving, more on a busy machine: what is published is always sound."""
    draw, step = random.Random(0), 0
    for kills in range(500):
        if kills >= 50 and step > 25:
            break
        child = os.fork()
        if child == 0:
            for i in itertools.count(step):
                save_checkpoint(tmp_path, {"w": torch.full((300_000,), float(i))}, {"step": i})
        time.sleep(draw.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))
        newest = load_newest_checkpoint(tmp_path)
        if newest is not None:
            assert newest[0]["w"].unique().tolist() == [newest[1]["step"]]
            step = newest[1]["step"] + 1
    assert step > 25


def test_save_fail(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no more, and one that refuses: one line says so, the last checkpoint stays, the run goes on."""
    with pytest.raises(Interrupted):
        train(whole.config.asked(), tmp_path / "run", stop_at(5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(VitrailError, match=r"cannot write .*step_00000021.*safe up to step_00000005; mend that"):
            resume(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("vitrail.checkpoint.save_file", refuse)
        with pytest.raises(VitrailError, match=r"cannot write .*: Permission denied; .*safe up to step_00000005"):
            resume(tmp_path / "run")
    resumed = resume(tmp_path / "run")
    assert same_bytes(resumed, whole)
    assert timeless_metrics(resumed) == timeless_metrics(whole)


@pytest.mark.parametrize("step", [5, PASS_STEPS])
def test_save_fail_where_the_folder_has_vanished(whole: Run, tmp_path: Path, step: int) -> None:
    """Between two passes and at the end of one: said, and no hollow folder is made in its place."""

    def vanish(event: Event) -> None:
        if event.task == "training" and event.done == step - 1:
            shutil.rmtree(tmp_path / "run")

    config = replace(whole.config.asked(), checkpoint_steps=step)
    with pytest.raises(VitrailError, match=r"cannot write .*No such file or directory; there is no checkpoint yet"):
        train(config, tmp_path / "run", vanish)
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_stops_at_once(whole: Run, tmp_path: Path) -> None:
    def twice(event: Event) -> None:
        if event.task == "training" and event.done == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(whole.config.asked(), tmp_path / "run", twice)
    assert load_run(tmp_path / "run").checkpoints == []


def test_checkpoints_by_steps_and_by_the_clock(tmp_path: Path) -> None:
    def saved(**when: float) -> set[str]:
        seen, folder = set(), tmp_path / "-".join(f"{name}-{value}" for name, value in when.items())

        def listen(event: Event) -> None:
            seen.update(path.name for path in list_checkpoints(folder / "checkpoints"))

        train(make_config(budget="1epochs", **when), folder, listen)
        return seen

    assert saved(checkpoint_steps=5) == {f"step_{step:08d}" for step in (5, 10, 15, 20)}
    assert len(saved(checkpoint_minutes=1e-9)) == PASS_STEPS - 1
    assert saved(checkpoint_minutes=0) == set()


@pytest.mark.slow
def test_verify_resume(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two short runs by the command, one killed, and the figures that prove them equal."""
    from vitrail.cli import main

    command = ["verify-resume", str(trained.folder / "config.json"), "--steps", "24", "--kills", "2", "--quiet"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact"] is True
    assert told["undisturbed_sha256"] == told["killed_sha256"] != sha256(trained.weights.read_bytes()).hexdigest()
    first, second = told["killed_after_steps"]
    assert 0 < first < second < 24
    assert main([*command[:2], "--kills", "0"]) == 2
    assert "0 kills in 40 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_verify_resume_tells_runs_apart(
    trained: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a killed run goes on with another learning rate, the difference is told and the exit code is 2."""
    from vitrail import verify
    from vitrail.cli import main

    live_and_die = verify._live_and_die

    def spoil(run: Run, delay_s: float) -> int:
        reached = live_and_die(run, delay_s)
        file = run.folder / "config.json"
        file.write_text(file.read_text().replace('"lr": 0.002', '"lr": 0.003'))
        return reached

    monkeypatch.setattr(verify, "_live_and_die", spoil)
    assert main(["verify-resume", str(trained.folder), "--steps", "16", "--kills", "1", "--quiet"]) == 2
    assert "is not the undisturbed one: its weights differ" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm(tmp_path: Path) -> None:
    """SIGTERM to the command: it finishes the step, saves, says so and exits with 143; Ctrl-C with 130."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        folder = tmp_path / str(code)
        command = ["train", "tiny", "--data", "digits", "--budget", "300epochs", "--out", str(folder)]
        process = subprocess.Popen([sys.executable, "-m", "vitrail", *command], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert f"saved there; go on with: vitrail train --resume --out {folder}" in said
        assert "Traceback" not in said
        assert load_run(folder).load_checkpoint() is not None


def test_resume_mismatch(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitrail.cli import main

    with pytest.raises(Interrupted):
        train(whole.config.asked(), tmp_path / "run", stop_at(5))
    again = ["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*again, "--model.depth", "3"]) == 2
    said = capsys.readouterr().err
    assert "'depth': 2" in said
    assert "'depth': 3" in said
    config_file = tmp_path / "run" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"data_sha256": "0" * 64}))
    assert main(again) == 2
    said = capsys.readouterr().err
    assert f"(SHA-256 {config['data_sha256'][:12]}…, then 000000000000…)" in said


def test_nonfinite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is not finite is skipped and counted; ten in a row end the run, with the images' numbers."""
    backward = Learner._backward
    bad = {4, 5}
    calls = itertools.count()

    def spoiled(self: Learner, *arguments: object) -> float:
        loss = backward(self, *arguments)
        if next(calls) in bad:
            self._replicas[0].head.weight.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Learner, "_backward", spoiled)
    seen = []
    run = train(make_config(budget="1epochs"), tmp_path / "run", lambda event: seen.append(event.fields))
    assert run.read_metrics()[-1]["skipped_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(run.weights).values())
    calls, bad = itertools.count(), set(range(3, 100))
    with pytest.raises(VitrailError, match="not finite for 10 steps in a row, up to step 13"):
        train(make_config(budget="1epochs"), tmp_path / "lost")
    suspects = json.loads((tmp_path / "lost" / "nonfinite.json").read_text())
    assert list(suspects) == [str(step) for step in range(3, 13)]
    assert {len(samples) for samples in suspects.values()} == {64}
    assert not (tmp_path / "lost" / "model.safetensors").exists()


def test_nonfinite_steps_move_nothing(trained: Run) -> None:
    learner = Learner(trained.config)
    before = {name: tensor.clone() for name, tensor in learner.state().items()}
    from vitrail.batch import Batch

    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    loss = learner.step(Batch(images, torch.zeros(8, dtype=torch.int64), torch.full((8,), float("nan"))), 0)
    assert np.isnan(loss)
    assert before.keys() == learner.state().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.state().items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: Learner, *_: object) -> float:
        nn.init.constant_(self.model.head.bias, float("inf"))
        return 1.0

    monkeypatch.setattr(Learner, "step", explode)
    with pytest.raises(VitrailError, match=r"model\.head\.bias was not finite at step"):
        train(make_config(), tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_nan_visible(trained: Run, tmp_path: Path) -> None:
    """Weights of NaN are an error in every answer, not a confident class."""
    (tmp_path / "config.json").write_text((trained.folder / "config.json").read_text())
    state = load_file(trained.weights)
    state["head.bias"][3] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    picture = tmp_path / "five.png"
    picture.write_bytes((Path(__file__).parent.parent / "docs/examples/five.png").read_bytes())
    with pytest.raises(VitrailError, match="answers with NaN or infinity"):
        load(tmp_path).predict([picture])
    with pytest.raises(VitrailError, match="answers with NaN or infinity"):
        evaluate(load_run(tmp_path))
