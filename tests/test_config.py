"""Configs, presets, budgets and schedules: the ground floor."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.config import (
    AugmentConfig,
    InputConfig,
    ModelConfig,
    OptimConfig,
    Preprocessing,
    ResolvedConfig,
    RunConfig,
)
from vitrail.errors import VitrailError
from vitrail.plain import from_dict, to_dict
from vitrail.presets import PRESETS, get_preset
from vitrail.schedule import Budget, image_side, lr_factor, plan_steps, time_share

models = st.builds(
    ModelConfig,
    embed_dim=st.sampled_from([64, 128]),
    num_heads=st.sampled_from([1, 4, 8]),
    depth=st.integers(1, 24),
    drop_rate=st.floats(0, 0.9),
    pool=st.sampled_from(["cls", "mean"]),
    rel_pos=st.sampled_from(["none", "zero", "neighbour"]),
)
runs = st.builds(
    ResolvedConfig,
    data=st.text(max_size=20),
    seed=st.integers(0, 2**31 - 1),
    model=models,
    optim=st.builds(OptimConfig, lr=st.floats(1e-6, 1), optimizer=st.sampled_from(["muon", "adamw"])),
    augment=st.builds(AugmentConfig, flip=st.booleans(), mixup=st.floats(0, 2)),
    input=st.builds(
        InputConfig,
        image_size=st.none() | st.integers(1, 512),
        train_fraction=st.floats(0.01, 1),
        classes=st.sampled_from([(), ("cat", "dog")]),
    ),
    classes=st.lists(st.text(max_size=5), min_size=2, unique=True).map(tuple),
    preprocessing=st.just(Preprocessing(image_size=8, num_channels=1, mean=(0.5,), std=(0.25,))),
    **{n: st.integers(1, 10**9) for n in ("num_train", "num_val", "num_skipped", "epoch_images", "num_steps")},
    data_sha256=st.text(max_size=8),
)


@given(config=runs)
def test_a_config_survives_json(config: ResolvedConfig) -> None:
    assert from_dict(ResolvedConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_missing_and_misfitting_values_are_named() -> None:
    values = to_dict(RunConfig())
    with pytest.raises(VitrailError, match="unknown RunConfig field 'sede'"):
        from_dict(RunConfig, values | {"sede": 1})
    with pytest.raises(VitrailError, match="'seven' is not a int"):
        from_dict(RunConfig, values | {"seed": "seven"})
    with pytest.raises(VitrailError, match="'fp8' is none of 'auto', 'fp32', 'bf16'"):
        from_dict(RunConfig, values | {"precision": "fp8"})
    with pytest.raises(VitrailError, match="ResolvedConfig"):
        from_dict(ResolvedConfig, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(embed_dim=100, num_heads=8), "8 heads do not divide the width 100"),
        (lambda: ModelConfig(depth=0), "depth is 0"),
        (lambda: ModelConfig(drop_rate=1.0), "drop_rate is 1.0"),
        (lambda: OptimConfig(lr=0), "lr is 0"),
        (lambda: OptimConfig(batch_size=0), "batch_size is 0"),
        (lambda: OptimConfig(ema_decay=1.0), "ema_decay is 1.0"),
        (lambda: AugmentConfig(magnitude=31), "magnitude is 31"),
        (lambda: AugmentConfig(erasing=1.5), "erasing is 1.5"),
        (lambda: InputConfig(val_fraction=0), "val_fraction is 0"),
        (lambda: InputConfig(val_seed=-1), "val_seed is -1; give 0 or more"),
        (lambda: InputConfig(image_size=0), "image_size is 0"),
        (lambda: InputConfig(train_fraction=0), "train_fraction is 0; give a share above 0, 1 at most"),
        (lambda: InputConfig(train_fraction=1.5), "train_fraction is 1.5"),
        (lambda: RunConfig(seed=-1), "seed is -1"),
        (lambda: RunConfig(budget="soon"), "budget 'soon' is not understood; write for example 30min"),
        (lambda: RunConfig(budget="0min"), "budget '0min'"),
        (lambda: get_preset("huge"), "no preset 'huge'; give one of tiny, minute, quick"),
    ],
)
def test_wrong_values_are_refused_with_the_value(make: object, message: str) -> None:
    with pytest.raises(VitrailError, match=message):
        make()


def test_every_preset_names_itself_and_survives_json() -> None:
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert from_dict(RunConfig, to_dict(preset)) == preset


def test_budgets() -> None:
    assert Budget.parse("30min") == Budget(1800, "s")
    assert Budget.parse("90s") == Budget(90, "s")
    assert Budget.parse("1.5h") == Budget(5400, "s")
    assert Budget.parse("20epochs") == Budget.parse("20 epochs") == Budget(20, "epochs")
    assert Budget.parse("1epoch") == Budget(1, "epochs")
    assert Budget.parse("800steps") == Budget.parse("800 steps") == Budget(800, "steps")


@given(
    num_steps=st.integers(1, 5000),
    warmup=st.floats(0, 0.99),
    decay=st.sampled_from(["linear", "cosine"]),
    data=st.data(),
)
def test_the_schedule_stays_in_bounds_rises_then_falls(
    num_steps: int, warmup: float, decay: str, data: st.DataObject
) -> None:
    factors = [lr_factor(step, num_steps, warmup, decay) for step in range(num_steps)]
    assert all(0 < f <= 1 for f in factors)
    top = int(warmup * num_steps)
    assert factors[top] == 1.0
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if num_steps - top > 20:
        assert factors[-1] < 0.1


def test_images_grow_from_half_to_three_quarters_to_all() -> None:
    sides = [image_side(step, 10, coarse_fraction=0.6, image_size=32, patch_size=4) for step in range(10)]
    assert sides == [16, 16, 16, 24, 24, 24, 32, 32, 32, 32]
    assert {image_side(step, 10, 0.0, 32, 4) for step in range(10)} == {32}
    assert image_side(0, 10, 0.5, 8, 8) == 8  # a single patch is as coarse as it gets
    assert image_side(4, 10, 0.5, 28, 7) == 21


@pytest.mark.parametrize("coarse_fraction", [0.0, 0.2, 0.65, 0.99])
def test_a_step_counts_by_the_side_of_its_images(coarse_fraction: float) -> None:
    times = [image_side(step, 1000, coarse_fraction, 32, 4) ** 1.5 for step in range(1000)]
    for step in (0, 1, 100, 200, 350, 650, 999, 1000):
        expected = sum(times[:step]) / sum(times)
        assert time_share(step, 1000, coarse_fraction) == pytest.approx(expected, abs=2e-3)
    assert time_share(1000, 1000, coarse_fraction) == 1


@given(seconds=st.floats(10, 1e5), step_s=st.floats(1e-3, 2), val_s=st.floats(0, 5), batch=st.integers(1, 512))
def test_a_budget_in_seconds_is_kept_and_used(seconds: float, step_s: float, val_s: float, batch: int) -> None:
    epoch = 45_000
    steps = plan_steps(Budget(seconds, "s"), epoch, batch, step_s, val_s)
    spent = steps * step_s + (steps * batch / epoch + 1) * val_s
    if steps > 1:
        assert spent <= seconds + 1e-6
        assert spent >= seconds - 2 * step_s - val_s * batch / epoch - 1e-6


def test_a_budget_in_epochs_is_rounded_up_to_whole_steps() -> None:
    assert plan_steps(Budget(2, "epochs"), 100, 30, 1.0, 1.0) == 7
    assert plan_steps(Budget(5, "steps"), 100, 30, 1.0, 1.0) == 5


def test_the_ground_floor_and_help_import_no_torch() -> None:
    code = (
        "import sys, vitrail, vitrail.presets, vitrail.schedule, vitrail.cli; vitrail.cli.main(['--help']);"
        "assert not {'torch', 'numpy', 'torchvision', 'tyro'} & set(sys.modules), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vitrail train" in done.stdout


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1
