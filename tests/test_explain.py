"""Maps, figures of the paper and their trust: against equations, loops, timm, and planted evidence."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitrail.anatomy import attention_reach, patch_filters, position_similarity, position_vectors, relative_bias
from vitrail.config import ModelConfig, Preprocessing
from vitrail.errors import VitrailError
from vitrail.explain import METHODS, explain, explain_picture, map_batches, rollout
from vitrail.pretrained import build_from_timm
from vitrail.run import Run
from vitrail.trust import hide_patches, measure_sensitivity, measure_trust
from vitrail.vit import VisionTransformer

PLAIN = Preprocessing(image_size=12, num_channels=1, mean=(0.5,), std=(0.5,))


def sharp_model(**changes: object) -> VisionTransformer:
    """A small model in float64 whose weights are large enough for every effect to show."""
    torch.manual_seed(0)
    dimensions: dict[str, object] = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "rel_pos": "zero"}
    model = VisionTransformer(ModelConfig(**(dimensions | changes)), 12, 1, 5).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def some_images(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 1, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


# ── rollout and relevance, from the equations ────────────────────────────────────────────────


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("num_prefix_tokens", [1, 3])
def test_rollout_is_the_sum_over_all_paths(fusion: str, num_prefix_tokens: int) -> None:
    """R[i, j] summed over every path j → k → … → i by hand, in numpy, token by token."""
    logits = torch.randn(3, 2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = list((3 * logits).softmax(-1))
    found = rollout(attention, fusion, 0.0, num_prefix_tokens)
    fuse = {"mean": np.mean, "max": np.max, "min": np.min}[fusion]
    for b in range(2):
        steps = []
        for weights in attention:
            fused = fuse(weights[b].numpy(), axis=0)
            fused = fused / fused.sum(1)[:, None]
            steps.append(0.5 * fused + 0.5 * np.eye(5))
        for i, j in itertools.product(range(5), repeat=2):
            paths = sum(
                steps[2][i, k] * steps[1][k, m] * steps[0][m, j] for k, m in itertools.product(range(5), repeat=2)
            )
            assert found[b, i, j].item() == pytest.approx(paths, abs=1e-12)


def test_discarding_drops_each_rows_smallest_patches_and_no_prefix_token() -> None:
    weights = torch.tensor([[0.01, 0.02, 0.4, 0.5, 0.07], [0.2, 0.2, 0.1, 0.3, 0.2]] + [[0.2] * 5] * 3)
    found = rollout([weights[None, None]], discard_ratio=0.5, num_prefix_tokens=2)[0]
    # two prefix tokens are kept though they are the smallest; of three patches one goes: 0.07, then 0.1
    assert found[0].tolist() == pytest.approx([0.5 + 0.005 / 0.93, 0.01 / 0.93, 0.2 / 0.93, 0.25 / 0.93, 0.0])
    assert found[1].tolist() == pytest.approx([0.1 / 0.9, 0.5 + 0.1 / 0.9, 0.0, 0.15 / 0.9, 0.1 / 0.9])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_relevance_agrees_with_the_equations(pool: str) -> None:
    """The forward pass written again, head by head, with a zero added to every attention weight; the
    logit's slope on those zeros is ∇A. Then equations 5 and 6 with loops."""
    model = sharp_model(pool=pool, embed_dim=6, num_heads=2, depth=2)
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    label, num_tokens = 3, 10
    zeros = torch.zeros(2, 2, num_tokens, num_tokens, dtype=torch.float64, requires_grad=True)
    x, attention = model.embed(image)[0], np.zeros(zeros.shape)
    for number, block in enumerate(model.blocks):
        query, key, value = block.attn.qkv(block.norm1(x)).split(6, -1)
        outs = []
        for h, part in enumerate((slice(0, 3), slice(3, 6))):
            weights = torch.softmax(
                query[:, part] @ key[:, part].T / 3**0.5 + block.attn.rel_pos(model.grid_size)[h], -1
            )
            attention[number, h] = weights.detach().numpy()
            outs.append((weights + zeros[number, h]) @ value[:, part])
        x = block.attn.proj(torch.cat(outs, -1), onto=x)
        x = block.mlp(block.norm2(x), onto=x)
    x = model.norm(x)
    model.head(x[0] if pool == "cls" else x[1:].mean(0))[label].backward()
    slopes = zeros.grad.numpy()
    expected = np.eye(num_tokens)
    for number in range(2):
        weighted = np.zeros((num_tokens, num_tokens))
        for h, i, j in itertools.product(range(2), range(num_tokens), range(num_tokens)):
            weighted[i, j] += max(0.0, slopes[number, h, i, j] * attention[number, h, i, j]) / 2
        expected = expected + weighted @ expected
    row = expected[0, 1:] if pool == "cls" else expected[1:, 1:].mean(0)
    found = explain(model, image, torch.tensor([label]))
    assert row.max() > 1e-3
    np.testing.assert_allclose(found.maps["relevance"][0].flatten().numpy(), row, atol=1e-10)
    other = explain(model, image, torch.tensor([0]))
    assert not torch.allclose(other.maps["relevance"], found.maps["relevance"])
    assert torch.equal(other.maps["rollout"], found.maps["rollout"])


