"""Findings as one HTML page: no script, nothing fetched, every word from the catalogue and every name escaped."""

import base64
import html
import io
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from vitrail import figures
from vitrail.errors import printable
from vitrail.figures import BLUE, ORANGE, Array, cut, overlay, to_picture, to_svg
from vitrail.report import charts, sentences
from vitrail.report.findings import Case, Findings, Sight
from vitrail.words import Words

PICTURE_PX = 128
MAX_TABLE_CLASSES = 20
MAX_SHOWN_CLASSES = 200


def esc(text: str) -> str:
    """Text as it may stand in a page."""
    return html.escape(printable(text))


def write_page(found: Findings, words: Words, numbers: str) -> str:
    """The whole page; `numbers` is the name of the file beside it that holds the findings."""
    sight = found.sight
    title = esc(words("page.title" if sight else "page.title_plain", name=found.name))
    parts = [_head(found, words, title)]
    if sight:
        parts.append(_section(words("page.how"), _how(found, sight, words)))
    if found.history:
        parts.append(_section(words("page.learning"), _cards(_learning(found, words))))
    parts.append(_section(words("page.results"), _cards(_results(found, words))))
    parts.append(_section(words("page.mistakes"), _mistakes(found, words)))
    if sight:
        parts.append(_section(words("page.inside"), _cards(_inside(found, sight, words))))
        parts.append(_section(words("page.trust"), _trust(found, sight, words)))
    else:
        parts.append(_section(words("page.inside"), f"<p>{esc(words('page.no_attention', kind=found.kind))}</p>"))
    parts.append(_section(words("page.environment"), _environment(found, words)))
    style = files("vitrail.report").joinpath("style.css").read_text("utf-8")
    return (
        f'<!doctype html>\n<html lang="{words.lang}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(parts)
        + f"\n</main>\n<footer>{esc(words('page.footer', numbers=numbers))}</footer>\n</body>\n</html>\n"
    )


def _head(found: Findings, words: Words, title: str) -> str:
    metrics, config = found.metrics, found.config
    lede = words(
        "page.lede",
        parameters=found.num_parameters,
        num_train=config["num_train"],
        num_classes=len(config["classes"]),
        data=config["data"],
        accuracy=metrics.accuracy,
        count=metrics.count,
        split=found.split,
    )
    interval = words("page.interval", low=metrics.accuracy_low, high=metrics.accuracy_high)
    tiles = [
        (f"{metrics.accuracy:.1%}", words("page.accuracy"), interval),
        (f"{metrics.ece:.3f}", words("page.calibration"), ""),
        (f"{found.num_parameters / 1e6:.2f} M", words("page.weights"), ""),
    ]
    if found.history:
        last = found.history[-1]
        tiles.insert(2, (words("page.minutes", minutes=last["elapsed_s"] / 60), words("page.time"), ""))
        tiles.insert(3, (f"{last['epoch']:.1f}", words("page.passes"), ""))
    shown = "".join(
        f"<div><strong>{esc(value)}</strong><span>{esc(name)}</span><small>{esc(note)}</small></div>"
        for value, name, note in tiles
    )
    command = found.environment.get("command", [])
    made = f"<p>{esc(words('page.command'))}</p><pre><code>{esc(shlex.join(command))}</code></pre>" if command else ""
    return f'<header><h1>{title}</h1><p>{esc(lede)}</p><div class="tiles">{shown}</div>{made}</header>'


