"""The benchmark: same dimensions for all, fair turns, honest ratios, one object out."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from vitrail import bench
from vitrail.bench.calls import _list_products, build_call
from vitrail.bench.peers import MLP_DIM, MODEL, PEERS, RUNTIMES, Setup, is_installed
from vitrail.bench.session import Entry, Session, Stage, spread
from vitrail.bench.table import build_tables
from vitrail.bench.worker import Worker
from vitrail.cli import main
from vitrail.errors import VitrailError, ignore_events

OURS, THEIRS = Entry("train", Setup("vitrail"), 8), Entry("train", Setup("timm"), 8)


@pytest.mark.parametrize("name", list(PEERS))
def test_peers_have_our_dimensions(name: str) -> None:
    model = PEERS[name](True)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    vectors = ((10, MODEL.embed_dim), (65, MODEL.embed_dim), (1, MODEL.embed_dim))
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.shape not in vectors]
    width = MODEL.embed_dim
    blocks = MODEL.depth * (4 * width * width + 2 * width * MLP_DIM)
    patches = 3 * MODEL.patch_size**2 * width
    assert sum(p.numel() for p in matrices) in (blocks, blocks + patches)
    tokens = [p for p in model.parameters() if p.ndim == 3 or p.shape == (65, width)]
    assert any(p.shape[-2:] == (65, width) for p in tokens)


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_give_our_logits(name: str) -> None:
    theirs = build_call("infer", Setup(name), 3, threads=1)()
    logits = theirs[0]
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32)
    model = build_call.__globals__["_build_our_model"]()
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(pixels), rtol=0, atol=1e-4)


def test_the_limit_counts_every_product_of_a_step() -> None:
    """Six times the multiply-adds of the linear layers and of attention: forward, and twice that backward."""
    images, tokens, width = 2, 65, MODEL.embed_dim
    block = tokens * (4 * width * width + 2 * width * MLP_DIM) + 2 * tokens * tokens * width
    # The last block is made of the class token alone; each head is compared with whole tokens, and sees their mean.
    last = width * (4 * width + 2 * MLP_DIM) + 2 * MODEL.num_heads * tokens * width
    counted = sum(2 * a.shape[-1] * out.numel() for a, _, out in _list_products(images, torch.float32))
    assert counted == 6 * images * ((MODEL.depth - 1) * block + last)


@dataclass
class FakeWorker:
    """Answers with rates prepared for it and notes the turns."""

    name: str
    turns: list[str]
    rates: list[float]
    fails: bool = False
    built: set[str] = field(default_factory=set)

    def build(self, key: str, *_: object) -> None:
        if self.fails:
            raise VitrailError("RuntimeError: no")
        self.built.add(key)

    def time(self, key: str, seconds: float) -> float:
        assert key in self.built
        self.turns.append(self.name)
        return self.rates[self.turns.count(self.name) - 1]

    def drop(self, key: str) -> None:
        self.built.remove(key)


def fake_session(minutes: float = 1.0, fails: bool = False) -> tuple[Session, list[str]]:
    turns: list[str] = []
    workers = {
        "vitrail": FakeWorker("vitrail", turns, [10, 20, 30, 40, 50, 60, 70]),
        "timm": FakeWorker("timm", turns, [5, 10, 10, 10, 25, 30, 35], fails),
    }
    return Session(workers, minutes, ignore_events), turns  # type: ignore[arg-type]


def test_turns_alternate_and_ratios_pair_the_rounds() -> None:
    session, turns = fake_session()
    stage = Stage(OURS)
    stage.add(session.alternate([OURS, THEIRS, THEIRS], turn_s=0))
    assert turns == ["vitrail", "timm", "timm", "vitrail"] * 3 + ["vitrail", "timm"]
    assert stage.ratios == {THEIRS: [2, 2, 3, 4, 2, 2, 2]}
    assert stage.figures(THEIRS)["ratio"] == {"median": 2, "lowest": 2, "highest": 4, "rounds": 7}
    assert "ratio" not in stage.figures(OURS)


def test_the_fastest_is_the_one_we_lead_least() -> None:
    slow, fast = (Entry("train", Setup(name), 8) for name in ("torchvision", "timm"))
    stage = Stage(OURS)
    stage.add({OURS: [10.0, 10.0], slow: [2.0, 2.0]})
    stage.add({OURS: [20.0, 20.0], fast: [9.0, 11.0]})
    assert stage.fastest([slow, fast]) == fast
    assert spread(stage.rates[OURS]) == {"median": 15, "lowest": 10, "highest": 20, "rounds": 4}


def test_rounds_end_with_the_time_and_failures_are_named() -> None:
    session, turns = fake_session(minutes=1e-9, fails=True)
    assert session.alternate([OURS, THEIRS], turn_s=0) == {OURS: [10, 20]}
    assert turns == ["vitrail"] * 2
    assert session.left_out == ["timm, fp32, fused attention, train: RuntimeError: no"]
    assert session.screen([OURS, THEIRS], turn_s=0) == OURS


def test_what_was_tried_is_not_tried_again() -> None:
    session, turns = fake_session()
    small, middle = (Entry("train", Setup("timm"), size) for size in (8, 16))
    large = Entry("train", Setup("timm", "bf16"), 16)
    assert session.screen([small, middle], turn_s=0) == middle  # of 5 and 10
    assert session.screen([middle, small, large], turn_s=0) == middle  # of 10, 5 and 10
    assert turns == ["timm"] * 3


def test_a_worker_passes_errors_on_and_lives() -> None:
    with Worker(threads=1) as worker:
        with pytest.raises(VitrailError, match="KeyError: 'nobody'"):
            worker.build("a", "train", Setup("nobody"), 2)
        worker.build("b", "augment", Setup("vitrail"), 4)
        assert worker.time("b", 0.05) > 0
        assert worker.peak_memory_mb() > 50


def test_a_worker_that_dies_is_told_of() -> None:
    with Worker(threads=1) as worker:
        worker._process.kill()
        worker._process.join()
        with pytest.raises(VitrailError, match="ended in the middle of 'time'"):
            worker.time("a", 1)


def test_bench_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, with one peer, one that is missing, and no time for more than the fewest rounds."""
    monkeypatch.setattr(bench, "PEERS", {"torchvision": PEERS["torchvision"], "timm": PEERS["timm"]})
    monkeypatch.setattr(bench, "RUNTIMES", ())
    monkeypatch.setattr(bench, "TRAIN_BATCH_SIZES", (8,))
    monkeypatch.setattr(bench, "MEMORY_BATCH_SIZE", 8)
    monkeypatch.setattr(bench, "INFER_BATCH_SIZES", (1, 16))
    installed: Callable[[str], bool] = lambda name: name != "timm" and is_installed(name)  # noqa: E731
    monkeypatch.setattr(bench, "is_installed", installed)
    assert main(["bench", "--json", "--quiet", "--minutes", "0.01", "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    training = result["training"]
    assert training["ratio_readme"] > 0.2
    assert training["ratio_best"] > 0.2
    assert 0.05 < training["limit_share"] < 1.2
    assert 0 < training["data_share"] < 0.3
    assert result["inference_16"]["ratio_best"] > 0.2
    assert result["latency_1"]["time_ratio_best"] == pytest.approx(1 / result["inference_1"]["ratio_best"], rel=0.5)
    assert 0.5 < result["trace_over_forward"]["median"] < 2
    assert set(result["peak_memory_mb"]) == {"vitrail", "torchvision"}
    assert set(result["peers"]) == {"torchvision"}
    assert result["peers"]["torchvision"]["training"][0]["images_per_s"]["median"] > 1
    assert result["left_out"][0] == "timm: not installed; pip install 'vitrail[bench]'"
    assert result["left_out"][1].startswith("torchvision, compiled, in training, inference_1")


def test_bench_refuses_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--minutes", "0"]) == 2
    assert "minutes is 0.0; give a number above 0" in capsys.readouterr().err


def test_autocast_and_compile_are_described() -> None:
    assert str(Setup("timm", "bf16", compile=True, fused_attn=False)) == "bf16 autocast, plain attention, compiled"
    assert str(Setup("vitrail", "bf16")) == "bf16"
    assert isinstance(PEERS["timm"](False), nn.Module)


def test_tables_hold_what_was_measured() -> None:
    figures = {"setup": "fp32", "batch_size": 8, "images_per_s": spread([90.0]), "ratio": spread([1.234])}
    task = {"vitrail": figures, "ratio_readme_spread": spread([1.5, 2.0, 2.5]), "fastest_readme": "timm, fp32"}
    training = task | {"limit_images_per_s": spread([140.0]), "limit_share": 0.642, "data_share": 0.004}
    stages = {"training": training | {"ratio_readme": 2.0}, **dict.fromkeys(("inference_1", "inference_64"), task)}
    peers = {"timm": {"training": [figures]}}
    ours, everyone = build_tables(stages | {"trace_over_forward": spread([1.01]), "peers": peers})
    cells = [list(column.cells) for column in ours.columns]
    assert cells[0] == ["training", "training", "data and augmentation", "trace"]
    assert cells[3] == ["2.00×", "64%", "0.4%", "1.01×"]
    assert cells[4][0] == "1.50 to 2.50"
    assert [list(column.cells) for column in everyone.columns] == [
        ["timm"],
        ["fp32"],
        ["training"],
        ["8"],
        ["90"],
        ["1.23×"],
    ]
