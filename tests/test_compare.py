"""Comparisons: the statistics against scipy and by hand, the grids by running them, small and real."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from conftest import COLOURS, make_config, save_image
from vitrail.cli import main
from vitrail.compare import compare, make_plan
from vitrail.compare import session as session_room
from vitrail.compare.questions import FRACTIONS, QUESTIONS, lay_out_grid
from vitrail.compare.statistics import (
    Interval,
    estimate_mean,
    find_cost,
    find_crossings,
    fit_power_law,
    pair,
    say_difference,
)
from vitrail.compare.summary import summarise
from vitrail.config import AugmentConfig, InputConfig, ModelConfig, OptimConfig, RunConfig
from vitrail.data import split_records
from vitrail.errors import Event, Interrupted, VitrailError
from vitrail.evaluate import evaluate
from vitrail.run import load_run
from vitrail.train import train

ARMS = ("vit", "resnet")
NUM_STEPS = 6


def make_base(**changes: object) -> RunConfig:
    """A recipe so small that a cell takes a second; the second half of its steps at full size."""
    model = ModelConfig(patch_size=2, embed_dim=32, depth=2, num_heads=4, rel_pos="neighbour")
    optim = OptimConfig(batch_size=32, coarse_fraction=0.5)
    return make_config(**{"model": model, "optim": optim, "budget": f"{NUM_STEPS}steps", **changes})


# ── statistics ───────────────────────────────────────────────────────────────────────────────


def test_the_mean_of_some_seeds_has_students_interval() -> None:
    values = [0.71, 0.74, 0.69, 0.75]
    found = estimate_mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.mean == pytest.approx(0.7225)
    assert estimate_mean([0.7]) == Interval(0.7, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    a, b = {0: 70.0, 1: 75.0, 2: 80.0, 5: 10.0}, {2: 78.5, 0: 69.0, 1: 73.0, 7: 99.0}
    found = pair(a, b)
    expected = stats.ttest_rel([70, 75, 80], [69, 73, 78.5]).confidence_interval(0.95)
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(1.5), 3)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert pair({0: 1.0}, {1: 1.0}) is None


def test_no_difference_is_said_where_the_interval_covers_zero() -> None:
    assert say_difference("A − B", Interval(-4.2, -6.0, -2.4, 3)) == "A − B: −4.2 points (−6.0 to −2.4)"
    assert say_difference("A − B", Interval(0.5, -1.1, 2.0, 3)) == "A − B: no difference seen (−1.1 to +2.0)"
    assert say_difference("A − B", Interval(0.5, None, None, 1)) == "A − B: +0.5 points (one seed, no interval)"


def test_crossings_lie_straight_between_points_on_a_logarithmic_scale() -> None:
    # The gap goes from −2 to +1 between 0.01 and 1, so it is zero two thirds of the way: at 10^(−2 + 4/3).
    assert find_crossings([0.01, 1], [50, 61], [52, 60]) == [pytest.approx(10 ** (-2 / 3))]
    assert find_crossings([0.1, 0.5, 1], [1, 2, 3], [2, 3, 4]) == []
    assert find_crossings([0.1, 0.5, 1], [1, 3, 3], [2, 3, 4]) == []  # touches and turns back
    assert find_crossings([0.1, 0.5, 1], [3, 3, 3], [2, 3, 1]) == []
    assert len(find_crossings([1, 2, 4, 8], [0, 2, 0, 2], [1, 1, 1, 1])) == 3


def test_the_cost_of_an_accuracy_is_where_the_curve_first_reaches_it() -> None:
    curve = [(40.0, 0.7), (10.0, 0.5), (160.0, 0.6)]
    assert find_cost(0.6, curve) == pytest.approx(20)  # half of the way from 10 to 40, in logarithms
    assert find_cost(0.3, curve) == 10
    assert find_cost(0.7, curve) == pytest.approx(40)
    with pytest.raises(ValueError, match=r"ends at 0\.6, below 0\.9"):
        find_cost(0.9, curve)


def test_a_power_law_is_found_again_with_its_interval() -> None:
    x = np.array([1, 2, 4, 8, 16.0])
    exact = fit_power_law(list(x), list(0.3 * x**-0.25))
    assert exact is not None
    assert (exact.factor, exact.exponent.mean) == (pytest.approx(0.3), pytest.approx(0.25))
    assert exact.at(81) == pytest.approx(0.1)
    noisy = 0.3 * x**-0.25 * np.array([1.02, 0.97, 1.01, 1.0, 0.99])
    found = fit_power_law(list(x), list(noisy))
    (slope, _), covariance = np.polyfit(np.log(x), np.log(noisy), 1, cov=True)
    half = stats.t.ppf(0.975, 3) * covariance[0, 0] ** 0.5
    assert found is not None
    assert found.exponent == Interval(*map(pytest.approx, (-slope, -slope - half, -slope + half)), 5)
    assert fit_power_law([1, 2], [0.1, 0.2]) is None


# ── what follows from cells ──────────────────────────────────────────────────────────────────


def make_cells(accuracies: dict[tuple[str, Any], list[float]], **fields: object) -> list[dict[str, Any]]:
    """Cells by (arm, x), their accuracies those of seeds 0, 1, 2…"""
    common = {"kind": "training", "regime": "", "seconds": 1.0, "pflop": 1.0, **fields}
    return [
        {**common, "arm": arm, "x": x, "seed": seed, "test_accuracy": accuracy}
        for (arm, x), values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_where_curves_cross_and_where_they_stay_apart_is_said() -> None:
    cells = make_cells(
        {
            ("vit", 0.01): [0.50, 0.50, 0.50], ("vit", 1.0): [0.60, 0.61, 0.62],
            ("resnet", 0.01): [0.52, 0.53, 0.51], ("resnet", 1.0): [0.60, 0.60, 0.60],
            ("vit-conv-stem", 0.01): [0.6, 0.6, 0.6], ("vit-conv-stem", 1.0): [0.7, 0.7, 0.7],
        }
    )  # fmt: skip
    summary = summarise("data", cells, [])
    crossing = "the mean curves of ViT and ResNet cross at 22% of the data, though no difference is seen anywhere"
    assert crossing in summary["sentences"]
    apart = "ViT with conv stem stays above ResNet, by 8.0 to 10.0 points in the mean; no crossing"
    assert apart in summary["sentences"]
    assert "ViT − ResNet at 100% of the data: no difference seen (−1.5 to +3.5)" in summary["sentences"]
    # The gap is −2, −3, −1 at first and 0, 1, 2 then: by seed it grows by 2, 4, 3.
    gain = stats.t.ppf(0.975, 2) / 3**0.5
    gains = (
        f"ViT gains on ResNet from 1% of the data to 100% of the data: +3.0 points (+{3 - gain:.1f} to +{3 + gain:.1f})"
    )
    assert gains in summary["sentences"]
    mean = next(m for m in summary["means"] if (m["arm"], m["x"]) == ("resnet", 0.01))
    assert (mean["test_accuracy"], mean["seeds"]) == (pytest.approx(0.52), 3)
    assert mean["high"] == pytest.approx(0.52 + 4.30265 * 0.01 / 3**0.5, abs=1e-6)


def test_compute_to_an_accuracy_is_compared_seed_by_seed() -> None:
    """The ResNet needs 4, then 2 times the ViT's seconds for what both reach."""
    cells = [
        *make_cells({("vit", 0.5): [0.6, 0.5], ("resnet", 0.5): [0.5, 0.4]}, seconds=10.0, pflop=1.0),
        *make_cells({("vit", 1.0): [0.7, 0.6]}, seconds=40.0, pflop=4.0),
        *make_cells({("resnet", 1.0): [0.6, 0.6]}, seconds=40.0, pflop=4.0),
    ]
    for cell in cells:
        if cell["arm"] == "resnet" and cell["x"] == 1.0 and cell["seed"] == 1:
            cell["seconds"], cell["pflop"] = 80.0, 8.0
    found = {(r["arm"], r["against"], r["unit"]): r for r in summarise("transfer", cells, [])["cost_ratios"]}
    ratio = found["vit", "resnet", "seconds"]
    logs = [math.log(10 / 40), math.log(40 / 80)]
    half = stats.t.ppf(0.975, 1) * np.std(logs, ddof=1) / 2**0.5
    assert ratio["mean"] == pytest.approx(8**-0.5)
    assert ratio["high"] == pytest.approx(math.exp(np.mean(logs) + half))
    assert "no difference seen" in ratio["sentence"]


