"""A comparison's results on disk: `results.json`, the means as a table in CSV and in Markdown, and the picture."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vitrail.checkpoint import write_text
from vitrail.compare.charts import draw_results
from vitrail.compare.questions import Question, get_question
from vitrail.compare.summary import label, say_place
from vitrail.errors import VitrailError


def save_results(results: dict[str, Any], out: Path) -> None:
    """Write `results.json` and the tables, and once nothing is left to do `plot.png` too.

    Raises:
        VitrailError: if they cannot be written.
    """
    question, summary = get_question(results["question"]), results["summary"]
    try:
        write_text(out / "results.json", json.dumps(results, indent=1))
        write_text(out / "table.csv", write_csv(summary["means"]))
        write_text(out / "table.md", write_markdown(question, summary))
        if not results["to_do"]:
            draw_results(results).savefig(out / "plot.png")
    except OSError as error:
        raise VitrailError(f"cannot write to {out}: {error.strerror}; give another --out") from error


def write_csv(means: list[dict[str, Any]]) -> str:
    """The means, a row for each arm and place; accuracies as shares."""
    text = io.StringIO()
    if means:
        writer = csv.DictWriter(text, list(means[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(means)
    return text.getvalue()


def write_markdown(question: Question, summary: dict[str, Any]) -> str:
    """The means as a table, and below it what was found."""
    lines = [
        f"## {question.title}",
        "",
        "| arm | at | seeds | test accuracy, % (95% interval) | seconds | PFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for mean in summary["means"]:
        accuracy = f"{100 * mean['test_accuracy']:.1f}"
        if mean["low"] is not None:
            accuracy += f" ({100 * mean['low']:.1f}–{100 * mean['high']:.1f})"
        place = say_place(question, mean["x"], mean["regime"])
        cells = (label(mean["arm"]), place, mean["seeds"], accuracy, f"{mean['seconds']:.1f}", f"{mean['pflop']:.3g}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in summary["sentences"]), ""])
