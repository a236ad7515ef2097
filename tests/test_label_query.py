"""Label queries: the head and its maps against equations, planted evidence, and the whole way by command."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from conftest import make_config
from test_explain import PLAIN, sharp_model, some_images
from test_resume import same_bytes, stop_at
from vitrail.cli import main
from vitrail.config import ModelConfig, RunConfig
from vitrail.errors import Interrupted, VitrailError
from vitrail.explain import explain, map_batches
from vitrail.label_query import LabelQuery
from vitrail.optim import split_parameters
from vitrail.presets import get_preset
from vitrail.report import write_report
from vitrail.run import Run
from vitrail.train import resume, train
from vitrail.vit import VisionTransformer


def query_config(**changes: object) -> RunConfig:
    return make_config(model=replace(get_preset("tiny").model, head="label-query"), **changes)


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A digits model with label queries, trained for a few steps."""
    return train(query_config(), tmp_path_factory.mktemp("run") / "queried")


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return path


def sharp_head() -> tuple[LabelQuery, Tensor]:
    """A head of five labels in float64 with large weights, and patches for it [2, 9, 12]."""
    torch.manual_seed(0)
    head = LabelQuery(ModelConfig(embed_dim=12, num_heads=3, head="label-query"), 5).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.4)
    return head, torch.randn(2, 9, 12, dtype=torch.float64)


# ── the head ─────────────────────────────────────────────────────────────────────────────────


def test_the_head_agrees_with_torchs_own_attention() -> None:
    head, patches = sharp_head()
    logits, looks = head(patches)
    queries = head.queries[:, None].expand(-1, 2, -1)  # torch wants [K, B, D]
    attended, weights = F.multi_head_attention_forward(
        queries, patches.transpose(0, 1), patches.transpose(0, 1), 12, 3,
        torch.cat([head.q.weight, head.kv.weight]), torch.cat([head.q.bias, head.kv.bias]), None, None, False, 0.0,
        head.proj.weight, head.proj.bias, average_attn_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(looks, weights.transpose(1, 2))
    torch.testing.assert_close(looks.sum(-1), torch.ones(2, 5, 3, dtype=torch.float64))
    for b, k in itertools.product(range(2), range(5)):
        x = (head.queries[k] + attended[k, b]).detach().numpy()
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-6) * head.norm.weight.detach().numpy()
        x = x + head.norm.bias.detach().numpy()
        expected = x @ head.classes.weight[k].detach().numpy() + head.classes.bias[k].item()
        assert logits[b, k].item() == pytest.approx(expected, abs=1e-12)


def test_a_logit_rests_on_its_own_query_alone() -> None:
    head, patches = sharp_head()
    logits, looks = head(patches)
    with torch.no_grad():
        head.queries[3] += 1
    changed, other_looks = head(patches)
    assert (changed != logits).any(0).tolist() == [False, False, False, True, False]
    assert (other_looks != looks).any(-1).any(-1).any(0).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("init", ["paper", "zero_residual"])
def test_it_begins_undecided_and_learns_at_once(init: str) -> None:
    """Small logits, a look everywhere alike, and after one step a gradient everywhere."""
    torch.manual_seed(0)
    model = VisionTransformer(ModelConfig(embed_dim=64, depth=2, head="label-query", init=init), 16, 3, 10)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    logits, _, looks = model.trace_labels(images)
    assert torch.equal(model(images), logits)
    assert logits.abs().max() < 0.7
    assert (looks * 16 - 1).abs().max() < 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "patch_embed", "norm")):
            assert parameter.grad.abs().max() > 1e-9 or name == "head.kv.bias", name


def test_it_looks_at_patches_alone_whatever_the_pool() -> None:
    model, tokens = sharp_model(head="label-query"), torch.randn(2, 10, 12, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 0] += 1  # the class token
    assert torch.equal(model.classify(tokens), model.classify(changed))
    assert model.read(tokens)[1].shape == (2, 5, 3, 9)
    assert torch.equal(sharp_model(head="label-query", pool="mean").classify(tokens), model.classify(tokens))
    assert sharp_model().read(tokens)[1] is None