def test_what_regularisation_brings_is_said_for_both_strengths() -> None:
    cells = make_cells(
        {
            ("vit", "none"): [0.50, 0.52, 0.51],
            ("vit", "light"): [0.60, 0.63, 0.62],
            ("vit", "strong"): [0.50, 0.53, 0.49],
        }
    )
    summary = summarise("regularisation", cells, [])
    assert [(gain["x"], round(gain["mean"], 6)) for gain in summary["gains"]] == [
        ("light", 10.666667),
        ("strong", -0.333333),
    ]
    assert "ViT: light − no regularisation: +10.7 points (+9.2 to +12.1)" in summary["sentences"]
    assert "ViT: strong − no regularisation: no difference seen (−4.1 to +3.5)" in summary["sentences"]


# ── layouts ──────────────────────────────────────────────────────────────────────────────────


def test_every_question_is_laid_out_seed_after_seed_with_names_of_its_own() -> None:
    sizes = {"data": 20, "regularisation": 9, "transfer": 18, "scale": 16}
    for name, size in sizes.items():
        cells = lay_out_grid(name, make_base(), 3, tuple("abcd"))
        assert len(cells) == 3 * size
        assert [cell.config.seed for cell in cells] == [0] * size + [1] * size + [2] * size
        assert len({cell.name for cell in cells}) == 3 * size
        assert {cell.arm for cell in cells} == set(QUESTIONS[name].arms)