def test_an_image_is_explained_alike_alone_and_in_company() -> None:
    model, images = sharp_model(), torch.randn(3, 1, 12, 12, dtype=torch.float64)
    together, alone = explain(model, images), explain(model, images[1:2])
    assert together.attention.shape == (3, 3, 3, 3, 3)
    torch.testing.assert_close(together.attention[:, 1:2], alone.attention)
    _, attention = model.trace(images)
    torch.testing.assert_close(together.attention, attention[..., 0, 1:].unflatten(-1, (3, 3)).detach())
    for method in METHODS:
        torch.testing.assert_close(together.maps[method][1:2], alone.maps[method])
    assert torch.equal(together.labels, model(images).argmax(1))
    assert all(p.grad is None for p in model.parameters())  # explaining leaves no gradient behind


# ── the model's anatomy ──────────────────────────────────────────────────────────────────────


def test_attention_distance_and_entropy_by_brute_force() -> None:
    model, images = sharp_model(), some_images(3)
    found = attention_reach(model, images, PLAIN)
    _, attention = model.trace((images.double() / 255 - 0.5) / 0.5)
    for layer, head in itertools.product(range(3), range(3)):
        distances, entropies = [], []
        for b, i in itertools.product(range(3), range(9)):
            row = attention[layer, b, head, i + 1].tolist()
            apart = [4 * math.dist(divmod(i, 3), divmod(j, 3)) for j in range(9)]
            distances.append(sum(w * d for w, d in zip(row[1:], apart, strict=True)) / sum(row[1:]))
            entropies.append(-sum(w * math.log2(w) for w in row))
        assert found.distance_px[layer, head].item() == pytest.approx(np.mean(distances), rel=1e-5)
        assert found.entropy_bits[layer, head].item() == pytest.approx(np.mean(entropies), rel=1e-5)
    everywhere = [4 * math.dist(divmod(i, 3), divmod(j, 3)) for i in range(9) for j in range(9)]
    assert found.uniform_distance_px == pytest.approx(np.mean(everywhere))
    assert found.uniform_entropy_bits == pytest.approx(math.log2(10))


def test_a_model_that_looks_everywhere_alike_has_the_uniform_reach() -> None:
    model = sharp_model(rel_pos="none")
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    found = attention_reach(model, some_images(), PLAIN)
    torch.testing.assert_close(found.distance_px, torch.full((3, 3), found.uniform_distance_px))
    torch.testing.assert_close(found.entropy_bits, torch.full((3, 3), found.uniform_entropy_bits))


