"""The explain and report verbs, and the page as a reader's browser shows it."""

import json
import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from selenium.webdriver import Chrome
from torch import nn

from browser import open_browser, show
from conftest import COLOURS, colour_config, save_image
from vitrail.cli import main
from vitrail.config import ModelConfig
from vitrail.errors import VitrailError
from vitrail.explain import explain_picture
from vitrail.figures import mosaic, overlay, to_values
from vitrail.report import write_report
from vitrail.run import Run
from vitrail.train import train
from vitrail.words import LANGUAGES, Words

NASTY = '<script>alert("x")</script> & <b>co'


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50), dtype=np.uint8)).save(path)
    return path


# ── the words ────────────────────────────────────────────────────────────────────────────────


def test_every_language_has_every_key_with_the_same_fields() -> None:
    tables = {
        lang: tomllib.loads(files("vitrail.words").joinpath(f"{lang}.toml").read_text("utf-8")) for lang in LANGUAGES
    }
    english = Words("en")
    for lang in LANGUAGES:
        assert Words(lang).keys() == english.keys()
        for table, texts in tables[lang].items():
            for key, text in texts.items():
                assert text.strip(), f"{lang} {table}.{key}"
                fields, expected = (
                    {name for _, name, _, _ in string.Formatter().parse(t) if name}
                    for t in (text, tables["en"][table][key])
                )
                assert fields == expected, f"{lang} {table}.{key}"
                if lang == "ko" and table in ("page", "read") and key != "hit":
                    assert re.search("[가-힣]", text), f"{lang} {table}.{key} is not Korean"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(VitrailError, match="no language 'xx'; give one of en, ko"):
        Words("xx")