def test_arms_share_all_but_what_makes_them_arms() -> None:
    for name in ("data", "regularisation"):
        by_place: dict[Any, list[RunConfig]] = {}
        for cell in lay_out_grid(name, make_base(), 2, ()):
            by_place.setdefault((cell.x, cell.config.seed), []).append(cell.config)
        for configs in by_place.values():
            assert len(configs) == len(QUESTIONS[name].arms)
            assert len({replace(c, model=ModelConfig(), optim=OptimConfig()) for c in configs}) == 1


def test_transfer_pretrains_on_other_classes_than_it_fine_tunes_on() -> None:
    cells = {cell.name: cell for cell in lay_out_grid("transfer", make_base(), 1, tuple("abcde"))}
    assert cells["vit-pretraining-seed0"].config.input.classes == ("a", "c", "e")
    fine = cells["resnet-0.25-seed0"]
    assert (fine.config.input.classes, fine.begins_with, fine.share) == (("b", "d"), "resnet-pretraining-seed0", 0.25)
    assert not cells["resnet-scratch-0.25-seed0"].begins_with
    assert cells["resnet-scratch-0.25-seed0"].config.input == fine.config.input
    with pytest.raises(VitrailError, match="transfer needs two classes to pretrain on and two others; digits has 3"):
        lay_out_grid("transfer", make_base(), 1, tuple("abc"))


# ── a whole comparison ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two arms, five fractions, two seeds, of six steps each."""
    out = tmp_path_factory.mktemp("compared") / "data"
    return out, compare("data", make_base(), out, arms=ARMS, num_seeds=2)


