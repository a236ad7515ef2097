"""To learn on from weights that are there: layer-wise rates, a frozen backbone, resuming, the command line."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer as TimmVit
from timm.optim import param_groups_layer_decay

import world
from conftest import COLOURS, colour_config, make_config
from test_distributed import finish, torchrun
from test_pretrained import CLASSES, SHAPE, SIDE, TIMM_SHAPE, save_timm
from vitrail.cli import main
from vitrail.config import InputConfig, ModelConfig, OptimConfig
from vitrail.errors import Event, Interrupted, VitrailError
from vitrail.learner import Learner
from vitrail.optim import build_optimizers, in_head
from vitrail.run import Run, load_run
from vitrail.train import resume, train
from vitrail.vit import VisionTransformer


def test_layer_decay_by_hand() -> None:
    """Three blocks and a half: embeddings at 1/16 of the rate, then 1/8, 1/4, 1/2, and the last norm and head whole."""
    model = VisionTransformer(ModelConfig(**SHAPE, rel_pos="zero"), SIDE, 3, CLASSES)
    optimizers = build_optimizers(model, OptimConfig(layer_decay=0.5, lr=1.0, muon_lr=0.1))
    rates = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    table = {
        "cls_token": 1 / 16,
        "pos_embed": 1 / 16,
        "patch_embed.proj.weight": 1 / 16,
        "patch_embed.proj.bias": 1 / 16,
    }
    table |= {"norm.weight": 1, "norm.bias": 1, "head.weight": 1, "head.bias": 1}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    for i, share in ((0, 1 / 8), (1, 1 / 4), (2, 1 / 2)):
        for name, _ in model.blocks[0].named_parameters():
            table[f"blocks.{i}.{name}"] = share * (0.1 if name in matrices else 1)
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == pytest.approx(table)
    decays = {id(p): group["weight_decay"] for group in optimizers[0].param_groups for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if decays.get(id(p))}
    assert decayed == {"patch_embed.proj.weight", "head.weight"}


def test_layer_decay_is_timms_but_for_the_last_norm() -> None:
    theirs = TimmVit(**TIMM_SHAPE)
    scales = {id(p): g["lr_scale"] for g in param_groups_layer_decay(theirs, layer_decay=0.7) for p in g["params"]}
    expected = {name: scales[id(parameter)] for name, parameter in theirs.named_parameters()}
    ours = VisionTransformer(ModelConfig(**SHAPE), SIDE, 3, CLASSES)
    (adamw,) = build_optimizers(ours, OptimConfig(layer_decay=0.7, lr=1.0, optimizer="adamw"))
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in ours.named_parameters()}
    norm = {"norm.weight", "norm.bias"}
    assert [{expected.pop(name), found.pop(name)} for name in norm] == [{0.7, 1.0}] * 2
    assert found == pytest.approx(expected)


def test_layer_decay_holds_for_every_step() -> None:
    """Each tensor moves by its share of what it moves without; Muon's too, and the schedule keeps to it."""
    moved = []
    for decay in (1.0, 0.5):
        learner = Learner(world.make_resolved(layer_decay=decay, clip_norm=0.0, weight_decay=0.0))
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        learner.step(world.make_images(world.BATCH_SIZE).take(learner.share), 3)
        moved.append({name: (p - before[name]).norm().item() for name, p in learner.model.named_parameters()})
    shares = {name: moved[1][name] / whole for name, whole in moved[0].items() if whole}
    assert shares["head.weight"] == pytest.approx(1)
    assert shares["norm.bias"] == pytest.approx(1)
    assert shares["blocks.1.attn.qkv.weight"] == pytest.approx(0.5, rel=1e-3)
    assert shares["blocks.0.mlp.fc1.weight"] == pytest.approx(0.25, rel=1e-3)
    assert shares["blocks.0.norm1.bias"] == pytest.approx(0.25, rel=1e-3)
    assert shares["patch_embed.proj.weight"] == pytest.approx(0.125, rel=1e-3)


def test_layer_decay_is_checked() -> None:
    for value in (0.0, 1.1, -1.0):
        with pytest.raises(VitrailError, match=f"layer_decay is {value}; give above 0 and at most 1"):
            OptimConfig(layer_decay=value)