def test_no_part_of_it_is_muons_and_the_queries_do_not_decay() -> None:
    model = sharp_model(head="label-query")
    names = {id(p): n for n, p in model.named_parameters()}
    hidden, matrices, rest = ({names[id(p)] for p in part} for part in split_parameters(model))
    assert not any(name.startswith("head") for name in hidden)
    assert {"head.q.weight", "head.kv.weight", "head.proj.weight", "head.classes.weight"} <= matrices
    assert {"head.queries", "head.norm.weight", "head.classes.bias"} <= rest


# ── its maps ─────────────────────────────────────────────────────────────────────────────────


def traced_by_hand(model: VisionTransformer, image: Tensor, label: int) -> tuple[list[np.ndarray], ...]:
    """Attention and the label's slope on it, of each block [H, T, T] and of the label's look [H, N]: the forward
    pass written again head by head, with a zero added to every weight, whose gradient is the slope."""
    zeros, attention = list[Tensor](), list[Tensor]()

    def weigh(similarity: Tensor) -> Tensor:
        attention.append(torch.softmax(similarity, -1))
        zeros.append(torch.zeros_like(similarity, requires_grad=True))
        return attention[-1] + zeros[-1]

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float) -> Tensor:
        query, key, value = (x.reshape(len(x), 2, 3).transpose(0, 1) for x in (query, key, value))
        heads = weigh(torch.einsum("hid,hjd->hij", query, key) / 3**0.5 + bias)
        return torch.einsum("hij,hjd->ihd", heads, value).flatten(1)

    x = model.embed(image)[0]
    for block in model.blocks:
        parts = block.attn.qkv(block.norm1(x)).split(6, -1)
        x = block.attn.proj(attend(*parts, block.attn.rel_pos(model.grid_size)), onto=x)
        x = block.mlp(block.norm2(x), onto=x)
    head, patches = model.head, model.norm(x)[1:]
    query = head.queries[label : label + 1]
    found = query + head.proj(attend(head.q(query), *head.kv(patches).split(6, -1), 0.0))
    (head.norm(found)[0] @ head.classes.weight[label]).backward()
    return [a.detach().numpy() for a in attention], [z.grad.numpy() for z in zeros]


def test_every_map_agrees_with_the_equations() -> None:
    """Chefer et al. 2021, equations 5, 6 and 8 to 10, and Abnar & Zuidema's rollout, in loops."""
    model = sharp_model(head="label-query", embed_dim=6, num_heads=2, depth=2)
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = explain(model, image, torch.tensor([3]))
    (*blocks, looks), (*slopes, look_slopes) = traced_by_hand(model, image, 3)
    look = looks.mean(0)[0]
    rolled, relevant = np.eye(10), np.eye(10)
    for weights, slope in zip(blocks, slopes, strict=True):
        rolled = (0.5 * weights.mean(0) + 0.5 * np.eye(10)) @ rolled
        relevant = relevant + np.maximum(0, slope * weights).mean(0) @ relevant
    levelled = np.eye(10)
    for i, j in itertools.product(range(10), repeat=2):
        levelled[i, j] += (relevant - np.eye(10))[i, j] / (relevant - np.eye(10))[i].sum()
    speaks = np.maximum(0, look_slopes * looks).mean(0)[0]
    expected = {
        "evidence": look,
        "attention": sum(look[n] * blocks[-1].mean(0)[n + 1, 1:] for n in range(9)),
        "rollout": sum(look[n] * rolled[n + 1, 1:] for n in range(9)),
        "relevance": sum(speaks[n] * levelled[n + 1, 1:] for n in range(9)),
    }
    assert set(found.maps) == set(expected)
    for method, row in expected.items():
        assert row.max() > 1e-3
        np.testing.assert_allclose(found.maps[method][0].flatten().numpy(), row, atol=1e-10, err_msg=method)
    for block, head in itertools.product(range(2), range(2)):
        row = look @ blocks[block][head, 1:, 1:]
        np.testing.assert_allclose(found.attention[block, 0, head].flatten().numpy(), row, atol=1e-10)


