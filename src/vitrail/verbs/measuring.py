"""The verbs that look at what there is: evaluate, predict, explain, report, bench."""

import json
from dataclasses import asdict
from pathlib import Path

from vitrail.errors import VitrailError, printable
from vitrail.verbs.speak import leads, parse, say, show_table


def run_evaluate(arguments: list[str]) -> None:
    """Figures of a model on a split, and the confusion picture."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import EvaluateFlags

    flags = parse(EvaluateFlags, "evaluate", arguments)
    from vitrail.evaluate import evaluate, save_evaluation
    from vitrail.run import load_run

    run = load_run(flags.model)
    with ProgressDisplay(flags.quiet or not leads()) as display:
        metrics = evaluate(run, flags.data, flags.split, display)
    if not leads():
        return
    files = save_evaluation(metrics, flags.split, flags.out or run.outputs)
    if flags.json:
        print(json.dumps({"split": flags.split, **asdict(metrics)}))
        return
    rows: list[tuple[str, str, str, str]] = []
    for i, (name, accuracy) in enumerate(metrics.per_class.items()):
        row = metrics.confusion[i]
        wrong, taken_for = max(
            (count, other) for j, (count, other) in enumerate(zip(row, metrics.per_class, strict=True)) if j != i
        )
        mistaken = f"{taken_for} ({wrong})" if wrong else "–"
        rows.append((name, "–" if accuracy is None else f"{accuracy:.1%}", str(sum(row)), mistaken))
    show_table(("class", "accuracy", "images", "most often taken for"), rows)
    print(
        f"{flags.split}: accuracy {metrics.accuracy:.2%} (95% interval {metrics.accuracy_low:.2%} to "
        f"{metrics.accuracy_high:.2%}) on {metrics.count} images, loss {metrics.loss:.3f}, "
        f"calibration error {metrics.ece:.3f}"
    )
    print("wrote " + " and ".join(map(str, files)))


def run_predict(arguments: list[str]) -> None:
    """The likeliest classes of each picture."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import PredictFlags

    flags = parse(PredictFlags, "predict", arguments)
    from vitrail.predict import load

    classifier = load(flags.model)
    with ProgressDisplay(flags.quiet) as display:
        predictions = classifier.predict(flags.images, flags.top, display)
    if flags.json:
        print(json.dumps({"predictions": [asdict(p) for p in predictions]}))
        return
    columns = ("picture", *(f"{i + 1}." for i in range(len(predictions[0].top))))
    show_table(columns, ((p.path, *(f"{g.label} {g.probability:.1%}" for g in p.top)) for p in predictions))


def run_explain(arguments: list[str]) -> None:
    """Where a model looks in one picture."""
    from vitrail.flags import ExplainFlags

    flags = parse(ExplainFlags, "explain", arguments)
    if flags.head is not None and flags.layer is None:
        raise VitrailError(f"--head {flags.head} of which block? give --layer too")
    if flags.layer is not None and flags.method not in ("all", "attention"):
        raise VitrailError(f"--layer picks an attention map; leave it out with --method {flags.method}")
    from vitrail.explain import explain_picture
    from vitrail.run import load_run

    run = load_run(flags.model)
    found = explain_picture(run, flags.image, flags.label, flags.fusion, flags.discard_ratio)
    side = run.config.preprocessing.image_size
    if found.size != (side, side):
        say(f"the picture of {found.size[0]}×{found.size[1]} pixels was brought to {side}×{side}, its middle square")
    from vitrail.figures import draw_explanation, draw_map, map_title, save_figure, to_values
    from vitrail.words import Words

    words, explanation = Words(), found.explanation
    if flags.layer is not None:
        title = words("maps.one_head" if flags.head else "maps.one_block", layer=flags.layer, head=flags.head)
        figure = draw_map(found, explanation.pick(flags.layer, flags.head), title, words)
    elif flags.method != "all":
        title = map_title(found, flags.method, int(explanation.labels[0]), words)
        figure = draw_map(found, explanation.choose(flags.method), title, words)
    else:
        figure = draw_explanation(found, words)
    out = flags.out or Path(f"{flags.image.stem}-explained.png")
    beside = save_figure(figure, out, found)
    if flags.json:
        print(json.dumps(to_values(found)))
    else:
        probabilities = explanation.logits[0].softmax(0).tolist()
        best = sorted(zip(probabilities, found.classes, strict=True), reverse=True)[:3]
        print("  ".join(f"{printable(label)} {probability:.1%}" for probability, label in best))
        print(printable(f"wrote {out} and {beside}"))


def run_report(arguments: list[str]) -> None:
    """One page on a run."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import ReportFlags

    flags = parse(ReportFlags, "report", arguments)
    from vitrail.report import write_report
    from vitrail.run import load_run

    run = load_run(flags.model)
    with ProgressDisplay(flags.quiet) as display:
        page, beside, summary = write_report(
            run, flags.out, display, lang=flags.lang, data=flags.data, split=flags.split
        )
    if flags.json:
        print(json.dumps({"report": str(page), "numbers": str(beside), **summary}))
    else:
        print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB) and {beside}")


def run_bench(arguments: list[str]) -> None:
    """This machine's speed, beside other libraries and its limit."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import BenchFlags

    flags = parse(BenchFlags, "bench", arguments)
    from vitrail.bench import run_benchmark
    from vitrail.config import RunConfig
    from vitrail.resolve import choose_machine

    machine = choose_machine(RunConfig(device="cpu", threads=flags.threads))
    with ProgressDisplay(flags.quiet) as display:
        result = run_benchmark(flags.minutes, machine.threads, machine.precision == "bf16", display)
    if flags.json:
        print(json.dumps(result))
        return
    from rich.console import Console

    from vitrail.bench.table import build_tables

    console = Console()
    for table in build_tables(result):
        console.print(table)
    for line in result["left_out"]:
        print(f"left out: {line}")