def test_the_grid_is_complete_and_tells_what_its_runs_did(compared: tuple[Path, dict[str, Any]]) -> None:
    out, results = compared
    assert json.loads((out / "results.json").read_text()) == results
    cells = results["cells"]
    assert {(c["arm"], c["x"], c["seed"]) for c in cells} == {
        (arm, x, seed) for arm in ARMS for x in FRACTIONS for seed in (0, 1)
    }
    assert results["to_do"] == []
    for cell in cells:
        run = load_run(out / "cells" / cell["run"])
        assert cell["test_accuracy"] == json.loads((run.folder / "evaluation-test.json").read_text())["accuracy"]
        assert cell["test_accuracy"] == evaluate(run).accuracy
        assert cell["seconds"] == run.read_metrics()[-1]["elapsed_s"] > 0
        assert run.config.num_steps == NUM_STEPS
        assert (run.config.seed, run.config.input.train_fraction) == (cell["seed"], cell["x"])
        assert not run.checkpoints
        assert not (run.folder / "checkpoints").exists()


def test_operations_are_counted_at_each_steps_size(compared: tuple[Path, dict[str, Any]]) -> None:
    """Six operations for each multiply-add of a forward pass, counted here layer by layer."""
    out, results = compared
    model = load_run(out / "cells" / "vit-1.0-seed0").config.model

    def forward(side: int) -> int:
        patches, width, hidden = (side // 2) ** 2, model.embed_dim, int(model.embed_dim * model.mlp_ratio)
        tokens = patches + 1
        block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
        # Of the last one the head reads the class token alone, whose heads look at whole tokens.
        last = 4 * width**2 + 2 * width * hidden + 2 * model.num_heads * tokens * width
        return (model.depth - 1) * block + last + patches * 2 * 2 * width + 10 * width

    # Of six steps one is at half the side (4 pixels), one or two at three quarters (6), the others at 8.
    sides = [4, 4, 6, 8, 8, 8]
    by_hand = 6 * 32 * sum(map(forward, sides)) / 1e15
    (counted,) = {cell["pflop"] for cell in results["cells"] if cell["arm"] == "vit"}
    assert counted == pytest.approx(by_hand, rel=0.02)


def test_arms_see_the_same_images_and_every_fraction_the_same_val(compared: tuple[Path, dict[str, Any]]) -> None:
    out, results = compared
    configs = {cell["run"]: load_run(out / "cells" / cell["run"]).config for cell in results["cells"]}
    for seed in (0, 1):
        for x in FRACTIONS:
            vit, resnet = (configs[f"{arm}-{x}-seed{seed}"] for arm in ARMS)
            assert vit.data_sha256 == resnet.data_sha256
            assert vit.num_val == configs["vit-1.0-seed0"].num_val
    assert configs["vit-1.0-seed0"].data_sha256 != configs["vit-1.0-seed1"].data_sha256
    whole = configs["vit-1.0-seed0"].num_train
    assert configs["vit-0.25-seed0"].num_train == pytest.approx(whole / 4, abs=10)


def test_tables_and_picture_are_written(compared: tuple[Path, dict[str, Any]]) -> None:
    out, results = compared
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == len(ARMS) * len(FRACTIONS)
    for row in rows:
        values = [c["test_accuracy"] for c in results["cells"] if (c["arm"], str(c["x"])) == (row["arm"], row["x"])]
        assert float(row["test_accuracy"]) == pytest.approx(np.mean(values))
    markdown = (out / "table.md").read_text()
    assert "| ResNet | 25% of the data | 2 |" in markdown
    assert all(sentence in markdown for sentence in results["summary"]["sentences"])
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def stop_at(event_number: int) -> Any:
    """A listener that asks to stop at so many training steps into the comparison."""
    seen = [0]

    def listen(event: Event) -> None:
        seen[0] += event.task.startswith("comparing")
        if seen[0] == event_number:
            seen[0] += 1
            os.kill(os.getpid(), signal.SIGINT)

    return listen


def test_stopped_in_a_run_and_begun_again_it_ends_as_if_undisturbed(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, expected = compared
    out, evaluated, trained = tmp_path / "data", list[str](), list[str]()

    def count(calls: list[str], verb: Any, folder_of: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(folder_of(args).name)
            return verb(*args, **kwargs)

        return counted

    monkeypatch.setattr(session_room, "evaluate", count(evaluated, evaluate, lambda args: args[0].folder))
    monkeypatch.setattr(session_room, "train", count(trained, train, lambda args: args[1]))
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        compare("data", make_base(), out, stop_at(2 * NUM_STEPS + 3), arms=ARMS, num_seeds=1)
    partial = json.loads((out / "results.json").read_text())
    assert [cell["run"] for cell in partial["cells"]] == evaluated == ["vit-0.05-seed0", "vit-0.1-seed0"]
    assert len(partial["to_do"]) == 8
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/model.safetensors")}
    assert len(before) == 2
    results = compare("data", make_base(), out, arms=ARMS, num_seeds=1)
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert len(evaluated) == len(set(evaluated)) == 10
    assert len(trained) == len(set(trained)) == 10
    timeless = [{k: v for k, v in cell.items() if k != "seconds"} for cell in results["cells"]]
    assert timeless == [{k: v for k, v in cell.items() if k != "seconds"} for cell in expected["cells"][:10]]
    for cell in results["cells"]:
        ours, theirs = (folder / "cells" / cell["run"] / "model.safetensors" for folder in (out, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()


def test_fewer_seeds_and_arms_are_answered_from_what_is_there(
    compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(compared[0], tmp_path / "data")
    monkeypatch.setattr(session_room, "train", None)
    results = compare("data", make_base(), out, arms=["resnet"], num_seeds=1)
    assert len(results["cells"]) == 5
    assert results["summary"]["means"][0]["low"] is None


def test_other_settings_are_refused_with_both_sides(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = shutil.copytree(compared[0], tmp_path / "data")
    kept = {path: path.read_bytes() for path in out.rglob("*.json")}
    with pytest.raises(VitrailError, match="was begun with budget 6steps, now it is 7steps; ask for the same"):
        compare("data", make_base(budget="7steps"), out)
    with pytest.raises(VitrailError, match="was begun with question data, now it is regularisation"):
        compare("regularisation", make_base(), out)
    other = make_base(augment=AugmentConfig(crop_padding=2, flip=False))
    with pytest.raises(
        VitrailError, match=r"vit-0\.05-seed0 was begun with augment\.crop_padding 1, now .* be 2; give"
    ):
        compare("data", other, out, arms=ARMS)
    assert {path: path.read_bytes() for path in out.rglob("*.json") if path.name != "plan.json"} == {
        path: content for path, content in kept.items() if path.name != "plan.json"
    }


def test_images_that_change_between_two_runs_are_told(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("test", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save_image(tmp_path / "colours" / split / name / f"{i}.png", colour, size=8, seed=i)
    base = make_base(data=str(tmp_path / "colours"), budget="1steps")
    compare("data", base, tmp_path / "out", arms=["vit"], num_seeds=1)
    save_image(tmp_path / "colours" / "train" / "red" / "0.png", COLOURS["red"], size=8, seed=99)
    with pytest.raises(
        VitrailError, match=r"has changed between .*vit-.* and .*resnet-.*; their results do not belong"
    ):
        compare("data", base, tmp_path / "out", arms=ARMS, num_seeds=1)


# ── lengths ──────────────────────────────────────────────────────────────────────────────────


def test_a_budget_in_time_becomes_the_same_steps_for_every_cell_of_an_arm(tmp_path: Path) -> None:
    base = make_base(budget="4s")
    plan = make_plan("data", base, tmp_path, arms=ARMS, num_seeds=2)
    for arm in ARMS:
        assert len({cell.config.budget for cell in plan.cells if cell.arm == arm}) == 1
    known = json.loads((tmp_path / "plan.json").read_text())
    for speed in known["speeds"].values():
        speed |= {"step_s": 0.1, "val_s": 0.5}
    (tmp_path / "plan.json").write_text(json.dumps(known))
    # Looks at val come after each pass over all 1,295 images and at the end: 3.5 s / (0.1 s + 0.5 s · 32 / 1295).
    again = make_plan("data", base, tmp_path, arms=ARMS, num_seeds=3)
    assert {cell.config.budget for cell in again.cells} == {f"{int(3.5 / (0.1 + 0.5 * 32 / 1295))}steps"}


def test_val_is_looked_at_as_often_with_a_share_of_the_images(tmp_path: Path) -> None:
    """Of 0.25 of the images, in batches of 64, twenty-two steps are more than four passes, and one over all of them."""
    for fraction, folder in ((1.0, "whole"), (0.25, "part")):
        config = make_base(budget="22steps", optim=OptimConfig(batch_size=64))
        train(replace(config, input=replace(config.input, train_fraction=fraction)), tmp_path / folder)
    whole, part = (load_run(tmp_path / folder).read_metrics() for folder in ("whole", "part"))
    assert [row["step"] for row in whole] == [21, 22]
    # A quarter of each class is rounded down: 319 of 1,295 images, and four passes over them are 1,276.
    assert [row["step"] for row in part] == [20, 22]
    assert part[-1]["epoch"] == pytest.approx(22 * 64 / 319)


# ── the other questions ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Sizes as large as a ResNet can be matched to."""
    out = tmp_path_factory.mktemp("compared") / "scale"
    model = ModelConfig(patch_size=2, embed_dim=64, depth=4, num_heads=8)
    base = make_base(budget="2steps", model=model, optim=OptimConfig(batch_size=32))
    return out, compare("scale", base, out, num_seeds=1)


def test_sizes_train_for_equal_epochs_and_for_equal_operations(scaled: tuple[Path, dict[str, Any]]) -> None:
    cells = scaled[1]["cells"]
    assert len(cells) == 16
    assert {cell["num_steps"] for cell in cells if cell["regime"] == "equal epochs"} == {2}
    widths = [cell["x"] for cell in cells if cell["arm"] == "vit" and cell["regime"] == "equal epochs"]
    assert widths == [48, 64, 80, 96]
    costliest = max(cell["pflop"] for cell in cells if cell["regime"] == "equal epochs")
    for cell in cells:
        if cell["regime"] == "equal compute":
            half_a_step = 0.5 * cell["pflop"] / cell["num_steps"]
            assert cell["pflop"] == pytest.approx(costliest, abs=1.001 * half_a_step)


def test_scale_tells_a_fit_and_the_measured_cost(scaled: tuple[Path, dict[str, Any]]) -> None:
    _, results = scaled
    summary = results["summary"]
    by_epochs = [c for c in results["cells"] if (c["arm"], c["regime"]) == ("vit", "equal epochs")]
    slope = np.polyfit(np.log([c["pflop"] for c in by_epochs]), np.log([1 - c["test_accuracy"] for c in by_epochs]), 1)[
        0
    ]
    fit = next(f for f in summary["fits"] if f["arm"] == "vit")
    assert fit["exponent"]["mean"] == pytest.approx(-slope)
    patches = [row for row in summary["cost"] if row["varies"] == "patches"]
    assert [row["patches"] for row in patches] == [16, 36, 64, 144]
    assert [row["width"] for row in summary["cost"] if row["varies"] == "width"] == [48, 64, 80, 96]
    assert all(row["step_s"] > 0 for row in summary["cost"])
    ratio = patches[-1]["gflop"] / patches[0]["gflop"]
    assert any(f"from 16 to 144 patches: {ratio:.1f} times the operations" in s for s in summary["sentences"])


def test_pretraining_is_done_once_and_shared_by_what_is_fine_tuned(tmp_path: Path) -> None:
    out, arms = tmp_path / "transfer", ["vit", "vit-scratch", "resnet"]
    results = compare("transfer", make_base(budget="16steps"), out, arms=arms, num_seeds=1)
    cells = {cell["run"]: cell for cell in results["cells"]}
    pretrained = [name for name, cell in cells.items() if cell["kind"] == "pretraining"]
    assert pretrained == ["vit-pretraining-seed0", "resnet-pretraining-seed0"]
    for arm in arms:
        steps = [cells[f"{arm}-{share}-seed0"]["num_steps"] for share in (0.125, 0.25, 0.5, 1.0)]
        assert steps == [2, 4, 8, 16]
        fine = load_run(out / "cells" / f"{arm}-1.0-seed0")
        assert fine.config.classes == tuple("13579")
        assert fine.config.num_train == sum(n // 20 for n in class_sizes("13579"))
        assert (fine.folder / "init.json").exists() == (arm != "vit-scratch")
    assert load_run(out / "cells" / "vit-pretraining-seed0").config.classes == tuple("02468")
    assert {mean["x"] for mean in results["summary"]["means"]} == {0.125, 0.25, 0.5, 1.0}
    ratios = {(r["arm"], r["against"]) for r in results["summary"]["cost_ratios"]}
    assert ratios == {("vit", "vit-scratch"), ("vit", "resnet")}
    # A run that was killed before its first checkpoint is begun anew.
    folder = out / "cells" / "vit-0.125-seed0"
    weights = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "metrics.jsonl", "evaluation-test.json"):
        (folder / name).unlink()
    compare("transfer", make_base(budget="16steps"), out, arms=arms, num_seeds=1)
    assert (folder / "model.safetensors").read_bytes() == weights


def class_sizes(classes: str) -> list[int]:
    labels = split_records("digits", InputConfig(), 0)["train"].labels
    return [int((labels == int(name)).sum()) for name in classes]


# ── the command line ─────────────────────────────────────────────────────────────────────────


def ask(*words: str) -> list[str]:
    return ["compare", *words, "--data", "digits", "--preset", "tiny", "--budget", "1steps", "--seeds", "1"]


def test_the_plan_is_printed_and_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main([*ask("regularisation", "--arms", "vit,vit-plain", "--out", out), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "6 runs, 6 to do" in told
    assert "plain ViT: 3 runs of 1 steps" in told
    assert "time: " in told
    assert "disk: " in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    other = ["2steps" if word == "1steps" else word for word in ask("regularisation", "--arms", "vit", "--out", out)]
    assert main([*other, "--plan", "--json"]) == 0  # with nothing run as yet, another plan may take its place
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], len(told["to_do"]), set(told["budgets"].values())) == (3, 3, {"2steps"})


def test_results_are_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*ask("regularisation", "--arms", "vit", "--out", str(out)), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "results.json").read_text())
    assert "3 runs, 3 to do" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("size",), "no question 'size'; give one of data, regularisation, transfer, scale"),
        (("data", "--arms", "vit,mlp"), "no arm 'mlp' in the question data; its arms are vit, vit-label-query"),
        (("data", "--seeds", "0"), "seeds is 0; give at least 1"),
        (("data", "--budget", "soon"), "budget 'soon' is not understood"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ask(words[0], "--out", str(tmp_path / "out"))
    for name, value in zip(words[1::2], words[2::2], strict=True):
        flags = [*flags[: flags.index(name)], *flags[flags.index(name) + 2 :]] if name in flags else flags
        flags += [name, value]
    assert main(flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_class_that_a_fraction_leaves_empty_is_named(
    colour_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ask("data", "--out", str(tmp_path / "out"))
    flags[flags.index("digits")] = str(colour_folder)
    assert main(flags) == 2
    assert "train_fraction 0.05 leaves class 'blue' with its 11 training images without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_it_with_the_way_to_go_on(tmp_path: Path) -> None:
    flags = ask("regularisation", "--arms", "vit", "--out", str(tmp_path / "out"))
    flags[flags.index("1steps")] = "2000steps"
    command = [sys.executable, "-m", "vitrail", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "out" / "cells" / "vit-none-seed0" / "checkpoints").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "go on with the same command again" in told


def test_ctrl_c_between_two_trainings_is_no_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    flags = ask("regularisation", "--arms", "vit", "--out", str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr(session_room, "evaluate", interrupt)
        assert main(flags) == 130
    assert "go on with the same command again" in capsys.readouterr().err
    assert main(flags) == 0
