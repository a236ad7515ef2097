"""Weights from elsewhere: each format against the library it comes from; what is resampled, new or refused."""

import io
import pickle
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

import world
from conftest import make_config
from vitrail.config import ModelConfig, OptimConfig, Preprocessing, ResolvedConfig
from vitrail.errors import VitrailError
from vitrail.pretrained import InitReport, fit_weights, read_weights
from vitrail.run import Run, load_run
from vitrail.train import train
from vitrail.vit import VisionTransformer

WIDTH, DEPTH, HEADS, SIDE, PATCH, CLASSES = 48, 3, 4, 24, 4, 7
SHAPE = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 4.0}
TIMM_SHAPE = SHAPE | {"img_size": SIDE, "num_classes": CLASSES}


def make_resolved(
    size: int = SIDE, channels: int = 3, classes: int | tuple[str, ...] = CLASSES, **model: object
) -> ResolvedConfig:
    names = tuple("abcdefghijklmnop"[:classes]) if isinstance(classes, int) else classes
    pre = Preprocessing(image_size=size, num_channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    return replace(world.make_resolved(), model=ModelConfig(**(SHAPE | model)), classes=names, preprocessing=pre)


def begin(source: str | Path, config: ResolvedConfig | None = None) -> tuple[nn.Module, InitReport]:
    """Our model as a run of `config` would begin it."""
    config = config or make_resolved()
    state, report = fit_weights(read_weights(str(source)), config)
    pre = config.preprocessing
    model = VisionTransformer(config.model, pre.image_size, pre.num_channels, len(config.classes))
    model.load_state_dict(model.state_dict() | state)
    names = [part.name for part in (*report.loaded, *report.resampled, *report.new)]
    assert sorted(names) == sorted(model.state_dict())
    return model.eval(), report


def loud(model: Any) -> Any:
    """With weights large enough for a difference to show."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.15)
    return model.eval()


def agree(ours: nn.Module, theirs: Callable[[Tensor], Any], size: int = SIDE, channels: int = 3) -> None:
    images = torch.randn(3, channels, size, size)
    with torch.no_grad():
        logits, expected = ours(images), theirs(images)
    expected = getattr(expected, "logits", expected)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def names(parts: tuple[Any, ...]) -> set[str]:
    return {part.name for part in parts}


def save_timm(folder: Path, **changes: object) -> tuple[Any, Path]:
    model, path = loud(TimmVit(**(TIMM_SHAPE | changes))), folder / "vit.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_file(tmp_path: Path, pool: str) -> None:
    theirs, path = save_timm(tmp_path, global_pool=pool, fc_norm=False)
    ours, report = begin(path, make_resolved(pool="cls" if pool == "token" else "mean"))
    agree(ours, theirs)
    assert len(report.loaded) == len(theirs.state_dict())
    assert names(report.loaded) == set(ours.state_dict())
    assert not report.unused
    assert any(note.startswith("heads: not told by the source, taken as 4") for note in report.notes)


def test_timm_folder(tmp_path: Path) -> None:
    arguments = {"img_size": SIDE, **SHAPE}
    theirs = loud(timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    agree(begin(tmp_path)[0], theirs)
    weights = read_weights(str(tmp_path))
    assert (weights.num_heads, weights.pool, weights.mean) == (HEADS, "cls", (0.5,) * 3)
    with pytest.raises(VitrailError, match=r"another model than this; give --model.num-heads 4$"):
        begin(tmp_path, make_resolved(num_heads=8))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on disk with the folder of one model, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_timm_by_name(hub: Path) -> None:
    theirs = loud(timm.create_model("test_vit", num_classes=1000))
    save_file(theirs.state_dict(), hub / "model.safetensors")
    names = tuple(map(str, range(1000)))
    config = make_resolved(160, 3, names, patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3)
    for source in ("timm:test_vit", "timm:test_vit.r160_in1k"):
        ours, report = begin(source, config)
        agree(ours, theirs, 160)
        assert not report.new
    weights = read_weights("timm:test_vit")
    assert (weights.num_heads, weights.pool) == (2, "cls")
    assert weights.adopt(config.preprocessing).mean == (0.5, 0.5, 0.5)
    with pytest.raises(VitrailError, match=r"another model than this; give --model.num-heads 2$"):
        begin("timm:test_vit", replace(config, model=replace(config.model, num_heads=4)))


def test_timm_by_name_is_safetensors_or_nothing(hub: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (hub / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(VitrailError, match=r"timm:test_vit: cannot fetch model.safetensors of timm/test_vit.r160_in1k"):
        read_weights("timm:test_vit")
    assert not canary.exists()
    for name, said in {
        "vit_tiny_patch16_225": "no model 'vit_tiny_patch16_225'; do you mean vit_tiny_patch16_224",
        "resnet18": r"not a plain Vision Transformer \(ResNet\)",
        "vit_base_patch16_clip_quickgelu_224": r"not a plain Vision Transformer \(its GELU is another\)",
        "test_vit.of_mine": "Invalid pretrained tag",
        "hf-hub:someone/model": "no model 'hf-hub:someone/model'",
    }.items():
        with pytest.raises(VitrailError, match=said):
            read_weights(f"timm:{name}")


def hugging_face_config(**changes: object) -> ViTConfig:
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=CLASSES,
        **changes,
    )


def test_hugging_face_folder(tmp_path: Path) -> None:
    theirs = loud(ViTForImageClassification(hugging_face_config()))
    theirs.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    ours, report = begin(tmp_path)
    agree(ours, theirs)
    assert names(report.loaded) == set(ours.state_dict())
    assert not report.unused
    pre = read_weights(str(tmp_path)).adopt(make_resolved().preprocessing)
    assert (pre.mean, pre.std, pre.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SIDE)
    grey = make_resolved(channels=1).preprocessing
    assert read_weights(str(tmp_path)).adopt(grey) == grey
    # The names that transformers 5 has for the same in memory.
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    agree(begin(tmp_path)[0], theirs)
    with pytest.raises(VitrailError, match=r"another model than this; give --model.num-heads 4$"):
        begin(tmp_path, make_resolved(num_heads=6))


def test_hugging_face_without_a_head(tmp_path: Path) -> None:
    theirs = loud(ViTModel(hugging_face_config()))
    theirs.save_pretrained(tmp_path)
    ours, report = begin(tmp_path)
    assert names(report.new) == {"head.weight", "head.bias"}
    assert names(report.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    ours.head = nn.Identity()
    agree(ours, lambda images: theirs(images).last_hidden_state[:, 0])


def write_google(path: Path, model: Any, kind: str) -> None:
    """A timm model as flax keeps it: kernels inputs first, attention's heads apart.

    `kind`: vision_transformer; big_vision, whose blocks are numbered; or scanned, whose blocks are stacked.
    """
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    old = kind == "vision_transformer"
    prefix = "" if old else "params/"
    kernel = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays = {"embedding/kernel": kernel, "embedding/bias": state["patch_embed.proj.bias"], "cls": state["cls_token"]}
    arrays["Transformer/posembed_input/pos_embedding" if old else "pos_embedding"] = state["pos_embed"]
    arrays |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    arrays |= {f"Transformer/encoder_norm/{k}": state[f"norm.{v}"] for k, v in (("scale", "weight"), ("bias", "bias"))}
    attention, mlp, second = (
        f"MultiHeadDotProductAttention_{int(old)}",
        f"MlpBlock_{3 * old}",
        f"LayerNorm_{1 + old}",
    )
    blocks = []
    for i in range(len(model.blocks)):
        ours = {name.removeprefix(f"blocks.{i}."): array for name, array in state.items() if f"blocks.{i}." in name}
        block = {}
        for name, norm in (("LayerNorm_0", "norm1"), (second, "norm2")):
            block |= {f"{name}/scale": ours[f"{norm}.weight"], f"{name}/bias": ours[f"{norm}.bias"]}
        weights, biases = (
            ours["attn.qkv.weight"].reshape(3, HEADS, -1, WIDTH),
            ours["attn.qkv.bias"].reshape(3, HEADS, -1),
        )
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            block |= {f"{attention}/{name}/kernel": weight.transpose(2, 0, 1), f"{attention}/{name}/bias": bias}
        block[f"{attention}/out/kernel"] = ours["attn.proj.weight"].T.reshape(HEADS, -1, WIDTH)
        block[f"{attention}/out/bias"] = ours["attn.proj.bias"]
        for j in (0, 1):
            block[f"{mlp}/Dense_{j}/kernel"] = ours[f"mlp.fc{j + 1}.weight"].T
            block[f"{mlp}/Dense_{j}/bias"] = ours[f"mlp.fc{j + 1}.bias"]
        blocks.append(block)
    if kind == "scanned":
        arrays |= {f"Transformer/encoderblock/{name}": np.stack([b[name] for b in blocks]) for name in blocks[0]}
    else:
        arrays |= {
            f"Transformer/encoderblock_{i}/{name}": array for i, b in enumerate(blocks) for name, array in b.items()
        }
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})


@pytest.mark.parametrize("kind", ["vision_transformer", "big_vision", "scanned"])
def test_google_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "vit.npz"
    write_google(path, loud(TimmVit(**TIMM_SHAPE)), kind)
    theirs = TimmVit(**TIMM_SHAPE).eval()
    theirs.load_pretrained(str(path))  # timm's own reading of it
    ours, report = begin(path)
    agree(ours, theirs)
    assert names(report.loaded) == set(ours.state_dict())
    assert not report.unused
    assert read_weights(str(path)).mean == (0.5, 0.5, 0.5)
    with pytest.raises(VitrailError, match=r"another model than this; give --model.num-heads 4$"):
        begin(path, make_resolved(num_heads=6))


def test_another_layer_before_the_head(tmp_path: Path) -> None:
    """A head that reads what another layer makes is of no use here, whatever its size; nor is another tower."""
    path = tmp_path / "vit.npz"
    write_google(path, loud(TimmVit(**TIMM_SHAPE)), "vision_transformer")
    more = {"pre_logits/kernel": np.zeros((WIDTH, WIDTH)), "pre_logits/bias": np.zeros(WIDTH)}
    with np.load(path) as file:
        np.savez(path, **file, **more)
    report = begin(path)[1]
    assert names(report.new) == {"head.weight", "head.bias"}
    assert names(report.unused) == {"head.weight", "head.bias", "pre_logits.weight", "pre_logits.bias"}
    assert any("head: new (the head there reads what pre_logits makes)" in note for note in report.notes)
    write_google(path, loud(TimmVit(**TIMM_SHAPE)), "big_vision")
    with np.load(path) as file:
        towers = {name.replace("params/", "params/img/"): array for name, array in file.items()}
    np.savez(path, **towers, **{"params/t": np.zeros(1), "params/txt/head/bias": np.zeros(3)})
    assert names(begin(path)[1].unused) == {"params/t", "params/txt/head/bias"}
    _, path = save_timm(tmp_path, global_pool="avg", fc_norm=True)
    report = begin(path, make_resolved(pool="mean"))[1]
    assert names(report.new) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert names(report.unused) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(("size", "patch", "channels"), [(32, 4, 3), (24, 6, 3), (16, 2, 3), (20, 5, 1), (24, 4, 1)])
def test_resampling_is_timms(tmp_path: Path, size: int, patch: int, channels: int) -> None:
    """Another picture, another patch and grey for colour: as timm itself adapts the same file."""
    _, path = save_timm(tmp_path)
    overlay = {"file": str(path), "num_classes": CLASSES, "custom_load": False}
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        in_chans=channels,
        **(TIMM_SHAPE | {"img_size": size, "patch_size": patch}),
    ).eval()
    ours, report = begin(path, make_resolved(size, channels, patch_size=patch))
    agree(ours, theirs, size, channels)
    expected = {"pos_embed"} if size // patch != SIDE // PATCH else set()
    expected |= {"patch_embed.proj.weight"} if (patch, channels) != (PATCH, 3) else set()
    assert names(report.resampled) == expected
    assert not report.new
    assert not report.unused


def test_positions_without_one_for_the_class_token(tmp_path: Path) -> None:
    for size in (SIDE, 32):
        theirs, path = save_timm(tmp_path, no_embed_class=True, img_size=size)
        agree(begin(path, make_resolved(size))[0], theirs, size)
    ours, _ = begin(path, make_resolved(SIDE))
    assert not ours.pos_embed[:, 0].any()


def test_relative_positions_keep_their_place_in_the_picture(tmp_path: Path) -> None:
    """On a coarser grid and a finer one, an offset over the same part of the picture has the bias it had."""
    source = train(make_config(), tmp_path / "source")
    tables = [p for n, p in load_file(source.weights).items() if "rel_pos" in n]
    config = replace(source.config, preprocessing=replace(source.config.preprocessing, image_size=8))
    old = 4
    for grid, step, old_step in ((2, 1, 3), (old, 1, 1), (7, 2, 1)):
        pre = replace(config.preprocessing, image_size=2 * grid)
        model, report = begin(source.folder, replace(config, preprocessing=pre))
        assert len([name for name in names(report.resampled) if "rel_pos" in name]) == (0 if grid == old else 4)
        reach = (grid - 1) // step
        for table, block in zip(tables, model.blocks, strict=True):
            bias = block.attn.rel_pos(grid)[:, 1:, 1:].unflatten(1, (grid, grid)).unflatten(3, (grid, grid))
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    y, x = max(0, -dy * step), max(0, -dx * step)
                    row, column = (d * old_step + old - 1 for d in (dy, dx))
                    expected = table.unflatten(1, (7, 7))[:, row, column]
                    torch.testing.assert_close(bias[:, y, x, y + dy * step, x + dx * step], expected)


def test_new_relative_positions_leave_the_model_as_it_was(tmp_path: Path) -> None:
    theirs, path = save_timm(tmp_path)
    ours, report = begin(path, make_resolved(rel_pos="neighbour"))
    agree(ours, theirs)
    assert names(report.new) == {f"blocks.{i}.attn.rel_pos.relative_position_bias_table" for i in range(DEPTH)}


def test_a_head_for_other_classes_is_new(trained: Run, tmp_path: Path) -> None:
    pool = replace(trained.config, model=replace(trained.config.model, pool="mean"))
    renamed = replace(trained.config, classes=tuple("abcdefghij"))
    fewer = replace(trained.config, classes=trained.config.classes[:4])
    for config, said in {
        pool: "the head there reads cls, here mean",
        renamed: "the classes there have other names",
        fewer: "head.weight 10×64 there, head.weight 4×64 here",
    }.items():
        model, report = begin(trained.folder, config)
        assert f"head: new ({said})" in report.notes
        assert names(report.new) == {"head.weight", "head.bias"} == names(report.unused)
        assert not torch.equal(model.head.weight[:4], load_file(trained.weights)["head.weight"][:4])
    model, report = begin(trained.folder, trained.config)
    assert names(report.loaded) == set(model.state_dict())
    assert not report.unused
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(trained.weights).items())
    # Hugging Face's names of classes count too, where someone gave them.
    labels = dict(enumerate("gfedcba"))
    ViTForImageClassification(hugging_face_config(id2label=labels)).save_pretrained(tmp_path)
    assert "head: new (the classes there have other names)" in begin(tmp_path)[1].notes
    assert not begin(tmp_path, make_resolved(classes=tuple("gfedcba")))[1].new


def test_a_run_gives_its_averaged_weights(tmp_path: Path) -> None:
    run = train(make_config(optim=OptimConfig(batch_size=64, ema_decay=0.9)), tmp_path / "run")
    state = load_file(run.checkpoints[-1] / "state.safetensors")
    for source in (run.folder, run.checkpoints[-1]):
        taken, _ = fit_weights(read_weights(str(source)), run.config)
        assert all(torch.equal(taken[name], state[f"ema.{name}"]) for name in taken)
        assert not torch.equal(taken["norm.weight"], state["model.norm.weight"])
    shipped = load_run("cifar10")
    agree(begin("cifar10", shipped.config)[0], shipped.load_model(), shipped.config.preprocessing.image_size)


def test_val_that_the_source_was_trained_on_is_told(trained: Run) -> None:
    weights, config = read_weights(str(trained.folder)), trained.config
    for changes, seed, told in (
        ({}, 0, False),
        ({}, 1, True),
        ({"val_seed": 0}, 1, False),
        ({"val_fraction": 0.05}, 0, False),
        ({"val_fraction": 0.2}, 0, True),
    ):
        begun = replace(config, seed=seed, input=replace(config.input, **changes))
        notes = fit_weights(weights, begun)[1].notes
        assert any("--input.val-fraction 0.1 --input.val-seed 0" in note for note in notes) is told, (changes, seed)
    others = replace(config, seed=1, classes=tuple("abcdefghij"))
    assert not any(note.startswith("val:") for note in fit_weights(weights, others)[1].notes)


def test_other_dimensions_are_told_from_both_sides(tmp_path: Path) -> None:
    _, path = save_timm(tmp_path)
    with pytest.raises(VitrailError) as caught:
        begin(path, make_resolved(embed_dim=32, depth=6, mlp_ratio=2.0))
    assert str(caught.value) == (
        f"{path} is of another model than this; give --model.embed-dim 48 --model.depth 3 --model.mlp-ratio 4"
    )
    assert caught.value.table == [
        ("", "there", "here"),
        ("embed_dim", "48", "32"),
        ("depth", "3", "6"),
        ("mlp_ratio", "4", "2"),
    ]


def test_new_blocks_add_nothing_and_leave_the_last_one_last(tmp_path: Path) -> None:
    theirs, path = save_timm(tmp_path)
    ours, report = begin(path, make_resolved(depth=DEPTH + 2, rel_pos="neighbour"))
    agree(ours, theirs)
    state = theirs.state_dict()
    for there, here in ((0, 0), (1, 1), (2, 4)):
        assert torch.equal(ours.blocks[here].mlp.fc1.weight, state[f"blocks.{there}.mlp.fc1.weight"])
    tables = [f"blocks.{index}.attn.rel_pos.relative_position_bias_table" for index in range(DEPTH + 2)]
    added = {name for name in ours.state_dict() if name.startswith(("blocks.2.", "blocks.3."))}
    assert names(report.new) == {*added, *tables}
    assert [bool(ours.state_dict()[name].any()) for name in tables] == [False, False, True, True, False]
    assert "depth: new are blocks.2, blocks.3; they begin by adding nothing" in report.notes
    with pytest.raises(VitrailError, match=r"another model than this; give --model.depth 3$"):
        begin(path, make_resolved(depth=DEPTH - 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_values": 1e-5}, r"blocks.0.ls1.gamma, .* \(6\); give the weights of one like this"),
        ({"reg_tokens": 4}, "reg_token"),
        ({"qk_norm": True}, "blocks.0.attn.k_norm.bias"),
        ({"pre_norm": True}, "norm_pre.bias, norm_pre.weight"),
    ],
)
def test_parts_that_ours_does_not_have_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    _, path = save_timm(tmp_path, **changes)
    with pytest.raises(VitrailError, match=rf"another kind of model: .*there is no place here for its {said}"):
        begin(path)


def test_what_does_not_fit_is_refused(trained: Run, tmp_path: Path) -> None:
    _, path = save_timm(tmp_path)
    state = load_file(path)
    for changed, said in (
        ({"pos_embed": torch.zeros(1, 40, WIDTH)}, r"pos_embed 1×40×48 does not fit this model's pos_embed 1×37×48"),
        ({"blocks.1.norm1.bias": torch.zeros(7)}, r"blocks.1.norm1.bias 7 does not fit"),
        ({"patch_embed.proj.weight": torch.zeros(WIDTH, 5, 4, 4)}, r"weight 48×5×4×4 does not fit"),
        ({"head.bias": torch.full((CLASSES,), torch.nan)}, "head.bias holds numbers that are not finite"),
        ({"norm.bias": torch.zeros(WIDTH, dtype=torch.int8)}, "norm.bias holds torch.int8"),
        ({"patch_embed.proj.weight": torch.zeros(WIDTH, 48)}, "not a ViT in timm's names"),
    ):
        save_file(state | changed, path)
        with pytest.raises(VitrailError, match=said):
            begin(path)
    save_file({name: tensor for name, tensor in state.items() if name != "blocks.2.mlp.fc2.bias"}, path)
    with pytest.raises(VitrailError, match=r"another kind of model: it lacks blocks.2.mlp.fc2.bias; give"):
        begin(path)
    with pytest.raises(VitrailError, match=r"weight 64×1×2×2 does not fit this model's patch_embed.proj.weight 64×12"):
        begin(trained.folder, replace(trained.config, preprocessing=make_resolved(8).preprocessing))
    plain = replace(trained.config, model=replace(trained.config.model, rel_pos="none"))
    with pytest.raises(VitrailError, match=r"relative_position_bias_table, .* \(4\).* give --model.rel-pos zero"):
        begin(trained.folder, plain)
    ViTForImageClassification(hugging_face_config(hidden_act="gelu_new")).save_pretrained(tmp_path / "hf")
    with pytest.raises(VitrailError, match=r"hidden_act 'gelu_new', .* expected 'vit', 'gelu' and a number"):
        begin(tmp_path / "hf")


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "sang")


def test_pickles_are_refused_and_never_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    dangerous = pickle.dumps(Canary(canary))
    for name in ("a.pt", "a.pth", "a.bin", "a.ckpt", "a.pkl", "A.PTH", "a.pth.tar"):
        (tmp_path / name).write_bytes(dangerous)
        with pytest.raises(
            VitrailError, match=rf"{name} is a pickle, which can run any code .* python -c \"import sys, torch"
        ):
            read_weights(str(tmp_path / name))
    folder = tmp_path / "hf"
    hugging_face_config().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(dangerous)
    with pytest.raises(VitrailError, match=r"pytorch_model.bin is a pickle"):
        read_weights(str(folder))
    for name in ("a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(dangerous)
        with pytest.raises(VitrailError, match=f"cannot read .*{name}"):
            read_weights(str(tmp_path / name))
    objects = np.array([Canary(canary)], dtype=object)
    np.savez(tmp_path / "a.npz", **{"embedding/kernel": objects})
    with pytest.raises(VitrailError, match=r"cannot read .*a.npz as an .npz of weights: Object arrays"):
        read_weights(str(tmp_path / "a.npz"))
    assert not canary.exists()
    assert pickle.loads(dangerous)  # it would have sung
    assert canary.exists()


def test_the_command_a_pickle_is_refused_with_converts_it(tmp_path: Path) -> None:
    theirs, path = save_timm(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    path.unlink()
    with pytest.raises(VitrailError) as caught:
        read_weights(str(tmp_path / "vit.pth"))
    _, _, *command = shlex.split(str(caught.value).split("convert it: ")[1])
    subprocess.run([sys.executable, "-c", *command], check=True)
    agree(begin(path)[0], theirs)


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    good = io.BytesIO()
    np.savez(good, **{"embedding/kernel": np.zeros((2, 2, 3, 8), np.float32)})
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("embedding/kernel.npy", bytes(10**7))
    text, cut = b"<html>not found</html>", good.getvalue()[:200]
    for name, content, said in (
        ("a.safetensors", text, "cannot read"),
        ("a.safetensors", b"", "cannot read"),
        ("a.npz", text, "cannot read"),
        ("a.npz", cut, "cannot read"),
        ("a.npz", bomb.getvalue(), r"unpacks to \d+ times its size"),
        ("a.npz", npz(**{"step": np.zeros(3)}), "it has no embedding/kernel, but step"),
        ("a.npz", npz(**{"embedding/kernel": np.zeros(3, np.int64)}), "embedding/kernel is no array of floating point"),
        ("a.npz", good.getvalue(), "lacks "),
        ("a.txt", text, "neither a .safetensors file nor an .npz"),
        ("config.json", b"[1]", "neither"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VitrailError, match=said):
            begin(tmp_path / name)
    for content, said in ((b"[1]", "holds no JSON object"), (b"{", "is not valid JSON"), (b"{}", "unknown|make a")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(VitrailError, match=said):
            begin(tmp_path)
    with pytest.raises(VitrailError, match=r"no weights at nowhere: expected a run folder, .* timm:NAME, "):
        read_weights("nowhere")
    save_file({"embeddings.word_embeddings.weight": torch.zeros(3, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(VitrailError, match=r"not a ViT in timm's names: .* but embeddings.word_embeddings.weight"):
        read_weights(str(tmp_path / "a.safetensors"))


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_without_timm_the_error_says_how_to_get_it(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is resampled, or named by timm, needs it."""
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    begin(trained.folder, trained.config)
    pre = replace(trained.config.preprocessing, image_size=12)
    with pytest.raises(VitrailError, match=r"another grid of patches needs timm, .*: pip install 'timm>=1.0.20'"):
        begin(trained.folder, replace(trained.config, preprocessing=pre))
    with pytest.raises(VitrailError, match="timm:test_vit needs timm"):
        read_weights("timm:test_vit")