# ── explain ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--method", "rollout", "--fusion", "max", "--discard-ratio", "0.5"],
        ["--layer", "2"],
        ["--layer", "2", "--head", "3"],
    ],
)
def test_explain_draws_a_figure_and_saves_its_numbers(
    flags: list[str], trained: Run, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "fig.png"
    assert main(["explain", str(trained.folder), str(picture), "--out", str(out), *flags, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(out.with_suffix(".json").read_text())
    assert "50×30 pixels was brought to 8×8" in captured.err
    numbers = json.loads(captured.out)["explanation"]
    assert np.array(numbers["attention"]).shape == (4, 1, 8, 4, 4)
    assert set(numbers["maps"]) == {"attention", "rollout", "relevance"}
    drawn = np.asarray(Image.open(out).convert("RGB"))
    assert drawn.shape[0] > 300
    assert drawn.std() > 20


def test_explain_says_what_it_saw(
    trained: Run, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fig.png"
    assert main(["explain", str(trained.folder), str(picture), "--out", str(out), "--label", "3"]) == 0
    assert re.search(r"\d \d+\.\d%", capsys.readouterr().out)
    assert json.loads(out.with_suffix(".json").read_text())["explanation"]["labels"] == [3]


def poisoned(run: Run, folder: Path) -> Path:
    """A copy of a run with one NaN among its weights."""
    folder.mkdir()
    weights = load_file(run.weights)
    weights["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((run.folder / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "{run}", "{tmp}/text.png"], "cannot read the image {tmp}/text.png: not an image"),
        (["explain", "{run}", "{tmp}/none.png"], "cannot read the image"),
        (["explain", "{run}", "{picture}", "--layer", "5"], "no layer 5; this model's go from 1 to 4"),
        (["explain", "{run}", "{picture}", "--layer", "0"], "no layer 0; this model's go from 1 to 4"),
        (["explain", "{run}", "{picture}", "--layer", "1", "--head", "9"], "no head 9; this model's go from 1 to 8"),
        (["explain", "{run}", "{picture}", "--head", "2"], "--head 2 of which block? give --layer too"),
        (
            ["explain", "{run}", "{picture}", "--layer", "2", "--method", "rollout"],
            "leave it out with --method rollout",
        ),
        (["explain", "{run}", "{picture}", "--label", "cat"], "no class 'cat'; the model knows 0, 1, 2"),
        (["explain", "{run}", "{picture}", "--discard-ratio", "2"], "discard ratio is 2.0; give a share"),
        (["explain", "{nan}", "{picture}"], "the weights blocks.0.mlp.fc1.weight hold NaN"),
        (["explain", "{run}", "{picture}", "--out", "{tmp}/figure"], "give a picture's name ending in .png"),
        (["explain", "{tmp}", "{picture}"], "no model at"),
        (["report", "{nan}", "--quiet"], "the weights blocks.0.mlp.fc1.weight hold NaN"),
        (["report", "{run}", "--out", "{tmp}/page.pdf"], "give the name of a page ending in .html"),
        (["report", "{run}", "--data", "nowhere"], "no data source 'nowhere'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(  # noqa: PLR0917 - fixtures
    arguments: list[str], message: str, trained: Run, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    nan = poisoned(trained, tmp_path / "nan")
    before = sorted([*tmp_path.rglob("*"), *trained.folder.rglob("*")])
    places = {"run": trained.folder, "tmp": tmp_path, "picture": picture, "nan": nan}
    filled = [a.format(**places) for a in arguments]
    if arguments[0] == "explain" and "--out" not in arguments:
        filled += ["--out", str(tmp_path / "fig.png")]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message.format(**places) in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert sorted([*tmp_path.rglob("*"), *trained.folder.rglob("*")]) == before


def test_overlay_is_brightest_where_the_weight_is() -> None:
    weights = torch.tensor([[0.0, 0.1], [0.4, 0.2]])
    drawn = overlay(torch.full((1, 8, 8), 128, dtype=torch.uint8), weights).mean(2)
    patches = [drawn[:4, :4].mean(), drawn[:4, 4:].mean(), drawn[4:, :4].mean(), drawn[4:, 4:].mean()]
    assert np.argsort(patches).tolist() == [0, 1, 3, 2]
    assert drawn[:4, :4].std() < 1e-6
    joined = mosaic([[np.zeros((2, 2)), np.ones((2, 2))]], gap=1)
    assert joined.shape == (2, 5)
    assert np.isnan(joined[:, 2]).all()


def test_numbers_become_json() -> None:
    assert to_values({"a": torch.tensor([[1 / 3]]), "b": (1, None), "c": float("nan")}) == {
        "a": [[0.333333]],
        "b": [1, None],
        "c": None,
    }


# ── the page in a browser ────────────────────────────────────────────────────────────────────

CONTRAST = Path(__file__).with_name("contrast.js").read_text()
IMAGES = """return [...document.images].map(
    i => [i.alt, +i.getAttribute('width'), +i.getAttribute('height'), i.naturalWidth])"""
CHARTS = """return [...document.querySelectorAll('svg')].map(
    s => [s.getAttribute('aria-label'), s.getBoundingClientRect().width])"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def nasty_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on coloured images, one of whose classes has a name that tries to be HTML."""
    root = tmp_path_factory.mktemp("nasty")
    for i in range(12):
        for name, colour in zip((NASTY.replace("/", "∕"), "초록", "red"), COLOURS.values(), strict=True):
            save_image(root / "data" / name / f"{i}.png", colour, seed=i)
    return train(
        replace(colour_config(root / "data"), model=ModelConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2)),
        root / "run",
    )


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.report.findings.NUM_TRUST_IMAGES", 12)
    monkeypatch.setattr("vitrail.report.findings.NUM_REACH_IMAGES", 40)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_page_in_a_real_browser(lang: str, trained: Run, nasty_run: Run, browser: Chrome, tmp_path: Path) -> None:
    for run in (trained, nasty_run):
        page, numbers, _ = write_report(run, tmp_path / f"{run.folder.name}.html", lang=lang)
        assert page.stat().st_size < 5e6
        assert json.loads(numbers.read_text())["metrics"]["count"] > 0
        for width, scheme in ((1280, "light"), (390, "dark")):
            browser.get_log("performance")
            show(browser, page, width, scheme)
            assert browser.get_log("browser") == []
            messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
            asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
            assert page.resolve().as_uri() in asked
            assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            images = browser.execute_script(IMAGES)
            assert len(images) > 10
            assert all(alt.strip() and w > 0 and h > 0 and natural > 0 for alt, w, h, natural in images)
            charts = browser.execute_script(CHARTS)
            assert len(charts) > 12
            assert all(label.strip() and 200 < w <= width for label, w in charts)
            contrast = browser.execute_script(CONTRAST)
            assert len(contrast) > 100
            assert contrast[0][0] >= 4.5, contrast[:3]
    assert "∕script>" in browser.find_element("css selector", "body").text
    assert browser.execute_script("return [document.scripts.length, document.querySelectorAll('main b').length]") == [
        0,
        0,
    ]
    assert browser.execute_script("return document.documentElement.lang") == lang


def test_the_contrast_check_sees_faint_text(browser: Chrome, tmp_path: Path) -> None:
    page = tmp_path / "faint.html"
    page.write_text("<!doctype html><link rel=icon href=data:,><body><p style='color:#999'>faint</p><p>plain</p>")
    show(browser, page, 390, "light")
    contrast = browser.execute_script(CONTRAST)
    assert contrast[0][1] == "faint"
    assert contrast[0][0] == pytest.approx(2.85, abs=0.02)
    assert contrast[1][0] == pytest.approx(21, abs=0.01)


def test_a_model_without_attention_gets_all_the_rest(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(images).relu().mean((2, 3)))

    monkeypatch.setattr(Run, "load_model", lambda _: ResNet().eval())
    page, numbers, _ = write_report(trained, tmp_path / "resnet.html")
    text = page.read_text()
    assert "ResNet has no attention, so what shows it is left out here" in text
    assert Words()("figure_names.confusion") in text
    assert Words()("figure_names.distance") not in text
    assert json.loads(numbers.read_text())["sight"] is None
    with pytest.raises(VitrailError, match="ResNet has no attention to show; evaluate and predict take it, and report"):
        explain_picture(trained, Image.new("L", (8, 8)))


def test_report_by_command(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    assert (
        main(["report", str(trained.folder), "--out", str(out), "--split", "val", "--lang", "ko", "--json", "--quiet"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert told["count"] == trained.config.num_val
    text = out.read_text()
    assert '<html lang="ko">' in text
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["metrics"]["accuracy"] == pytest.approx(told["accuracy"], abs=1e-6)
    # the sentences are this model's: its own numbers stand in them
    distances = np.array(found["sight"]["reach"]["distance_px"])
    block, head = np.unravel_index(distances.argmin(), distances.shape)
    assert f"블록 {block + 1}의 헤드 {head + 1}({distances.min():.1f}픽셀" in text
    area = max(m["deletion"]["gain"]["value"] for m in found["sight"]["trust"]["methods"].values())
    assert area >= 0