def test_memory_bounds_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = sharp_model(), some_images(5)
    whole = attention_reach(model, images, PLAIN)
    monkeypatch.setattr(sys.modules["vitrail.explain"], "MAX_MAP_BYTES", 2 * 3 * 3 * 100 * 8)  # two images' maps
    assert [len(batch) for _, batch in map_batches(model, images, PLAIN)] == [2, 2, 1]
    torch.testing.assert_close(attention_reach(model, images, PLAIN).distance_px, whole.distance_px)


def test_filters_are_the_principal_components() -> None:
    model = sharp_model()
    found = patch_filters(model, 5)
    weight = model.patch_embed.proj.weight.detach()
    values, vectors = np.linalg.eigh(np.cov(weight.numpy().T))
    np.testing.assert_allclose(found.variance_share.numpy(), values[::-1][:5] / values.sum(), rtol=1e-5)
    for i, component in enumerate(found.components.flatten(1).numpy()):
        assert abs(component @ vectors[:, -1 - i]) == pytest.approx(1.0, abs=1e-5)
        assert component.max() == abs(component).max()
    assert patch_filters(model).components.shape == (12, 1, 4, 4)  # there are no more than 12 filters


def test_position_similarity_of_known_positions() -> None:
    """Sin-cos positions on a line are as alike as they are near; bias rows, by hand."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * torch.tensor([0.3, 0.7]) for place in (y, x)], dim=1)
    similar = position_similarity(torch.cat([angles.sin(), angles.cos()], dim=1))
    assert similar.shape == (4, 4, 4, 4)
    for r, c, i, j in itertools.product(range(4), repeat=4):
        expected = np.mean([np.cos(f * d) for f in (0.3, 0.7) for d in (r - i, c - j)])
        assert similar[r, c, i, j].item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(VitrailError, match="17 position vectors do not make a square"):
        position_similarity(torch.randn(17, 8))


def test_position_vectors_of_a_model_leave_the_prefix_out() -> None:
    model = sharp_model()
    vectors = position_vectors(model)
    assert torch.equal(vectors["embedding"], model.pos_embed[0, 1:].detach())
    block, head, i = 1, 2, 5
    row = model.blocks[block].attn.rel_pos(model.grid_size)[head, i + 1, 1:].detach()
    start = 9 * (3 * block + head)
    torch.testing.assert_close(vectors["bias"][i, start : start + 9], row.exp() / row.exp().sum())
    shares = relative_bias(model)
    assert shares.shape == (3, 3, 5, 5)
    torch.testing.assert_close(shares.sum((2, 3)), torch.ones_like(shares[..., 0, 0]))
    # patch 4 is the middle one, patch 1 lies above it
    bias = model.blocks[block].attn.rel_pos(model.grid_size)[head, 5].detach()
    assert (shares[block, head, 1, 2] / shares[block, head, 2, 2]).log().item() == pytest.approx(
        (bias[2] - bias[5]).item(), abs=1e-5
    )
    assert relative_bias(sharp_model(rel_pos="none")) is None
    assert set(position_vectors(sharp_model(rel_pos="none"))) == {"embedding"}


# ── timm ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_figures_of_a_timm_vit_are_those_of_ours(pool: str) -> None:
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=5, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2.0,
        global_pool=pool, fc_norm=False,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = VisionTransformer(
        ModelConfig(patch_size=4, embed_dim=12, depth=3, num_heads=3, pool="cls" if pool == "token" else "mean"),
        12, 1, 5,
    )  # fmt: skip
    state = dict(theirs.state_dict())
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(12, 16)
    ours.load_state_dict(state)
    taken, images = build_from_timm(theirs), some_images()
    normalised = (images / 255 - 0.5) / 0.5
    torch.testing.assert_close(explain(taken, normalised).logits, theirs(normalised).detach(), atol=1e-4, rtol=1e-4)
    one, two = explain(taken, normalised), explain(ours.eval(), normalised)
    assert torch.equal(one.attention, two.attention)
    assert all(torch.equal(one.maps[m], two.maps[m]) for m in METHODS)
    assert torch.equal(patch_filters(taken).components, patch_filters(ours).components)
    reach = [attention_reach(m, images, PLAIN) for m in (taken, ours)]
    assert torch.equal(reach[0].distance_px, reach[1].distance_px)
    # and the attention is timm's own, from its weights by its own layers
    x = theirs.norm_pre(theirs._pos_embed(theirs.patch_embed(normalised)))
    attn = theirs.blocks[0].attn
    query, key, _ = attn.qkv(theirs.blocks[0].norm1(x)).reshape(4, 10, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT * attn.scale).softmax(-1)[..., 0, 1:]
    if pool == "token":
        torch.testing.assert_close(one.attention[0].flatten(-2), weights.detach(), atol=1e-5, rtol=1e-5)


def test_a_timm_vit_we_cannot_show_is_refused() -> None:
    odd = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3, reg_tokens=2)
    with pytest.raises(VitrailError, match="reg_token"):
        build_from_timm(odd)
    with pytest.raises(VitrailError, match="Linear is not timm's VisionTransformer"):
        build_from_timm(nn.Linear(2, 2))


# ── planted evidence, and trust ──────────────────────────────────────────────────────────────


def planted(count: int, seed: int, num_kinds: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 noise [N, 1, 12, 12] with one patch marked by upright or by level stripes; its label and place.

    A third kind, label 2, has no mark: so that a mark hidden is an answer changed.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 1, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, num_kinds, (count,), generator=generator)
    places = torch.randint(0, 9, (count,), generator=generator)
    stripes = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).repeat(4, 1)
    for image, label, place in zip(images, labels.tolist(), places.tolist(), strict=True):
        y, x = (4 * p for p in divmod(place, 3))
        if label < 2:
            image[0, y : y + 4, x : x + 4] = stripes if label else stripes.T
    return images, labels, places


@pytest.fixture(scope="module")
def striped() -> VisionTransformer:
    """A ViT taught for some seconds to tell upright from level stripes from none, wherever they are."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on two, and differs with their number
    model = VisionTransformer(ModelConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2), 12, 1, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels, _ = planted(4096, 0, num_kinds=3)
    for epoch in range(4):
        for part in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model((images[part] / 255 - 0.5) / 0.5), labels[part]).backward()
            optimizer.step()
    torch.set_num_threads(before)
    return model.eval()