def test_each_label_has_its_map_in_company_too() -> None:
    model, images = sharp_model(head="label-query"), torch.randn(3, 1, 12, 12, dtype=torch.float64)
    together = explain(model, images, torch.tensor([4, 0, 2]))
    assert together.evidence.shape == (3, 5, 3, 3)
    torch.testing.assert_close(together.evidence.sum((2, 3)), torch.ones(3, 5, dtype=torch.float64))
    for i, label in enumerate([4, 0, 2]):
        alone = explain(model, images[i : i + 1], torch.tensor([label]))
        assert torch.equal(together.maps["evidence"][i], together.evidence[i, label])
        for method in together.maps:
            torch.testing.assert_close(together.maps[method][i : i + 1], alone.maps[method])
    order = together.logits[0].argsort(descending=True).tolist()
    assert together.rivals() == (4, next(k for k in order if k != 4))
    assert explain(model, images[:1]).rivals() == tuple(order[:2])
    assert "evidence" not in explain(sharp_model(), images).maps
    assert all(p.grad is None for p in model.parameters())


def test_the_labels_looks_count_against_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(head="label-query")
    one = 3 * (3 * 10 * 10 + 5 * 10) * 8  # heads, three blocks' maps and five labels' looks, bytes
    for limit, sizes in ((2 * one, [2, 2, 1]), (2 * one - 1, [1] * 5)):
        monkeypatch.setattr(sys.modules["vitrail.explain"], "MAX_MAP_BYTES", limit)
        assert [len(batch) for _, batch in map_batches(model, some_images(5), PLAIN)] == sizes


STRIPES = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat(4, 1)
MARKS = torch.stack([STRIPES, STRIPES.T, STRIPES * STRIPES.T, 2 * torch.eye(4) - 1])


def marked(count: int, num_marks: int, num_kinds: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [N, 1, 12, 12] in -1..0 with some marks, all of other kinds and in other patches: images, the kinds
    and the patches [N, marks]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 12, 12, generator=generator) - 1
    labels = torch.rand(count, num_kinds, generator=generator).argsort(1)[:, :num_marks]
    places = torch.rand(count, 9, generator=generator).argsort(1)[:, :num_marks]
    for n, k in itertools.product(range(count), range(num_marks)):
        y, x = (4 * p for p in divmod(int(places[n, k]), 3))
        images[n, 0, y : y + 4, x : x + 4] = MARKS[labels[n, k]]
    return images, labels, places


def share_of(maps: Tensor, places: Tensor) -> Tensor:
    """The mean share of maps [N, G, G] that lies in the patches [N]."""
    flat = maps.flatten(1)
    return (flat / flat.sum(1, keepdim=True)).gather(1, places[:, None]).mean()


@torch.no_grad()
def test_evidence_lies_where_a_query_was_made_to_look() -> None:
    """By construction: channel k of a token tells of mark k, and query k asks for channel k."""
    model = VisionTransformer(ModelConfig(embed_dim=16, depth=1, num_heads=1, head="label-query"), 12, 1, 2).eval()
    for parameter in (*model.blocks.parameters(), model.pos_embed, *model.head.parameters()):
        nn.init.zeros_(parameter)
    model.patch_embed.proj.weight.zero_()[:2] = MARKS[:2].flatten(1)
    model.patch_embed.proj.bias[2] = 8.0  # beside which noise stays small when tokens are normalised
    nn.init.eye_(model.head.q.weight)
    nn.init.eye_(model.head.kv.weight)  # its upper half makes the keys
    model.head.queries.copy_(20 * torch.eye(2, 16))
    images, labels, places = marked(50, 2, 2, seed=1)
    found = explain(model, images, labels[:, 0])
    assert share_of(found.maps["evidence"], places[:, 0]) > 0.95
    rivals = found.evidence[torch.arange(50), labels[:, 1]]
    assert share_of(rivals, places[:, 1]) > 0.95


