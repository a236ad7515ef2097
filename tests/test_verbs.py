"""Evaluate, predict and the command line, as a person or a script would use them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from conftest import COLOURS, save_image
from vitrail.batch import normalize
from vitrail.cli import main
from vitrail.data import ImageSet
from vitrail.errors import VitrailError, ignore_events
from vitrail.evaluate import compute_logits, evaluate
from vitrail.metrics import compute_metrics, wilson_interval
from vitrail.run import Run

# ── metrics ──────────────────────────────────────────────────────────────────────────────────


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_metrics_by_hand() -> None:
    logits = logits_of([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    metrics = compute_metrics(logits, torch.tensor([0, 1, 1, 1]), ("a", "b", "c"))
    assert (metrics.count, metrics.accuracy) == (4, 0.5)
    assert metrics.per_class == {"a": 1.0, "b": pytest.approx(1 / 3), "c": None}
    assert metrics.confusion == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert metrics.loss == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.8) + math.log(0.1)) / 4)
    # bins of 1/15: 0.7 right; 0.6 wrong; 0.8 once right, once wrong
    assert metrics.ece == pytest.approx((0.3 + 0.6 + 2 * abs(0.5 - 0.8)) / 4, abs=1e-6)


def test_ece_with_confidences_of_zero_and_one() -> None:
    """By hand, in bins of 1/15: sure and right, sure and wrong (the right class being given 0), and in between."""
    sure, halfway = [1.0, 0.0, 0.0], [0.5, 0.45, 0.05]
    logits = logits_of([sure, sure, sure, halfway, halfway])  # the logarithm of 0 is minus infinity
    metrics = compute_metrics(logits, torch.tensor([0, 0, 1, 0, 2]), ("a", "b", "c"))
    assert metrics.ece == pytest.approx(3 / 5 * (1 - 2 / 3) + 2 / 5 * abs(0.5 - 1 / 2), abs=1e-5)
    everyone_sure = compute_metrics(logits_of([sure] * 4), torch.tensor([0, 0, 0, 0]), ("a", "b", "c"))
    assert everyone_sure.ece == pytest.approx(0, abs=1e-5)
    assert compute_metrics(logits_of([sure]), torch.tensor([2]), ("a", "b", "c")).ece == pytest.approx(1, abs=1e-5)


def test_ece_a_confidence_of_one_shares_the_last_bin() -> None:
    """Certain and wrong, beside 95% sure and right: one bin of accuracy 0.5 and confidence 0.975."""
    logits = torch.tensor([[1000.0, 0.0], [math.log(0.95 / 0.05), 0.0]])
    metrics = compute_metrics(logits, torch.tensor([1, 0]), ("a", "b"))
    assert metrics.ece == pytest.approx(0.475, abs=1e-6)


def test_wilson_interval_against_the_textbook() -> None:
    low, high = wilson_interval(15, 50)
    assert (low, high) == (pytest.approx(0.1910, abs=1e-4), pytest.approx(0.4375, abs=1e-4))
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_logits_are_those_of_each_image_whatever_the_padding(trained: Run) -> None:
    images = torch.randint(0, 256, (253, 1, 8, 8), dtype=torch.uint8)
    classes = trained.config.classes
    model, pre = trained.load_model(), trained.config.preprocessing
    logits = compute_logits(model, ImageSet(images, torch.zeros(253, dtype=torch.int64), classes, 0), pre)
    alone = compute_logits(model, ImageSet(images[-1:], torch.zeros(1, dtype=torch.int64), classes, 0), pre)
    assert logits.shape == (253, 10)
    torch.testing.assert_close(logits[-1:], alone, atol=1e-5, rtol=1e-5)


# ── evaluate and predict in Python ───────────────────────────────────────────────────────────


def test_evaluate_reads_the_split_asked_for(trained: Run) -> None:
    counts = {split: evaluate(trained, split=split).count for split in ("train", "val", "test")}
    assert counts["train"] == trained.config.num_train
    assert counts["val"] == trained.config.num_val
    assert counts["test"] == 359


def test_the_validation_figures_of_training_are_those_of_evaluate(trained: Run) -> None:
    row, metrics = trained.read_metrics()[-1], evaluate(trained, split="val")
    assert metrics.accuracy == row["val_accuracy"]
    assert metrics.loss == pytest.approx(row["val_loss"], abs=1e-5)


def test_evaluate_refuses_other_classes(trained: Run, colour_folder: Path) -> None:
    with pytest.raises(VitrailError, match="has the classes blue, green, red, the model was trained on 0, 1, 2, 3 … "):
        evaluate(trained, data=str(colour_folder))


def test_python_face(trained: Run) -> None:
    classifier = vitrail.load(str(trained.folder))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    (prediction,) = classifier.predict([picture], top=10)
    assert sum(g.probability for g in prediction.top) == pytest.approx(1.0, abs=1e-5)
    assert [g.probability for g in prediction.top] == sorted((g.probability for g in prediction.top), reverse=True)
    assert {g.label for g in prediction.top} == set("0123456789")
    with pytest.raises(VitrailError, match="top is 0"):
        classifier.predict([picture], top=0)


def test_the_verbs_stay_functions_after_their_modules_are_imported() -> None:
    assert callable(vitrail.train)
    assert callable(vitrail.evaluate)
    assert vitrail.evaluate is evaluate
    with pytest.raises(AttributeError, match="no attribute 'helpers'"):
        _ = vitrail.helpers


# ── the command line ─────────────────────────────────────────────────────────────────────────


def test_train_evaluate_predict_by_command(
    colour_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [
        "--threads",
        "1",
        "--budget",
        "30epochs",
        "--model.patch-size",
        "4",
        "--optim.batch-size",
        "8",
        "--precision",
        "fp32",
    ]
    assert main(["train", "tiny", "--data", str(colour_folder), "--out", str(run), "--json", *flags]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["run"] == str(run)
    assert main(["evaluate", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        *("split", "count", "accuracy", "accuracy_low", "accuracy_high"),
        *("loss", "ece", "per_class", "confusion"),
    }
    assert report["accuracy"] == 1.0
    assert report["count"] == 6
    assert json.loads((run / "evaluation-test.json").read_text()) == report
    assert Image.open(run / "confusion-test.png").size[0] > 300
    big = save_image(tmp_path / "new.png", COLOURS["green"], size=50)
    grey = tmp_path / "grey.png"
    Image.new("L", (9, 5), 90).save(grey)
    assert main(["predict", "--model", str(run), str(big), str(grey), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["predictions"]
    assert (first["path"], first["top"][0]["label"]) == (str(big), "green")
    assert len(second["top"]) == 3
    assert main(["evaluate", str(run)]) == 0
    assert "accuracy 100.00%" in capsys.readouterr().out
    assert main(["predict", "--model", str(run), str(big)]) == 0
    assert "green" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "no verb 'fly'; give one of train, evaluate, predict"),
        (["train", "huge"], "no preset 'huge'; give one of tiny, minute, quick"),
        (["train", "--preset", "huge"], "no preset 'huge'"),
        (["train", "tiny", "--data", "nowhere", "--out", "{tmp}/r"], "no data source 'nowhere'"),
        (
            ["train", "tiny", "--out", "{tmp}/r", "--model.patch-size", "3"],
            "patch size 3 does not divide the image size 8",
        ),
        (["train", "tiny", "--out", "{tmp}/r", "--model.num-heads", "7"], "7 heads do not divide the width 64"),
        (["train", "tiny", "--out", "{tmp}/r", "--budget", "later"], "budget 'later' is not understood"),
        (["train", "tiny", "--out", "{run}"], "already holds a run"),
        (["train", "--resume"], "--resume needs the run to go on with"),
        (["train", "--resume", "--out", "{run}"], "is finished"),
        (["train", "quick", "--resume", "--out", "{run}"], "began with the preset tiny, not quick"),
        (["train", "--resume", "--out", "{run}", "--seed", "3"], "seed was 0, now 3; leave that flag out"),
        (["train", "--resume", "--out", "{tmp}"], "no model at"),
        (["evaluate", "{tmp}"], "no model at"),
        (["evaluate", "{run}", "--out", "/proc/nothing"], "cannot write to /proc/nothing"),
        (["predict", "--model", "{run}", "{tmp}/none.png"], "cannot read the image"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.folder.rglob("*"))
    filled = [a.format(tmp=tmp_path, run=trained.folder) for a in arguments]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []
    assert sorted(trained.folder.rglob("*")) == before
    with pytest.raises(VitrailError):
        main([*filled, "--debug"])


def test_a_flag_nobody_knows_exits_with_two() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny", "--colour", "red"])
    assert stop.value.code == 2


def test_help_of_train_lists_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--data", "--out", "--budget", "--seed", "--resume", "--device", "--threads", "--quiet"):
        assert flag in shown
    for flag in ("--model.patch-size", "--optim.muon-lr", "--augment.mixup", "--input.balanced", "--input.skip-bad"):
        assert flag in shown


def vitrail_process(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitrail", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_says_how_to_go_on_and_resume_finishes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = vitrail_process("train", "tiny", "--budget", "9epochs", "--out", str(run), "--threads", "1")
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert f"go on with: vitrail train --resume --out {run}" in err
    assert "Traceback" not in err
    assert not (run / "model.safetensors").exists()
    process = vitrail_process("train", "--resume", "--out", str(run))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (run / "model.safetensors").exists()
    assert "training" in err  # plain lines where there is no terminal
    assert "img/s" in err


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    process = vitrail_process("train", "tiny", "--out", str(tmp_path / "run"))
    time.sleep(2.5)  # well into its imports or its probe of the speed, which takes four seconds
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_inside_compiled_text_keeps_its_exit_code(tmp_path: Path) -> None:
    """As where torch makes its dataclasses: CPython would die of the signal at exit, though it was caught."""
    text = "import os, signal; os.kill(os.getpid(), signal.SIGINT); [None for _ in range(9)]"
    stand_in = f"from vitrail import cli; cli.VERBS['train'] = lambda _: exec({text!r})"
    (tmp_path / "sitecustomize.py").write_text(stand_in)
    command = [sys.executable, "-m", "vitrail", "train"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing more was saved\n")


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vitrail", "--help"], capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_broken_readers_do_not_matter() -> None:
    done = subprocess.run(f"{sys.executable} -m vitrail --help | true", shell=True, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    ignore_events(None)  # the silent listener takes anything


@pytest.mark.parametrize("threads", [1, 3])
def test_every_image_is_evaluated_once_and_in_order(trained: Run, threads: int) -> None:
    """97 images are three batches and a part of one, whichever thread takes them."""
    pixels = torch.randint(0, 256, (97, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, preprocessing = trained.load_model(), trained.config.preprocessing
    told: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = ImageSet(pixels, torch.zeros(97, dtype=torch.int64), ("a",), 0)
        logits = compute_logits(model, images, preprocessing, lambda event: told.append(event.done))
        with torch.inference_mode():
            alone = torch.cat([model(normalize(one[None], preprocessing)) for one in pixels])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    assert told == [32, 64, 96, 97]