def test_the_maps_point_at_planted_evidence(striped: VisionTransformer) -> None:
    images, labels, places = planted(200, 1)
    found = explain(striped, (images / 255 - 0.5) / 0.5)
    assert (found.labels == labels).float().mean() > 0.97
    share = {}
    for method, maps in found.maps.items():
        flat = maps.flatten(1)
        share[method] = (flat / flat.sum(1, keepdim=True)).gather(1, places[:, None]).mean().item()
    random = 1 / 9
    assert share["relevance"] > 4 * random
    assert share["rollout"] > 4 * random
    assert share["attention"] > 4 * random


def test_trust_tells_right_maps_from_random_ones(striped: VisionTransformer) -> None:
    images, labels, _ = planted(100, 2)
    trust = measure_trust(striped, images, labels, PLAIN)
    for method in METHODS:
        assert trust.methods[method].beats_random, method
        for curve in (trust.methods[method].deletion, trust.methods[method].insertion):
            assert curve.area.low < curve.area.value < curve.area.high
    assert not trust.methods["random"].beats_random
    relevance = trust.methods["relevance"]
    assert relevance.deletion.accuracy[0] == relevance.insertion.accuracy[-1] > 0.97
    assert relevance.deletion.probability[0] == pytest.approx(relevance.insertion.probability[-1])
    assert relevance.insertion.accuracy[1] > 0.9  # one patch of nine shown, and it is the marked one
    # with everything hidden every image is the same, whatever the map
    assert relevance.deletion.probability[-1] == pytest.approx(trust.methods["random"].insertion.probability[0])
    area = np.trapezoid(relevance.deletion.probability, trust.shares)
    assert relevance.deletion.area.value == pytest.approx(area, abs=1e-5)