EVERYTHING = OptimConfig(batch_size=64, ema_decay=0.9, clip_norm=1.0, layer_decay=0.8)


def stop_at(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.task == "training" and event.done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_resume_bitwise_and_without_the_source(trained: Run, tmp_path: Path, freeze: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained.folder, source)
    config = make_config(init_from=str(source), freeze=freeze, optim=EVERYTHING, budget="0.5epochs")
    whole = train(config, tmp_path / "whole")
    for step in (1, 5):
        with pytest.raises(Interrupted):
            train(config, tmp_path / f"run{step}", stop_at(step))
    shutil.rmtree(source)
    for step in (1, 5):
        resumed = resume(tmp_path / f"run{step}")
        assert resumed.weights.read_bytes() == whole.weights.read_bytes()
        ends = [(run.checkpoints[-1] / "state.safetensors").read_bytes() for run in (resumed, whole)]
        assert ends[0] == ends[1]
    assert not any(
        torch.equal(load_file(r.weights)["head.weight"], load_file(whole.weights)["head.weight"]) for r in [trained]
    )


def test_a_run_is_resumed_from_its_weights_though_killed_before_the_first_step(trained: Run, tmp_path: Path) -> None:
    config = make_config(init_from=str(trained.folder), optim=EVERYTHING)
    whole = train(config, tmp_path / "whole")

    def die(event: Event) -> None:
        if event.task == "training":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", die)
    assert [path.name for path in load_run(tmp_path / "run").checkpoints] == ["step_00000000"]
    state = load_file(tmp_path / "run" / "checkpoints" / "step_00000000" / "state.safetensors")
    for name, tensor in load_file(trained.weights).items():
        assert torch.equal(state[f"model.{name}"], tensor)
        assert torch.equal(state[f"ema.{name}"], tensor)
    assert resume(tmp_path / "run").weights.read_bytes() == whole.weights.read_bytes()
    run = load_run(tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoints")
    run.weights.unlink()
    with pytest.raises(VitrailError, match="was stopped before it had weights; train again with another --out"):
        resume(run.folder)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_backbone_keeps_its_bytes(trained: Run, tmp_path: Path, optimizer: str) -> None:
    optim = replace(EVERYTHING, optimizer=optimizer)
    model = replace(trained.config.model, drop_rate=0.2, drop_path_rate=0.2)
    run = train(
        make_config(init_from=str(trained.folder), freeze="backbone", optim=optim, model=model), tmp_path / "run"
    )
    before, after = load_file(trained.weights), load_file(run.weights)
    state = load_file(run.checkpoints[-1] / "state.safetensors")
    for name, tensor in before.items():
        for now in (after[name], state[f"model.{name}"], state[f"ema.{name}"]):
            assert torch.equal(now, tensor) is not name.startswith("head."), name
    assert {name.split(".")[1] for name in state if name.startswith("optim.")} == {"head"}


TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
KINDS = {
    "resnet": ModelConfig(arch="resnet", resnet_depth=1, resnet_width=4),
    "conv-stem": ModelConfig(**TINY, stem="conv", rel_pos="neighbour"),
    "label-query": ModelConfig(**TINY, head="label-query"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_every_kind_of_model_goes_on_from_its_own(colour_folder: Path, tmp_path: Path, kind: str, freeze: str) -> None:
    """On other classes: all but the head is taken, and what a frozen backbone measures stays as it was too."""
    source = train(colour_config(colour_folder, model=KINDS[kind]), tmp_path / "source")
    classes = InputConfig(classes=tuple(COLOURS)[:2])
    config = colour_config(colour_folder, model=KINDS[kind], input=classes, init_from=str(source.folder), freeze=freeze)
    run = train(config, tmp_path / "run")
    report = json.loads((run.folder / "init.json").read_text())
    new = {part["name"] for part in report["new"]}
    assert new
    assert all(in_head(name) for name in new)
    before, after = load_file(source.weights), load_file(run.weights)
    assert {part["name"] for part in report["loaded"]} == before.keys() - new
    kept = {name for name in before.keys() - new if torch.equal(before[name], after[name])}
    backbone = {name for name in before if not in_head(name)}
    if freeze == "backbone":
        assert backbone <= kept
    else:
        assert not {name for name in kept if "running_mean" in name or name.endswith("weight")}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_begin_alike(trained: Run, tmp_path: Path, strategy: str) -> None:
    command = ["-m", "vitrail", "train", "tiny", "--precision", "fp32", "--quiet", "--budget", "0.3epochs"]
    command += ["--init-from", str(trained.folder), "--freeze", "backbone", "--distributed", strategy]
    process = torchrun(2, *command, "--optim.ema-decay", "0.9", "--out", tmp_path / "run")
    said = finish(process)
    assert process.returncode == 0, said
    before, after = load_file(trained.weights), load_file(tmp_path / "run" / "model.safetensors")
    alone = train(
        make_config(
            init_from=str(trained.folder), freeze="backbone", optim=replace(trained.config.optim, ema_decay=0.9)
        ),
        tmp_path / "alone",
    )
    for name, tensor in load_file(alone.weights).items():
        assert torch.equal(after[name], before[name]) is not name.startswith("head."), name
        torch.testing.assert_close(after[name], tensor, atol=1e-4, rtol=1e-3)


def test_from_colours_to_digits_by_command(
    colour_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other classes, another size, grey for colour: trained on, measured and looked into."""
    source = train(colour_config(colour_folder), tmp_path / "colours-run")
    run = tmp_path / "digits-run"
    command = ["train", "tiny", "--budget", "0.3epochs", "--precision", "fp32", "--threads", "1", "--out", str(run)]
    capsys.readouterr()
    assert main([*command, "--init-from", str(source.folder), "--optim.layer-decay", "0.8", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    report = json.loads((run / "init.json").read_text())
    assert result["init"] == report
    assert report["source"] == str(source.folder)
    resampled = {part["name"]: (part["was"], part["shape"]) for part in report["resampled"]}
    assert resampled["pos_embed"] == ([1, 65, 64], [1, 17, 64])
    assert resampled["patch_embed.proj.weight"] == ([64, 3, 2, 2], [64, 4])
    assert {part["name"] for part in report["new"]} == {"head.weight", "head.bias"}
    assert f"weights from {source.folder}: " in printed.err
    assert f"  head: new (head.weight {len(COLOURS)}×64 there, head.weight 10×64 here)" in printed.err
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 359
    picture = Path(__file__).parent.parent / "docs/examples/five.png"
    assert main(["explain", str(run), str(picture), "--out", str(tmp_path / "five.png")]) == 0
    assert (tmp_path / "five.png").stat().st_size > 10_000


def test_the_pixels_are_normalised_as_the_source_was(trained: Run, colour_folder: Path, tmp_path: Path) -> None:
    first = train(colour_config(colour_folder), tmp_path / "first")
    begun = replace(
        first.config.asked(), init_from=str(first.folder), input=replace(first.config.input, val_fraction=0.5)
    )
    second = train(begun, tmp_path / "second")
    assert second.config.data_sha256 != first.config.data_sha256  # of other images
    assert second.config.preprocessing == first.config.preprocessing
    assert "mean and std of the pixels: those of the source" in read_notes(second)
    grey = train(make_config(init_from=str(first.folder)), tmp_path / "grey")
    assert grey.config.preprocessing == trained.config.preprocessing  # measured on its own
    assert "mean and std of the pixels: measured on the new images" in read_notes(grey)


def read_notes(run: Run) -> list[str]:
    return json.loads((run.folder / "init.json").read_text())["notes"]


def test_bad_weights_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    _, timms = save_timm(tmp_path)
    sides = [["depth", "3", "4"], ["mlp_ratio", "4", "2"]]  # the preset's are on the right
    for source, said, told in (
        (tmp_path / "x.pth", "is a pickle", []),
        (timms, "give --model.embed-dim 48 --model.depth 3", sides),
    ):
        out = tmp_path / "run"
        assert main(["train", "tiny", "--budget", "1epochs", "--init-from", str(source), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        first, *table = printed.err.strip().splitlines()
        assert first.startswith("error: ")
        rows = [row.strip("│").replace("│", " ").split() for row in table if row.startswith("│")]
        assert [row for row in rows if row[0] in ("depth", "mlp_ratio")] == told
        assert not out.exists()