def test_relevance_tells_two_labels_in_one_picture_apart() -> None:
    """Taught on pictures of one mark, asked about pictures of two: each label's relevance lies on its own."""
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, depth=1, num_heads=2, head="label-query", init="zero_residual")
    model = VisionTransformer(config, 12, 1, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels, _ = marked(4096, 1, 4, seed=0)
    for epoch in range(4):
        for part in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part, 0]).backward()
            optimizer.step()
    images, labels, places = marked(200, 2, 4, seed=1)
    for mine, other in ((0, 1), (1, 0)):
        maps = explain(model, images, labels[:, mine]).maps["relevance"]
        assert share_of(maps, places[:, mine]) > 3 / 9
        assert share_of(maps, places[:, mine]) > 2 * share_of(maps, places[:, other])


# ── the whole way ────────────────────────────────────────────────────────────────────────────


def test_train_evaluate_explain_by_command(digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "figure.png"
    assert main(["train", "tiny", "--model.head", "label-query", "--budget", "0.2epochs", "--out", run, "--quiet"]) == 0
    assert main(["evaluate", run, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["explain", run, str(digit), "--label", "7", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["explanation"]
    assert told["labels"] == [7]
    assert np.array(told["evidence"]).shape == (1, 10, 4, 4)
    assert told["maps"]["evidence"][0] == told["evidence"][0][7]
    whole = Image.open(out).size
    assert main(["explain", run, str(digit), "--method", "evidence", "--out", str(out)]) == 0
    assert Image.open(out).size != whole


def test_the_figure_shows_the_label_and_its_rival(
    queried: Run, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figure.svg"
    for flags in ([], ["--label", "7"]):
        assert main(["explain", str(queried.folder), str(digit), "--out", str(out), "--json", *flags]) == 0
        shares = torch.tensor(json.loads(capsys.readouterr().out)["explanation"]["logits"][0]).softmax(0)
        first, second = shares.argsort(descending=True)[:2].tolist()
        shown = (7, second if first == 7 else first) if flags else (first, second)
        titles = [f"where the query of {k} looks, {shares[k]:.0%}" for k in shown]
        svg = out.read_text()
        assert svg.count("where the query of") == 2 + svg.count("<!-- where the query of")
        assert all(title in svg for title in titles)
        assert svg.index(titles[0]) < svg.index(titles[1])


def test_evidence_is_refused_where_there_is_none(
    trained: Run, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figure.png"
    assert main(["explain", str(trained.folder), str(digit), "--method", "evidence", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "only one trained with --model.head label-query" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_report_tells_of_the_queries(queried: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.report.findings.NUM_TRUST_IMAGES", 12)
    monkeypatch.setattr("vitrail.report.findings.NUM_REACH_IMAGES", 40)
    page, numbers, _ = write_report(queried, tmp_path / "page.html", split="val")
    html = page.read_text()
    for told in ("Each class has a query", "Four ways to ask", "where a class&#x27;s own query looked", ">evidence<"):
        assert told in html
    assert "class token" not in html
    assert "evidence" in json.loads(numbers.read_text())["sight"]["trust"]["methods"]


def test_resume_is_exact_with_label_queries(queried: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(query_config(), tmp_path / "run", stop_at(3))
    assert same_bytes(resume(tmp_path / "run"), queried)
    assert "head.queries" in queried.load_model().state_dict()


def test_weights_of_another_head_are_refused(queried: Run, trained: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((queried.folder / "config.json").read_text())
    mixed = Run(tmp_path, queried.config, tmp_path / "model.safetensors")
    mixed.weights.write_bytes(trained.weights.read_bytes())
    with pytest.raises(VitrailError, match=r"does not fit its config\.json: head\.bias is \[10\] there, nothing by"):
        mixed.load_model()
