"""The model: patches, agreement with timm, and that what `trace` shows is what `forward` does."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrail.config import ModelConfig
from vitrail.errors import VitrailError
from vitrail.pretrained import convert_timm
from vitrail.rel_pos import RelPosBias, first_looks
from vitrail.stem import patchify, unpatchify
from vitrail.vit import Attention, Similarity, VisionTransformer


@given(batch=st.integers(1, 3), channels=st.sampled_from([1, 3, 4]), patch=st.integers(1, 5), grid=st.integers(1, 6))
def test_patchify_is_undone_by_unpatchify(batch: int, channels: int, patch: int, grid: int) -> None:
    images = torch.randn(batch, channels, grid * patch, grid * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid**2, channels * patch**2)
    assert torch.equal(unpatchify(patches, patch), images)


def test_patches_go_row_by_row_and_by_channel_within() -> None:
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    second = patchify(images, 2)[0, 1]
    assert second.tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


SHAPES = [
    # image, channels, and the model
    (32, 3, {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}),
    (32, 3, {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 4.0}),
    (28, 1, {"patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 8, "mlp_ratio": 1.5}),
    (16, 3, {"patch_size": 2, "embed_dim": 40, "depth": 2, "num_heads": 5, "mlp_ratio": 4.0, "pool": "mean"}),
]


@pytest.mark.parametrize(("size", "channels", "dimensions"), SHAPES)
def test_logits_agree_with_timm(size: int, channels: int, dimensions: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shared = {k: v for k, v in dimensions.items() if k != "pool"}
    pool = "avg" if dimensions.get("pool") == "mean" else "token"
    theirs = timm.models.VisionTransformer(
        img_size=size, in_chans=channels, num_classes=7, global_pool=pool, fc_norm=False, **shared
    ).eval()
    for parameter in theirs.parameters():  # its fresh weights are too small for a difference to show
        nn.init.normal_(parameter, std=0.2)
    ours = VisionTransformer(ModelConfig(**dimensions), size, channels, 7).eval()
    ours.load_state_dict(convert_timm(theirs.state_dict()))
    images = torch.randn(5, channels, size, size)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def build(**changes: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    config = ModelConfig(**{"embed_dim": 32, "depth": 3, "num_heads": 4, **changes})
    model = VisionTransformer(config, 16, 3, 5).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("rel_pos", ["none", "neighbour"])
def test_trace_shows_what_forward_uses(rel_pos: str) -> None:
    model, images = build(rel_pos=rel_pos, pool="mean")
    used: list[Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, __, output: used.append(output[1]))
    with torch.no_grad():
        logits = model(images)
        seen_by_forward = torch.stack(used)
        traced_logits, attention = model.trace(images)
    assert attention.shape == (3, 2, 4, 17, 17)
    assert torch.equal(traced_logits, logits)
    assert torch.equal(attention, seen_by_forward)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 4, 17))
    assert attention.min() >= 0


@pytest.mark.parametrize("rel_pos", ["none", "neighbour"])
def test_what_the_head_does_not_read_is_not_made_and_changes_nothing(rel_pos: str) -> None:
    """The last block of `forward` ends at the class token: same logits, gradients and attention as with all tokens."""
    model, images = build(rel_pos=rel_pos)
    used: list[Tensor] = []
    model.blocks[-1].attn.register_forward_hook(lambda _, __, output: used.append(output[1]))

    def gradients_of(logits: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    logits = model(images)
    gradients = gradients_of(logits)
    traced_logits, attention = model.trace(images)
    torch.testing.assert_close(logits, traced_logits)
    torch.testing.assert_close(gradients, gradients_of(traced_logits), rtol=1e-4, atol=1e-4)
    assert used[0].shape == (2, 4, 1, 17)
    torch.testing.assert_close(used[0], attention[-1][:, :, :1])


def test_attention_is_the_papers_formula() -> None:
    config = ModelConfig(embed_dim=12, num_heads=3)
    attn = Attention(config, 4)
    x = torch.randn(2, 17, 12)
    out, weights = attn(x, onto=x)
    query, key, value = attn.qkv(x).split(12, dim=-1)
    heads = []
    for h in range(3):
        q, k, v = (t[..., 4 * h : 4 * h + 4] for t in (query, key, value))
        heads.append(torch.softmax(q @ k.mT / 4**0.5, dim=-1))
        torch.testing.assert_close(weights[:, h], heads[-1])
        heads[-1] = heads[-1] @ v
    torch.testing.assert_close(out, attn.proj(torch.cat(heads, dim=-1), onto=x))


def test_the_similaritys_gradient_is_that_of_the_formula() -> None:
    qkv = torch.randn(2, 5, 3 * 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Similarity.apply(x, 2), qkv)


def test_mean_pooling_ignores_the_class_token_and_cls_reads_it() -> None:
    for pool, expect_change in (("cls", True), ("mean", False)):
        model, images = build(pool=pool)
        with torch.no_grad():
            tokens = model.embed(images)
            changed = tokens.clone()
            changed[:, 0] = torch.randn(2, 32)
            same = torch.allclose(model.classify(tokens), model.classify(changed))
        assert same is not expect_change


def test_the_heads_first_look_at_sides_and_corners_in_turn_and_farther_late() -> None:
    sides, corners = {(-1, 0), (0, -1), (0, 1), (1, 0)}, {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    looks = [first_looks(block, 6, 4) for block in range(6)]
    assert [set(look) for look in looks[:4]] == [sides, corners, sides, corners]
    assert [{(dy / 2, dx / 2) for dy, dx in look} for look in looks[4:]] == [sides, corners]
    assert set(first_looks(3, 9, 8)) == sides | corners
    assert first_looks(1, 9, 6) == [*first_looks(0, 9, 8)[6:], *first_looks(0, 9, 8)[:4]]


def test_neighbour_start_gives_each_head_one_neighbour() -> None:
    model = VisionTransformer(ModelConfig(embed_dim=32, depth=3, num_heads=8, rel_pos="neighbour"), 16, 3, 5)
    for i, block in enumerate(model.blocks):
        table = block.attn.rel_pos.relative_position_bias_table
        begun_at = [(int(place) // 7 - 3, int(place) % 7 - 3) for place in table.argmax(1)]
        assert begun_at == first_looks(i, 3, 8)
    bias = RelPosBias(grid_size=4, num_heads=8, looks=first_looks(0, 6, 8))(4)
    assert bias.shape == (8, 17, 17)
    assert bias[:, 0].abs().max() == 0
    assert bias[:, :, 0].abs().max() == 0
    patch = 1 + 4 + 1  # row 1, column 1: all its neighbours are inside
    places = {(r, c) for r in (0, 1, 2) for c in (0, 1, 2)} - {(1, 1)}
    offsets = {divmod(int(t), 4) for t in bias[:, patch, 1:].argmax(-1)}
    assert offsets == places
    for head in bias[:, patch, 1:].reshape(8, 4, 4):
        row, column = divmod(int(head.argmax()), 4)
        expected = [[-((r - row) ** 2) - (c - column) ** 2 for c in range(4)] for r in range(4)]
        assert head.tolist() == expected


def test_relative_bias_depends_on_the_offset_alone() -> None:
    rel_pos = RelPosBias(grid_size=3, num_heads=1)
    assert rel_pos(3).abs().max() == 0
    nn.init.normal_(rel_pos.relative_position_bias_table)
    bias = rel_pos(3)[0, 1:, 1:].reshape(3, 3, 3, 3)
    assert bias[0, 0, 0, 1] == bias[1, 1, 1, 2] == bias[2, 0, 2, 1]
    assert bias[0, 0, 0, 1] != bias[0, 1, 0, 0]


def test_a_smaller_grid_keeps_the_bias_of_each_offset() -> None:
    rel_pos = RelPosBias(grid_size=5, num_heads=2)
    nn.init.normal_(rel_pos.relative_position_bias_table)
    large, small = rel_pos(5)[:, 1:, 1:].reshape(2, 5, 5, 5, 5), rel_pos(3)[:, 1:, 1:].reshape(2, 3, 3, 3, 3)
    assert rel_pos(3).shape == (2, 10, 10)
    for y, x, dy, dx in ((0, 0, 2, 1), (2, 2, -1, -2), (1, 0, 0, 0)):
        assert torch.equal(small[:, y, x, y + dy, x + dx], large[:, 2, 2, 2 + dy, 2 + dx])


def test_a_model_reads_smaller_images_with_positions_in_between() -> None:
    model, images = build(rel_pos="neighbour")  # of 16 pixels, in 4×4 patches
    with torch.no_grad():
        model.pos_embed[0, 1:, 0] = torch.arange(4).float().repeat_interleave(4)
        logits, attention = model.trace(images[:, :, :8, :8])
        added = model._resample_pos_embed(2)
    assert logits.shape == (2, 5)
    assert attention.shape == (3, 2, 4, 5, 5)
    # Half as many rows: each lies between two of the old.
    torch.testing.assert_close(added[0, 1:, 0], torch.tensor([0.5, 0.5, 2.5, 2.5]))
    assert torch.equal(added[:, :1], model.pos_embed[:, :1])
    with pytest.raises(VitrailError, match="images of 8×8 patches, the model was built for 4×4; make them smaller"):
        model(torch.zeros(1, 3, 32, 32))


def test_zero_residual_blocks_begin_as_the_identity() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ModelConfig(init="zero_residual"), 32, 3, 10)
    x = torch.randn(2, 65, 128)
    y, weights = model.blocks[3](x)
    assert torch.equal(y, x)
    torch.testing.assert_close(weights, torch.full((2, 8, 65, 65), 1 / 65))  # queries ask for nothing yet
    assert model(torch.randn(2, 3, 32, 32)).abs().max() == 0


def test_dropout_and_drop_path_work_in_training_only() -> None:
    model, images = build(drop_rate=0.5, drop_path_rate=0.5)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))
    for ends in ([block.attn.proj for block in model.blocks], [block.mlp.fc2 for block in model.blocks]):
        assert [end.drop_path_rate for end in ends] == [0.0, 0.25, 0.5]


@settings(max_examples=20, deadline=None)
@given(size=st.integers(4, 40), patch=st.integers(2, 20))
def test_patch_must_divide_the_image(size: int, patch: int) -> None:
    config = ModelConfig(patch_size=patch, embed_dim=8, depth=1, num_heads=1)
    if size % patch == 0:
        assert VisionTransformer(config, size, 1, 2).pos_embed.shape[1] == (size // patch) ** 2 + 1
    else:
        with pytest.raises(VitrailError, match=f"patch size {patch} does not divide the image size {size}"):
            VisionTransformer(config, size, 1, 2)
