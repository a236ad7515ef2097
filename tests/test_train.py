"""Training: the optimizers' parts, the step, exact resume, the budget, the run folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from conftest import colour_config, make_config, save_image
from vitrail.batch import Batch, normalize
from vitrail.config import AugmentConfig, ModelConfig, OptimConfig, ResolvedConfig, RunConfig
from vitrail.data import ImageSet
from vitrail.errors import Event, Interrupted, VitrailError, VitrailWarning
from vitrail.learner import Learner, count_replicas
from vitrail.optim import Muon, WeightAverage, build_optimizers, orthogonalize, set_lr, split_parameters
from vitrail.resolve import choose_machine, has_compiler
from vitrail.run import Run, load_run
from vitrail.train import resume, train
from vitrail.vit import VisionTransformer

SOFT = {
    "model": ModelConfig(
        patch_size=2, embed_dim=32, depth=2, num_heads=4, drop_rate=0.1, drop_path_rate=0.1, rel_pos="neighbour"
    ),
    "optim": OptimConfig(batch_size=64, ema_decay=0.9, clip_norm=1.0),
    "augment": AugmentConfig(crop_padding=1, flip=False, mixup=0.2, cutmix=1.0),
}


# ── optimizers ───────────────────────────────────────────────────────────────────────────────


def test_weight_decay_is_on_matrices_only_and_muon_on_hidden_ones() -> None:
    model = VisionTransformer(ModelConfig(embed_dim=16, depth=1, num_heads=2, rel_pos="zero"), 16, 3, 4)
    hidden, matrices, rest = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in hidden] == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ]
    assert [names[id(p)] for p in matrices] == ["patch_embed.proj.weight", "head.weight"]
    assert {"cls_token", "pos_embed", "blocks.0.attn.rel_pos.relative_position_bias_table"} < {
        names[id(p)] for p in rest
    }
    assert len(hidden) + len(matrices) + len(rest) == len(list(model.parameters()))
    adamw, muon = build_optimizers(model, OptimConfig())
    assert isinstance(muon, Muon)
    assert set(muon.param_groups[0]["params"]) == set(hidden)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.05, 0.0]
    (only,) = build_optimizers(model, OptimConfig(optimizer="adamw"))
    assert only.param_groups[0]["params"] == hidden + matrices


def test_muon_moves_as_torchs_own() -> None:
    """Ours takes matrices of one shape together; torch.optim.Muon one by one, in bf16."""
    shapes = [(48, 16), (16, 16), (16, 16), (16, 48)]

    def moved(build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = build(matrices)
        for _ in range(5):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            optimizer.step()
        return matrices

    theirs = moved(lambda m: torch.optim.Muon(m, lr=0.1, weight_decay=0.1, momentum=0.95))
    for dtype, tolerance in ((torch.bfloat16, 1e-6), (torch.float32, 5e-3)):
        ours = moved(lambda m, dtype=dtype: Muon(m, lr=0.1, weight_decay=0.1, momentum=0.95, dtype=dtype))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_muon_takes_a_convolutions_filters_as_a_matrix() -> None:
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    muons = [Muon([filters], lr=0.1), Muon([matrix], lr=0.1)]
    for _ in range(2):
        filters.grad = torch.randn_like(filters)
        matrix.grad = filters.grad.flatten(1)
        for muon in muons:
            muon.step()
    torch.testing.assert_close(filters.flatten(1), matrix, rtol=0, atol=0)


def test_orthogonalize_brings_all_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(1), orthogonalize(matrices).flatten(1)).min() > 0.95


def test_set_lr_scales_each_optimizers_own_peak() -> None:
    model = VisionTransformer(ModelConfig(embed_dim=16, depth=1, num_heads=2), 16, 3, 4)
    optimizers = build_optimizers(model, OptimConfig(lr=1e-3, muon_lr=2e-2))
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx(
            [1e-3 * factor, 1e-3 * factor, 2e-2 * factor]
        )


def test_the_average_follows_quickly_at_first_and_slowly_later() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = WeightAverage(model.parameters(), 0.99)
    ema.update()
    nn.init.ones_(model.weight)
    ema.update()
    expected = 1 - 2 / 11
    assert ema.values[0].item() == pytest.approx(expected)
    for t in range(2, 2000):
        ema.update()
        expected = 1 - (1 - expected) * min(0.99, (1 + t) / (10 + t))
    assert ema.values[0].item() == pytest.approx(expected)
    assert ema.values[0].item() > 0.999


# ── one step ─────────────────────────────────────────────────────────────────────────────────


def learner_of(run: Run, **changes: object) -> tuple[Learner, Batch]:
    config = replace(run.config, **changes)
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Learner(config), Batch(images, torch.arange(64) % 10, torch.ones(64))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_batch_can_be_learned_by_heart(trained: Run, optimizer: str) -> None:
    plain = AugmentConfig(crop_padding=0, flip=False)
    optim = OptimConfig(optimizer=optimizer, label_smoothing=0.0, lr=3e-3)
    learner, batch = learner_of(trained, augment=plain, optim=optim, num_steps=120)
    losses = [learner.step(batch, step) for step in range(120)]
    assert losses[0] == pytest.approx(2.303, abs=0.05)  # ln 10: it begins knowing nothing
    assert losses[-1] < 0.7


def test_padding_of_weight_zero_changes_nothing(trained: Run) -> None:
    plain = AugmentConfig(crop_padding=0, flip=False)
    learner, batch = learner_of(trained, augment=plain)
    padded_learner, _ = learner_of(trained, augment=plain)
    padded = Batch(
        torch.cat([batch.images, 255 - batch.images[:7]]),
        torch.cat([batch.labels, batch.labels[:7]]),
        torch.cat([batch.weight, torch.zeros(7)]),
    )
    assert padded_learner.step(padded, 0) == pytest.approx(learner.step(batch, 0), abs=1e-5)


def test_precision_of_bf16(trained: Run) -> None:
    """Loss and gradients against fp32: within what rounding to eight bits explains, and not the same."""
    exact_loss, exact = one_step_gradients(trained, precision="fp32")
    rough_loss, rough = one_step_gradients(trained, precision="bf16")
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 0.02
    assert rough_loss == pytest.approx(exact_loss, rel=5e-3)


@pytest.mark.slow
def test_the_fast_path_learns_as_the_plain_one_does(trained: Run) -> None:
    """For 200 steps on digits, the mean of three seeds: alone, two runs that differ in rounding end 3% apart."""
    fast, slow = torch.stack([both_curves(trained, seed) for seed in range(3)]).mean(0)
    assert slow[-1] < 0.8  # most of the way from ln 10 to the 0.5 that smoothing leaves
    torch.testing.assert_close(fast, slow, rtol=0.06, atol=0)
    assert fast.mean() == pytest.approx(slow.mean().item(), rel=0.02)


def both_curves(trained: Run, seed: int) -> torch.Tensor:
    """Losses [2, 10] in tenths of a run: in the precision that is fast here, with replicas and our own Muon, and of a
    loop that has none of them."""
    digits = load_digits()
    images = torch.tensor(digits.images * 15.9375, dtype=torch.uint8)[:, None]
    labels = torch.tensor(digits.target)
    config = replace(trained.config, augment=AugmentConfig(crop_padding=0, flip=False), num_steps=200, seed=seed)
    config = replace(config, optim=OptimConfig(batch_size=32, muon_lr=0.01), precision="auto", threads=2)
    learner = Learner(choose_machine(config))
    torch.manual_seed(config.seed)
    plain = VisionTransformer(config.model, 8, 1, 10)
    hidden, matrices, rest = split_parameters(plain)
    decayed = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.AdamW(decayed, lr=2e-3, betas=(0.9, 0.99)),
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.0, momentum=0.9),
    ]
    peaks, curves = [2e-3, 0.01], ([], [])
    for step in range(200):
        indices = torch.randint(len(labels), (32,), generator=torch.Generator().manual_seed(step))
        curves[0].append(learner.step(Batch(images[indices], labels[indices], torch.ones(32)), step))
        pixels = normalize(images[indices], config.preprocessing)
        loss = nn.functional.cross_entropy(plain(pixels), labels[indices], label_smoothing=0.1)
        curves[1].append(loss.item())
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learner.lr_factor(step)
            optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(curves).unflatten(1, (10, 20)).mean(2)


def one_step_gradients(run: Run, **changes: object) -> tuple[float, torch.Tensor]:
    """The loss and all gradients of one step whose update is left out, with padding in the batch."""
    learner, batch = learner_of(run, model=replace(run.config.model, init="paper"), **changes)
    for optimizer in learner._optimizers:
        optimizer.step = lambda: None
        optimizer.zero_grad = lambda: None
    loss = learner.step(replace(batch, weight=torch.cat([torch.ones(60), torch.zeros(4)])), 0)
    assert all(p.grad.dtype == torch.float32 for p in learner.model.parameters())
    return loss, torch.cat([p.grad.flatten() for p in learner.model.parameters()])


def test_replicas_learn_what_one_would(trained: Run) -> None:
    """Parts of 22, 21 and 21 images, one of them with padding, give the loss and gradients of the whole batch."""
    loss, gradients = one_step_gradients(trained, threads=1)
    for threads in (2, 3):
        shared_loss, shared_gradients = one_step_gradients(trained, threads=threads)
        assert shared_loss == pytest.approx(loss, abs=1e-6)
        assert (shared_gradients - gradients).norm() < 1e-5 * gradients.norm()


def test_a_batch_norms_running_figures_are_the_mean_of_the_replicas(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(config: ModelConfig, image_size: int, num_channels: int, num_classes: int) -> nn.Module:
        head = nn.Linear(num_channels * image_size**2, num_classes)
        return nn.Sequential(nn.BatchNorm2d(num_channels), nn.Flatten(), head)

    monkeypatch.setattr("vitrail.learner.build_model", build)
    plain, adamw = AugmentConfig(crop_padding=0, flip=False), OptimConfig(optimizer="adamw")
    learner, batch = learner_of(trained, threads=2, augment=plain, optim=adamw)
    parts = [normalize(half, trained.config.preprocessing) for half in batch.images.chunk(2)]
    mean, variance = 0.0, 1.0
    for step in range(2):
        learner.step(batch, step)
        mean = 0.9 * mean + 0.1 * sum(part.mean().item() for part in parts) / 2
        variance = 0.9 * variance + 0.1 * sum(part.var().item() for part in parts) / 2
    norm = learner.model[0]
    assert (norm.running_mean.item(), norm.running_var.item()) == pytest.approx((mean, variance), rel=1e-5)


def test_dropout_and_compile_keep_to_one_replica(trained: Run) -> None:
    config = replace(trained.config, threads=4)
    assert count_replicas(config) == 4
    assert count_replicas(replace(config, threads=16)) == 4
    assert count_replicas(replace(config, compile=True)) == 1
    assert count_replicas(replace(config, model=replace(config.model, drop_rate=0.1))) == 1
    assert count_replicas(replace(config, model=replace(config.model, drop_path_rate=0.1))) == 1


def test_gradients_are_clipped(trained: Run) -> None:
    learner, batch = learner_of(trained, optim=OptimConfig(clip_norm=1e-3))
    norms = []
    for optimizer in learner._optimizers:
        optimizer.step = lambda: norms.append(
            torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]).norm().item()
        )
    learner.step(batch, 0)
    assert max(norms) <= 1.001e-3


def test_precision_of_compiled_or_a_compiler_is_asked_for(trained: Run, tmp_path: Path) -> None:
    if not has_compiler():
        with pytest.raises(VitrailError, match="compile needs a C\\+\\+ compiler"):
            train(make_config(compile=True), tmp_path / "run")
        return
    model = replace(trained.config.model, depth=2)
    plain, batch = learner_of(trained, model=model)
    compiled, _ = learner_of(trained, model=model, compile=True)
    assert [compiled.step(batch, s) for s in range(3)] == pytest.approx(
        [plain.step(batch, s) for s in range(3)], abs=1e-3
    )


@pytest.mark.slow
def test_seeds(tmp_path: Path) -> None:
    """In processes of their own: one seed gives the same bytes twice, another gives others."""
    weights = []
    for i, seed in enumerate((3, 3, 4)):
        flags = ["--data", "digits", "--budget", "0.3epochs", "--seed", str(seed), "--threads", "1", "--quiet"]
        out = tmp_path / str(i)
        subprocess.run([sys.executable, "-m", "vitrail", "train", "tiny", *flags, "--out", out], check=True)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


# ── whole runs ───────────────────────────────────────────────────────────────────────────────


def test_a_run_leaves_json_and_safetensors_and_nothing_else(trained: Run) -> None:
    suffixes = {p.suffix for p in trained.folder.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    config = json.loads((trained.folder / "config.json").read_text())
    assert config["classes"] == list("0123456789")
    assert config["preprocessing"]["image_size"] == 8
    environment = json.loads((trained.folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.split("+")[0]
    (row,) = trained.read_metrics()
    assert row["step"] == config["num_steps"]
    assert {"epoch", "train_loss", "val_loss", "val_accuracy", "lr", "images_per_s", "elapsed_s"} < set(row)
    reread = load_run(trained.folder)
    assert reread == trained
    checkpoint = load_run(trained.checkpoints[-1])
    for ours, theirs in zip(checkpoint.load_model().parameters(), reread.load_model().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.weights)


def test_one_seed_fixes_everything(tmp_path: Path) -> None:
    a, b = (train(make_config(**SOFT), tmp_path / name) for name in "ab")
    c = train(make_config(**SOFT, seed=1), tmp_path / "c")
    assert all(torch.equal(weights(a)[k], v) for k, v in weights(b).items())
    assert not torch.equal(weights(a)["head.weight"], weights(c)["head.weight"])


@pytest.mark.parametrize("stop_after", [3, 21])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, stop_after: int) -> None:
    config = make_config(**SOFT, budget="2epochs")
    whole = train(config, tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event.task == "training" and event.done == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"stopped at step {stop_after}"):
        train(config, tmp_path / "parts", interrupt)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    parts = resume(tmp_path / "parts")
    assert all(torch.equal(weights(whole)[k], v) for k, v in weights(parts).items())
    timeless = [
        {k: v for k, v in row.items() if k not in ("images_per_s", "elapsed_s")} for row in whole.read_metrics()
    ]
    assert [{k: row[k] for k in timeless[0]} for row in parts.read_metrics()] == timeless
    with pytest.raises(VitrailError, match="is finished"):
        resume(tmp_path / "parts")


def test_resume_refuses_changed_data(tmp_path: Path, colour_folder: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.task == "training":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(colour_config(colour_folder, optim=OptimConfig(batch_size=8)), tmp_path / "run", interrupt)
    save_image(colour_folder / "train" / "red" / "0.png", (201, 0, 0))
    with pytest.raises(VitrailError, match="has changed since"):
        resume(tmp_path / "run")


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train(make_config(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert runs[0].weights.exists()


def test_a_budget_in_seconds_becomes_the_steps_that_fit(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of 0.02 s, 6 s of which 2 are gone and a tenth goes to the probe hold at most 170 steps."""

    class SlowLearner:
        share = torch.arange(8)

        def __init__(self, *_: object) -> None:
            pass

        def step(self, *_: object) -> float:
            time.sleep(0.02)
            return 0.0

        def working_copy(self) -> None:
            return None

    resolve_room = import_module("vitrail.resolve")
    monkeypatch.setattr(resolve_room, "Learner", SlowLearner)
    monkeypatch.setattr(resolve_room, "compute_logits", lambda *_: None)
    images = ImageSet(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), ("a",), 0)
    num_steps = resolve_room.plan_num_steps(replace(trained.config, budget="6s"), images, images, spent_s=2.0)
    assert 40 < num_steps <= 170  # fewer where the machine is busy, never more