def test_a_map_of_nothing_is_no_better_than_random(striped: VisionTransformer) -> None:
    """Images without evidence: no order can be better, and trust says so."""
    images = torch.randint(0, 120, (100, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    blind = sharp_model(rel_pos="none").float()
    for block in blind.blocks:
        nn.init.zeros_(block.attn.proj.weight)  # the class token learns nothing from the patches
    trust = measure_trust(blind, images, torch.zeros(100, dtype=torch.int64), PLAIN)
    assert not any(method.beats_random for method in trust.methods.values())


def test_sensitivity_to_place(striped: VisionTransformer) -> None:
    images, labels, _ = planted(200, 3)
    bag = VisionTransformer(ModelConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2), 12, 1, 3).eval()
    bag.load_state_dict(striped.state_dict())
    nn.init.zeros_(bag.pos_embed)
    assert (
        measure_sensitivity(bag, images, labels, PLAIN).shuffled
        == measure_sensitivity(bag, images, labels, PLAIN).accuracy
    )
    found = measure_sensitivity(striped, images, labels, PLAIN)
    assert found.accuracy > 0.97
    # a move by one pixel swaps the stripes' dark and bright, no more: but it cuts patches
    assert 0 <= found.moved_changes <= 1
    by_hand = []
    for y, x in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        rows = torch.arange(12).add(y).clamp(0, 11)
        columns = torch.arange(12).add(x).clamp(0, 11)
        moved = images[:, :, rows][..., columns]
        by_hand.append(striped((moved / 255 - 0.5) / 0.5).argmax(1))
    assert found.moved == pytest.approx(torch.stack([(a == labels).float().mean() for a in by_hand]).mean().item())
    still = striped((images / 255 - 0.5) / 0.5).argmax(1)
    assert found.moved_changes == pytest.approx((torch.stack(by_hand) != still).any(0).float().mean().item())


def test_hiding_covers_exactly_the_patches_named() -> None:
    hidden = torch.zeros(1, 9, dtype=torch.bool)
    hidden[0, 5] = True  # row 1, column 2
    left = hide_patches(torch.ones(1, 2, 12, 12), hidden, 4)
    assert left[:, :, 4:8, 8:12].abs().max() == 0
    assert left.sum() == 2 * (144 - 16)


# ── what cannot be explained ─────────────────────────────────────────────────────────────────


def test_nan_weights_are_refused_by_name() -> None:
    model = sharp_model()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = math.nan
    for compute in (lambda: explain(model, torch.randn(1, 1, 12, 12)), lambda: patch_filters(model)):
        with pytest.raises(VitrailError, match=r"the weights blocks\.1\.attn\.qkv\.weight hold NaN"):
            compute()


def test_what_does_not_fit_is_told() -> None:
    model = sharp_model()
    with pytest.raises(VitrailError, match="images of 16×20 pixels, the model reads 12×12"):
        explain(model, torch.randn(1, 1, 20, 16))
    with pytest.raises(VitrailError, match=r"discard ratio is 1\.0"):
        explain(model, torch.randn(1, 1, 12, 12).double(), discard_ratio=1.0)
    with pytest.raises(VitrailError, match="Sequential has no attention to show"):
        explain(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(1, 1, 12, 12))


def test_a_picture_is_brought_to_the_models_size(trained: Run, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50), dtype=np.uint8))
    picture.save(tmp_path / "wide.png")
    found = explain_picture(trained, tmp_path / "wide.png", label="7")
    assert found.size == (50, 30)
    assert found.pixels.shape == (1, 8, 8)
    assert found.explanation.labels.tolist() == [7]
    assert found.explanation.attention.shape == (4, 1, 8, 4, 4)
    with pytest.raises(VitrailError, match="no class 'cat'; the model knows 0, 1, 2"):
        explain_picture(trained, picture, label="cat")
