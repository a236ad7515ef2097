"""The ResNet and the convolutional stem beside the plain ViT, and what each model costs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from conftest import make_config, save_image
from test_resume import same_bytes, stop_at
from vitrail.anatomy import patch_filters
from vitrail.cli import main
from vitrail.config import ModelConfig, OptimConfig
from vitrail.distributed import World
from vitrail.errors import Interrupted, VitrailError
from vitrail.model import build_model, count_flops, count_parameters, match_resnet
from vitrail.optim import split_parameters
from vitrail.resnet import ResNet
from vitrail.resolve import check_world, count_training_flops
from vitrail.run import load_run
from vitrail.stem import ConvStem
from vitrail.train import resume, train
from vitrail.vit import VisionTransformer

SMALL = ModelConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2)
RESNET = ModelConfig(arch="resnet", resnet_depth=1, resnet_width=8)


def stir(model: nn.Module) -> nn.Module:
    """The model in eval mode with batch norms that are not at their start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var, module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def test_depth_2_at_width_64_is_torchvisions_resnet18() -> None:
    theirs = resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    stir(theirs)
    ours = build_model(ModelConfig(arch="resnet"), 32, 3, 10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_a_resnet_begins_as_torchvisions() -> None:
    torch.manual_seed(0)
    ours = ResNet(2, 64, 3, 10)
    theirs = resnet18(num_classes=10)
    for name, weight in theirs.named_parameters():
        if weight.ndim == 4 and name != "conv1.weight":
            assert ours.get_parameter(name).std().item() == pytest.approx(weight.std().item(), rel=0.1), name
    assert ours.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def conv_stem_by_hand(stem: dict[str, Tensor], images: Tensor, num_convs: int) -> Tensor:
    """Patches [B, N, D] from products of unfolded pixels."""
    x = images
    for i in range(num_convs):
        weight = stem[f"convs.{3 * i}.weight"]
        side = x.shape[-1] // 2
        x = (weight.flatten(1) @ F.unfold(x, 3, padding=1, stride=2)).unflatten(2, (side, side))
        norm = {key: stem[f"convs.{3 * i + 1}.{key}"][:, None, None] for key in ("weight", "bias")}
        mean, var = (stem[f"convs.{3 * i + 1}.running_{key}"][:, None, None] for key in ("mean", "var"))
        x = ((x - mean) / (var + 1e-5).sqrt() * norm["weight"] + norm["bias"]).clamp_min(0)
    return torch.einsum("bchw,dc->bhwd", x, stem["proj.weight"][:, :, 0, 0]).flatten(1, 2) + stem["proj.bias"]


@pytest.mark.parametrize(("patch", "widths"), [(1, []), (2, [24]), (4, [12, 24]), (8, [6, 12, 24])])
def test_conv_stem_against_its_definition(patch: int, widths: list[int]) -> None:
    stem = ConvStem(patch, 3, 24).double()
    stir(stem)
    assert [m.out_channels for m in stem.convs if isinstance(m, nn.Conv2d)] == widths
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = conv_stem_by_hand(stem.state_dict(), images, len(widths))
        torch.testing.assert_close(stem(images), expected, rtol=1e-10, atol=1e-10)
    assert expected.shape == (2, (16 // patch) ** 2, 24)


def test_conv_stem_keeps_the_patches_in_place_on_images_of_any_size() -> None:
    """A bright patch is brightest in its own token, and a smaller image makes fewer tokens."""
    model = VisionTransformer(replace(SMALL, stem="conv"), 16, 1, 3)
    assert isinstance(model.patch_embed, ConvStem)
    stir(model)
    with torch.no_grad():
        dark = model.patch_embed(torch.zeros(1, 1, 16, 16))
        for place in (0, 6, 13):
            image = torch.zeros(1, 1, 16, 16)
            y, x = divmod(place, 4)
            image[..., 4 * y + 1 : 4 * y + 3, 4 * x + 1 : 4 * x + 3] = 9
            assert (model.patch_embed(image) - dark).norm(dim=2).argmax() == place
        logits, attention = model.trace(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 3)
    assert attention.shape == (2, 2, 2, 5, 5)


def test_filters_of_a_conv_stem_are_its_first_convolutions() -> None:
    filters = patch_filters(VisionTransformer(replace(SMALL, stem="conv"), 16, 3, 3))
    assert filters.components.shape[1:] == (3, 3, 3)
    assert filters.variance_share.sum() <= 1 + 1e-6


def test_flops_of_a_vit_by_hand() -> None:
    tokens, width, depth, hidden = 17, 32, 2, 64
    embed, head = 16 * 4 * 4 * 3 * width, width * 5
    products = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens**2 * width
    assert count_flops(replace(SMALL, pool="mean"), 16, 3, 5) == 2 * (embed + depth * products + head)
    # The last block makes nothing of the tokens that the head does not read, nor their keys and values: each of the two
    # heads compares its query with whole tokens, and takes a mean of them.
    num_heads = 2
    last = width * (4 * width + 2 * hidden) + 2 * num_heads * tokens * width
    expected = 2 * (embed + (depth - 1) * products + last + head)
    assert count_flops(SMALL, 16, 3, 5) == expected
    assert count_flops(replace(SMALL, rel_pos="neighbour", init="zero_residual"), 16, 3, 5) == expected


def test_flops_of_convolutions_by_hand() -> None:
    w, classes = 8, 5
    stage = lambda side, ins, outs: side**2 * outs * 9 * (ins + outs)  # noqa: E731
    shortcut = lambda side, ins, outs: side**2 * outs * ins  # noqa: E731
    expected = 16**2 * w * 3 * 9 + stage(16, w, w) + 8 * w * classes
    for i, side in enumerate((8, 4, 2)):
        ins = w * 2**i
        expected += stage(side, ins, 2 * ins) + shortcut(side, ins, 2 * ins)
    assert count_flops(RESNET, 16, 3, classes) == 2 * expected
    stem = 8**2 * 16 * 3 * 9 + 4**2 * 32 * 16 * 9 + 4**2 * 32 * 32
    difference = count_flops(replace(SMALL, stem="conv"), 16, 3, 5) - count_flops(SMALL, 16, 3, 5)
    assert difference == 2 * (stem - 16 * 4 * 4 * 3 * 32)


def test_parameters_are_counted() -> None:
    for config in (SMALL, replace(SMALL, stem="conv"), RESNET):
        model = build_model(config, 16, 3, 5)
        assert count_parameters(config, 16, 3, 5) == sum(p.numel() for p in model.parameters())


VITS = [
    (ModelConfig(patch_size=2, embed_dim=64, depth=4), 8, 1),
    (ModelConfig(patch_size=2, embed_dim=32, depth=4, num_heads=4), 8, 1),
    (ModelConfig(), 32, 3),
    (ModelConfig(embed_dim=192, depth=9, num_heads=6), 32, 3),
]


@pytest.mark.parametrize(("vit", "size", "channels"), VITS)
def test_match_within_five_percent(vit: ModelConfig, size: int, channels: int) -> None:
    for match, count in (("vit", count_flops), ("vit-parameters", count_parameters)):
        asked = replace(vit, arch="resnet", match=match)
        found = match_resnet(asked, {size: 1}, channels, 10)
        assert count(found, size, channels, 10) == pytest.approx(count(vit, size, channels, 10), rel=0.05)
        assert replace(found, resnet_depth=2, resnet_width=64) == asked
        assert match_resnet(found, {size: 1}, channels, 10) == found


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(VitrailError, match="match vit is for a ResNet"):
        ModelConfig(match="vit")
    with pytest.raises(VitrailError, match="stem conv is for a ViT"):
        ModelConfig(arch="resnet", stem="conv")
    with pytest.raises(VitrailError, match=r"patch_size is 3; stem conv .* power of two"):
        ModelConfig(patch_size=3, stem="conv")
    with pytest.raises(VitrailError, match=r"no ResNet comes within 5% of this ViT's 270 parameters"):
        match_resnet(
            ModelConfig(arch="resnet", match="vit-parameters", embed_dim=4, depth=1, num_heads=1), {4: 1}, 1, 2
        )
    normed = [make_config(model=RESNET), make_config(model=replace(SMALL, stem="conv"))]
    for config in normed:
        check_world(config, World(0, 2, 2))
        with pytest.raises(VitrailError, match="fsdp is for models without batch norm"):
            check_world(replace(config, distributed="fsdp"), World(0, 2, 2))
        for optim in (OptimConfig(batch_size=7), OptimConfig(micro_batch_size=1)):
            with pytest.raises(VitrailError, match="too few for batch norm"):
                check_world(replace(config, optim=optim), World())


def test_muon_moves_what_lies_between_stem_and_head() -> None:
    def names(config: ModelConfig) -> list[list[str]]:
        model = build_model(config, 16, 3, 5)
        known = {id(p): name for name, p in model.named_parameters()}
        return [[known[id(p)] for p in group] for group in split_parameters(model)]

    hidden, matrices, rest = names(RESNET)
    stages = [f"layer{i}.0.conv{j}.weight" for i in range(1, 5) for j in (1, 2)]
    assert sorted(hidden) == sorted(stages + [f"layer{i}.0.downsample.0.weight" for i in range(2, 5)])
    assert matrices == ["conv1.weight", "fc.weight"]
    assert len(rest) == 2 * (1 + 2 * 4 + 3) + 1
    hidden, matrices, rest = names(replace(SMALL, stem="conv"))
    stem = [f"patch_embed.{name}.weight" for name in ("convs.0", "convs.3", "proj")]
    assert matrices == [*stem, "head.weight"]
    assert {name.split(".")[0] for name in hidden} == {"blocks"}
    assert {"patch_embed.convs.1.weight", "patch_embed.convs.1.bias", "patch_embed.proj.bias"} <= set(rest)


FLAGS = ["--budget", "2epochs", "--threads", "1", "--precision", "fp32", "--quiet", "--json"]


def test_a_matched_resnet_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "resnet"
    flags = ["--model.arch", "resnet", "--model.match", "vit", "--optim.coarse-fraction", "0.5", "--out", str(run)]
    assert main(["train", "tiny", *flags, *FLAGS]) == 0
    config = load_run(run).config
    assert config.model.match == "vit"
    assert (config.model.resnet_depth, config.model.resnet_width) != (2, 64)
    vit = replace(config, model=replace(config.model, arch="vit", match="none"))
    assert count_training_flops(config) == pytest.approx(count_training_flops(vit), rel=0.06)  # sizes change at a step
    model = load_run(run).load_model()
    assert isinstance(model, ResNet)
    assert model.layer3[0].bn1.running_var.std() > 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.2
    picture = save_image(tmp_path / "picture.png", (200, 0, 0))
    assert main(["explain", str(run), str(picture)]) == 2
    assert "ResNet has no attention to show" in capsys.readouterr().err


def test_a_conv_stem_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "stem"
    flags = ["--model.stem", "conv", "--optim.coarse-fraction", "0.5", "--out", str(run)]
    assert main(["train", "tiny", *flags, *FLAGS]) == 0
    model = load_run(run).load_model()
    assert isinstance(model, VisionTransformer)
    assert isinstance(model.patch_embed, ConvStem)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.2
    picture = save_image(tmp_path / "picture.png", (200, 0, 0))
    out = tmp_path / "explained.png"
    assert main(["explain", str(run), str(picture), "--out", str(out)]) == 0
    assert out.exists()


@pytest.mark.parametrize("model", [RESNET, replace(SMALL, patch_size=2, stem="conv")], ids=["resnet", "stem"])
def test_resume_bitwise_with_batch_norm(tmp_path: Path, model: ModelConfig) -> None:
    config = make_config(model=model, threads=2, budget="1epochs")
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 10 of"):
        train(config, tmp_path / "parts", stop_at(10))
    assert same_bytes(resume(tmp_path / "parts"), whole)