def test_the_probe_weighs_each_image_size_by_its_share(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size takes 0.04 s for half the steps; the rest take next to none, so a step takes 0.02 s on average."""

    class CoarseLearner:
        share = torch.arange(8)

        def __init__(self, config: ResolvedConfig, _: object) -> None:
            self.num_steps = config.num_steps

        def step(self, _: Batch, step: int) -> float:
            time.sleep(0.04 if step >= 0.5 * self.num_steps else 0.0)
            return 0.0

        def working_copy(self) -> None:
            return None

    resolve_room = import_module("vitrail.resolve")
    monkeypatch.setattr(resolve_room, "Learner", CoarseLearner)
    monkeypatch.setattr(resolve_room, "compute_logits", lambda *_: None)
    images = ImageSet(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), ("a",), 0)
    config = replace(trained.config, budget="6s", optim=OptimConfig(coarse_fraction=0.5))
    num_steps = resolve_room.plan_num_steps(config, images, images, spent_s=2.0)
    assert 90 < num_steps <= 185  # all at the full size would be 85


def test_the_probe_times_each_image_size_in_a_row(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step after one of another size takes 0.2 s, one in a row 0.01: a run has next to none of the first kind."""

    class SwitchingLearner:
        share = torch.arange(8)

        def __init__(self, config: ResolvedConfig, _: object) -> None:
            self.num_steps, self.was_whole = config.num_steps, False

        def step(self, _: Batch, step: int) -> float:
            whole = step >= 0.5 * self.num_steps
            time.sleep(0.01 if whole == self.was_whole else 0.2)
            self.was_whole = whole
            return 0.0

    resolve_room = import_module("vitrail.resolve")
    monkeypatch.setattr(resolve_room, "Learner", SwitchingLearner)
    images = ImageSet(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), ("a",), 0)
    probe = resolve_room.SpeedProbe(replace(trained.config, optim=OptimConfig(coarse_fraction=0.5)), images, images)
    assert 0.01 <= probe.time_step(0.5) < 0.05