def _how(found: Findings, sight: Sight, words: Words) -> str:
    model, side = found.config["model"], found.config["preprocessing"]["image_size"]
    case = found.example
    patches = (side // sight.patch_size) ** 2
    steps = (
        words("page.how_cut", side=side, patches=patches, patch=sight.patch_size),
        words("page.how_embed", width=model["embed_dim"]),
        words("page.how_attend", blocks=model["depth"], heads=model["num_heads"]),
        words(f"page.how_{_reader(found)}"),
    )
    listed = "".join(f"<li>{_lead(step)}</li>" for step in steps)
    pictures = _image(to_picture(case.pixels), words("page.picture_alt", label=case.true, split=found.split))
    pictures += _image(cut(case.pixels, sight.patch_size), words("page.cut_alt", patches=patches))
    return f'<div class="how"><div class="pair">{pictures}</div><ol>{listed}</ol></div>'


def _reader(found: Findings) -> str:
    """What the answer is read by: a "query" for each class, or else the "cls" token or the "mean" of the patches."""
    model = found.config["model"]
    return "query" if model["head"] == "label-query" else model["pool"]


def _lead(step: str) -> str:
    """A step with its first word or words, up to the full stop, in bold."""
    first, rest = step.split(". ", 1)
    return f"<strong>{esc(first)}.</strong> {esc(rest)}"


def _learning(found: Findings, words: Words) -> Iterable[str]:
    rows, told = found.history, sentences.of_history(found, words)
    passes = [row["epoch"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    lines = {
        "loss": {
            words("figure_names.train"): (column("train_loss"), ORANGE),
            words("figure_names.val"): (column("val_loss"), BLUE),
        },
        "accuracy": {"": (column("val_accuracy"), BLUE)},
        "lr": {"": (column("lr"), BLUE)},
        "throughput": {"": (column("images_per_s"), BLUE)},
    }
    units = {"loss": "nats", "accuracy": "accuracy", "lr": "lr", "throughput": "images_per_s"}
    for name, shown in lines.items():
        labels = (words("figure_names.passes"), words(f"figure_names.{units[name]}"))
        figure = charts.draw_lines(passes, shown, labels, percent="y" if name == "accuracy" else "")
        yield _card(name, figure, told[name], words)


def _results(found: Findings, words: Words) -> Iterable[str]:
    told = sentences.of_results(found, words)
    yield _card("reliability", charts.draw_reliability(found.reliability, words), told["reliability"], words)
    if len(found.metrics.per_class) <= MAX_TABLE_CLASSES:
        yield _card("confusion", _confusion(found, words), told["confusion"], words)
    yield _card("classes", _classes(found, words), told["classes"], words)


def _confusion(found: Findings, words: Words) -> str:
    names = list(found.metrics.per_class)
    head = "<tr><th></th>" + "".join(f'<th scope="col"><span>{esc(name)}</span></th>' for name in names) + "</tr>"
    body = ""
    for name, row in zip(names, found.metrics.confusion, strict=True):
        cells = "".join(f'<td style="--share:{45 * count / max(1, sum(row)):.0f}%">{count or ""}</td>' for count in row)
        body += f'<tr><th scope="row">{esc(name)}</th>{cells}</tr>'
    caption = f"<caption>{esc(words('page.true_class'))}</caption>"
    return f'<div class="scroll"><table class="confusion">{caption}{head}{body}</table></div>'


def _classes(found: Findings, words: Words) -> str:
    """Each class's accuracy and commonest mistake; the hardest ones alone where there are very many."""
    metrics, names = found.metrics, list(found.metrics.per_class)
    rows: list[tuple[float, Sequence[str]]] = []
    for i, (name, accuracy) in enumerate(metrics.per_class.items()):
        counts = metrics.confusion[i]
        wrong, other = max((count, -j) for j, count in enumerate(counts) if j != i)
        taken = f"{names[-other]} ({wrong})" if wrong else "–"
        shown = "–" if accuracy is None else f"{accuracy:.1%}"
        rows.append((2.0 if accuracy is None else accuracy, (name, shown, str(sum(counts)), taken)))
    if len(rows) > MAX_SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: row[0])[:MAX_SHOWN_CLASSES]
    return _table([words(f"page.{key}") for key in ("class", "correct", "images", "taken_for")], [r for _, r in rows])


def _mistakes(found: Findings, words: Words) -> str:
    body = f"<p>{esc(words('page.mistakes_intro' if found.sight else 'page.mistakes_plain'))}</p>"
    for title, cases, form in (("worst", found.mistakes, "mistake"), ("unsure", found.unsure, "hit")):
        body += f"<h3>{esc(words(f'page.{title}'))}</h3>"
        shown = "".join(_case(case, form, words) for case in cases)
        body += f'<div class="cases">{shown}</div>' if cases else f"<p>{esc(words('page.none'))}</p>"
    return body


def _case(case: Case, form: str, words: Words) -> str:
    caption = words(f"page.{form}", true=case.true, called=case.called, probability=case.probability)
    pictures = _image(to_picture(case.pixels), words("page.case_alt", caption=caption))
    if case.picture is not None:
        weights = case.picture.explanation.maps["relevance"][0]
        pictures += _image(overlay(case.pixels, weights), words("page.map_alt", caption=caption))
    return f'<figure><div class="pair">{pictures}</div><figcaption>{esc(caption)}</figcaption></figure>'


def _inside(found: Findings, sight: Sight, words: Words) -> Iterable[str]:
    told = sentences.of_sight(found, sight, words)
    yield _card("filters", charts.draw_filters(sight.filters), told["filters"], words)
    for kind, similarity in sight.similarity.items():
        name = "bias_similarity" if kind == "bias" else kind
        yield _card(name, charts.draw_similarity(similarity, words), told[name], words)
    if sight.bias is not None:
        yield _card("bias", charts.draw_bias(sight.bias, words), told["bias"], words)
    for kind in ("distance", "entropy"):
        yield _card(kind, charts.draw_reach(sight.reach, kind, words), told[kind], words)
    assert found.example.picture is not None
    name = "maps_query" if _reader(found) == "query" else "maps"
    yield _card(name, figures.draw_methods(found.example.picture, words), told["maps"], words)
    read = {"cls": "heads", "mean": "heads_mean", "query": "heads_query"}[_reader(found)]
    yield _card("heads", figures.draw_heads(found.example.picture, words), told["heads"], words, read=read)


def _trust(found: Findings, sight: Sight, words: Words) -> str:
    told, trust = sentences.of_sight(found, sight, words), sight.trust
    rows: list[Sequence[str]] = []
    for name, method in trust.methods.items():
        if name == "random":
            continue
        gains = [
            f"{g.value:+.3f} ({g.low:+.3f} – {g.high:+.3f})" for g in (method.deletion.gain, method.insertion.gain)
        ]
        verdict = words("page.better" if method.beats_random else "page.no_better")
        rows.append((words(f"maps.short_{name}"), *gains, verdict))
    titles = [words(f"page.{key}") for key in ("method", "deletion_gain", "insertion_gain", "verdict")]
    cards = [
        _card(test, charts.draw_trust(trust, test, words), told[test], words) for test in ("deletion", "insertion")
    ]
    cards.append(_card("hidden", charts.draw_hidden(trust, words), told["hidden"], words))
    cards.append(_card("sensitivity", charts.draw_sensitivity(sight.sensitivity, words), told["sensitivity"], words))
    intro = words("page.trust_intro", count=trust.num_images, split=found.split)
    return f"<p>{esc(intro)}</p>{_table(titles, rows)}{_cards(cards)}"


def _environment(found: Findings, words: Words) -> str:
    config = {key: value for key, value in found.config.items() if key not in ("classes", "data_sha256")}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    made = {key: value for key, value in found.environment.items() if key != "command"}
    shown = (f"<div><dt>{esc(key)}</dt><dd>{esc(_short(value))}</dd></div>" for key, value in (made | flat).items())
    return f'<dl class="settings">{"".join(shown)}</dl>'


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ── pieces of HTML ───────────────────────────────────────────────────────────────────────────


def _section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def _cards(cards: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, content: Figure | str, here: str, words: Words, read: str | None = None) -> str:
    """A figure or a table under its name, with how to read it and what this model shows."""
    title, how = words(f"figure_names.{name}"), words(f"read.{read or name}")
    if isinstance(content, Figure):
        content = to_svg(content).replace("<svg", f'<svg role="img" aria-label="{esc(f"{title}. {here}")}"', 1)
    return (
        f'<article id="{name}"><h3>{esc(title)}</h3>{content}<p>{esc(how)}</p><p class="here">{esc(here)}</p></article>'
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], wrap: Callable[[int, str], str]) -> str:
        return "<tr>" + "".join(wrap(i, esc(cell)) for i, cell in enumerate(cells)) + "</tr>"

    head = line(titles, lambda _, cell: f'<th scope="col">{cell}</th>')
    body = "".join(line(r, lambda i, cell: f"<td>{cell}</td>" if i else f'<th scope="row">{cell}</th>') for r in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _image(picture: Array, alt: str) -> str:
    """RGB [S, S, 3], uint8 or 0..1, as an image inside the page, enlarged by the browser without smoothing."""
    values = picture if picture.dtype.kind == "u" else (255 * picture).round().astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{esc(alt)}" width="{PICTURE_PX}" height="{PICTURE_PX}">'
