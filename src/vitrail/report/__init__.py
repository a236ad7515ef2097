"""A run on one self-contained page, with the numbers behind every figure beside it."""

import json
from pathlib import Path
from typing import Any

from vitrail.errors import Listener, VitrailError, ignore_events
from vitrail.figures import to_values
from vitrail.report.findings import Findings, Split, measure
from vitrail.report.page import write_page
from vitrail.run import Run
from vitrail.words import Words

__all__ = ["Findings", "write_report"]


def write_report(
    run: Run,
    out: Path | None = None,
    listener: Listener = ignore_events,
    *,
    lang: str = "en",
    data: str | None = None,
    split: Split = "test",
) -> tuple[Path, Path, dict[str, Any]]:
    """Measure a run and write its page (`report.html` in its folder if `out` is None); returns page, numbers, summary.

    Raises:
        VitrailError: if the run cannot be measured, or the page not be written.
    """
    words, page = Words(lang), out or run.outputs / "report.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise VitrailError(f"--out is {page}; give the name of a page ending in .html")
    found = measure(run, data, split, listener)
    numbers = page.with_suffix(".json")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(to_values(found)))
        page.write_text(write_page(found, words, numbers.name), encoding="utf-8")
    except OSError as error:
        raise VitrailError(f"cannot write {page}: {error.strerror}; give another --out") from error
    metrics = found.metrics
    summary = {"split": split, "count": metrics.count, "accuracy": metrics.accuracy, "ece": metrics.ece}
    return page, numbers, summary