def test_coarse_steps_see_smaller_images(trained: Run) -> None:
    learner, batch = learner_of(trained, optim=OptimConfig(coarse_fraction=0.8), num_steps=10)
    seen: list[int] = []
    learner._replicas[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for step in range(10):
        assert learner.step(batch, step) > 0
    assert seen == [4, 4, 4, 4, 6, 6, 6, 6, 8, 8]


def test_the_last_steps_see_each_image_by_itself(trained: Run) -> None:
    mixing = AugmentConfig(crop_padding=0, flip=False, mixup=1.0, mix_fraction=0.6)
    learner, batch = learner_of(trained, augment=mixing, optim=OptimConfig(batch_size=64), num_steps=5)
    seen: list[torch.Tensor] = []
    learner._replicas[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for step in range(5):
        learner.step(batch, step)
    alone = normalize(batch.images, trained.config.preprocessing)
    assert [torch.equal(images.float(), alone[: len(images)]) for images in seen] == [False, False, False, True, True]


def test_a_run_with_a_budget_in_seconds_keeps_its_words_in_the_config(tmp_path: Path) -> None:
    run = train(make_config(budget="2s"), tmp_path / "run")
    assert run.config.budget == "2s"
    assert run.config.num_steps == run.read_metrics()[-1]["step"]


@pytest.mark.parametrize(("speedup", "precision"), [(2.5, "bf16"), (0.5, "fp32")])
def test_bf16_is_chosen_where_it_is_measured_to_be_faster(
    speedup: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_product(a: torch.Tensor, _: torch.Tensor) -> float:
        return 1 / speedup if a.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr("vitrail.resolve._time_product", time_product)
    assert choose_machine(make_config(precision="auto")).precision == precision


def test_the_resolved_config_leaves_nothing_open(trained: Run) -> None:
    config: ResolvedConfig = trained.config
    assert (config.device, config.precision, config.threads) == ("cpu", "fp32", 1)
    assert config.num_train + config.num_val + 359 == 1797
    assert isinstance(config.asked(), RunConfig)
    assert not isinstance(config.asked(), ResolvedConfig)


def test_balanced_training_sees_rare_classes_as_often(tmp_path: Path, colour_folder: Path) -> None:
    for i in range(3, 12):
        (colour_folder / "train" / "red" / f"{i}.png").unlink()
    config = colour_config(colour_folder)
    run = train(replace(config, input=replace(config.input, balanced=True)), tmp_path / "run")
    assert run.config.epoch_images == 33  # three classes, eleven of the largest left after val
    assert run.config.num_train == 11 + 11 + 2


def test_compile_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(VitrailError, match=r"compile needs a C\+\+ compiler"):
        train(make_config(compile=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_replicated_runs_resume_to_the_bit(tmp_path: Path) -> None:
    config = make_config(threads=2, budget="0.6epochs")
    whole, again = (train(config, tmp_path / name) for name in ("whole", "again"))
    assert all(torch.equal(weights(whole)[k], v) for k, v in weights(again).items())


def test_too_few_patches_are_warned_of(tmp_path: Path) -> None:
    config = make_config(model=ModelConfig(patch_size=4, embed_dim=16, depth=1, num_heads=2))
    with pytest.warns(VitrailWarning, match=r"patch size 4 leaves 4 patches of a 8-pixel image.*50% on CIFAR-10"):
        train(config, tmp_path / "run")


def test_a_folder_that_holds_a_run_or_cannot_be_written_is_refused_at_once(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(VitrailError, match="already holds a run"):
        train(make_config(data="nowhere"), trained.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(VitrailError, match="not a writable folder"):
        train(make_config(data="nowhere"), tmp_path / "file" / "run")


def test_models_that_do_not_fit_are_refused(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(VitrailError, match="no model at"):
        load_run(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    config = json.loads((trained.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VitrailError, match="its training has not finished"):
        load_run(folder).load_model()
    save_file(load_file(trained.weights), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"classes": ["a", "b"]}))
    with pytest.raises(VitrailError, match="tells 10 classes apart, its config names 2"):
        load_run(folder).load_model()
    (folder / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"depth": 5}}))
    with pytest.raises(VitrailError, match="does not fit its config"):
        load_run(folder).load_model()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(VitrailError, match="cannot read"):
        load_run(folder).load_model()
    (folder / "config.json").write_text("{")
    with pytest.raises(VitrailError, match="not valid JSON"):
        load_run(folder)
