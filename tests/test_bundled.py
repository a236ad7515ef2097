"""The model that ships with the package: it is there, small, and answers to its name in every verb."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitrail
from conftest import make_config, save_image
from vitrail.cli import main
from vitrail.data import load_split
from vitrail.errors import VitrailError, ignore_events
from vitrail.evaluate import evaluate
from vitrail.run import BUNDLED, Run, load_run
from vitrail.train import train

ROOT = Path(__file__).parent.parent
HORSE = ROOT / "docs" / "examples" / "horse.png"


def test_predict_needs_nothing_but_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(HORSE), "--json"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["top"][0]["label"] == "horse"
    assert vitrail.load().predict([HORSE])[0].top[0].label == "horse"


def test_it_is_small_and_in_bf16_and_has_a_card() -> None:
    weights = BUNDLED / "cifar10" / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    assert {p.dtype for p in load_run("cifar10").load_model().parameters()} == {torch.float32}
    card = (BUNDLED / "cifar10" / "README.md").read_text()
    assert all(said in card for said in ("Data", "minutes", "val", "test", "Limits"))


def test_a_card_says_what_evaluate_says(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ship = importlib.import_module("ship")
    bundle = ship.build_bundle(trained, tmp_path / "small")
    card = ship.build_card(trained, bundle, "digits", "Digits.")
    for split in ("val", "test"):
        assert f"{split} {evaluate(bundle, 'digits', split).accuracy:.2%} (" in card


def test_two_models_are_compared_on_the_same_images(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    paired = importlib.import_module("paired")
    name = str(trained.folder)
    right, losses, _ = paired.score_images(name, "digits", "test", flip=False)
    expected = evaluate(trained, "digits", "test")
    assert (right.mean(), losses.mean()) == (
        pytest.approx(100 * expected.accuracy),
        pytest.approx(expected.loss, rel=1e-3),
    )
    losses_of_both = paired.score_images(name, "digits", "test", flip=True)[1]
    mirrored = load_split(trained.config, "digits", "test", ignore_events)
    mirrored = replace(mirrored, images=mirrored.images.flip(-1))
    monkeypatch.setattr(paired, "load_split", lambda *_: mirrored)
    losses_mirrored = paired.score_images(name, "digits", "test", flip=False)[1]
    torch.testing.assert_close(losses_of_both.neg().exp(), (losses.neg().exp() + losses_mirrored.neg().exp()) / 2)
    monkeypatch.undo()
    other = train(replace(make_config(), seed=1), tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["paired.py", name, str(other.folder), "--data", "digits"])
    with pytest.raises(SystemExit, match="2"):
        paired.main()
    assert "the two hold out other images for val" in capsys.readouterr().err


def test_what_is_made_of_it_is_left_here_and_not_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in load_run("cifar10").config.classes:
        save_image(tmp_path / "pictures" / "test" / name / "0.png", (90, 120, 60))
        for i in (1, 2):
            save_image(tmp_path / "pictures" / "train" / name / f"{i}.png", (90, 120, 60), seed=i)
    shipped = sorted(BUNDLED.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "cifar10", "--data", "pictures"]) == 0
    assert json.loads((tmp_path / "evaluation-test.json").read_text())["count"] == 10
    assert sorted(BUNDLED.rglob("*")) == shipped


def test_a_run_of_that_name_goes_first_and_other_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(make_config(), "cifar10")
    assert load_run("cifar10").config.preset == "tiny"
    with pytest.raises(VitrailError, match=r"or a model that ships \(cifar10\)"):
        load_run("cifar100")
