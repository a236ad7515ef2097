"""What each verb does: read its flags, call, print. Results go to standard output, all else to standard error.

Every verb's libraries are imported when it runs, so that `vitrail --help` answers at once.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vitrail.errors import Interrupted, VitrailError, printable


def say(text: str) -> None:
    """One line on standard error."""
    print(printable(" ".join(text.split())), file=sys.stderr, flush=True)


def _show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output, whose cells are text and no markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def _parse(kind: Any, verb: str, arguments: list[str], default: Any = None) -> Any:
    import tyro

    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"vitrail {verb}", args=arguments, **given)


def _train(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import TrainFlags

    preset, arguments = _take_preset(arguments)
    resuming = "--resume" in arguments
    arguments = _name_resumed(arguments) if resuming else arguments
    start = _begun_config(_find_option(arguments, "--out"), preset) if resuming else _preset_config(preset)

    flags = _parse(TrainFlags, "train", arguments, TrainFlags(start))
    if resuming:
        from vitrail.train import check_unchanged

        check_unchanged(start, flags.config)
    from vitrail.train import resume, train

    if flags.out is None and "WORLD_SIZE" in os.environ:
        raise VitrailError("many processes need to mean the same run folder; give --out RUN")
    out = flags.out or _next_run_folder(flags.config)
    try:
        with ProgressDisplay(flags.quiet or not _leads()) as display:
            run = resume(out, display) if resuming else train(flags.config, out, display)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with: vitrail train --resume --out {out}", stop.signal) from stop
    if not _leads():
        return
    last = run.read_metrics()[-1]
    if flags.json:
        init = run.folder / "init.json"
        begun = {"init": json.loads(init.read_text())} if init.exists() else {}
        print(json.dumps({"run": str(run.folder), **last, **begun}))
    else:
        print(f"{run.folder}: val accuracy {last['val_accuracy']:.1%} after {last['elapsed_s'] / 60:.1f} min")
        print(f"next: vitrail evaluate {run.folder}")


def _leads() -> bool:
    """Whether this process speaks for all that torchrun started; alone, yes."""
    return os.environ.get("RANK", "0") == "0"


def _name_resumed(arguments: list[str]) -> list[str]:
    """`--resume RUN` in its long form, `--resume --out RUN`."""
    after = arguments.index("--resume") + 1
    named = after < len(arguments) and not arguments[after].startswith("-")
    return [*arguments[:after], "--out", *arguments[after:]] if named else arguments


def _take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The preset, given as the first word or by --preset, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return _find_option(arguments, "--preset"), arguments


def _find_option(arguments: list[str], name: str) -> str | None:
    """The value of an option whose value decides how the others are read."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def _preset_config(preset: str | None) -> Any:
    from vitrail.presets import DEFAULT_PRESET, get_preset

    return get_preset(preset or DEFAULT_PRESET)


def _begun_config(out: str | None, preset: str | None) -> Any:
    """What the run to resume was asked for."""
    from vitrail.run import load_run

    if out is None:
        raise VitrailError("--resume needs the run to go on with; give --resume RUN")
    begun = load_run(out).config.asked()
    if preset not in (None, begun.preset):
        raise VitrailError(f"{out} began with the preset {begun.preset}, not {preset}; leave the preset out")
    return begun


def _next_run_folder(config: Any) -> Path:
    stem = f"{config.preset}-{Path(config.data).resolve().name}"
    return next(p for n in itertools.count(1) if not (p := Path("runs") / f"{stem}-{n}").exists())


def _evaluate(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import EvaluateFlags

    flags = _parse(EvaluateFlags, "evaluate", arguments)
    from vitrail.evaluate import evaluate, save_evaluation
    from vitrail.run import load_run

    run = load_run(flags.model)
    with ProgressDisplay(flags.quiet or not _leads()) as display:
        metrics = evaluate(run, flags.data, flags.split, display)
    if not _leads():
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
    _show_table(("class", "accuracy", "images", "most often taken for"), rows)
    print(
        f"{flags.split}: accuracy {metrics.accuracy:.2%} (95% interval {metrics.accuracy_low:.2%} to "
        f"{metrics.accuracy_high:.2%}) on {metrics.count} images, loss {metrics.loss:.3f}, "
        f"calibration error {metrics.ece:.3f}"
    )
    print("wrote " + " and ".join(map(str, files)))


def _predict(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import PredictFlags

    flags = _parse(PredictFlags, "predict", arguments)
    from vitrail.predict import load

    classifier = load(flags.model)
    with ProgressDisplay(flags.quiet) as display:
        predictions = classifier.predict(flags.images, flags.top, display)
    if flags.json:
        print(json.dumps({"predictions": [asdict(p) for p in predictions]}))
        return
    columns = ("picture", *(f"{i + 1}." for i in range(len(predictions[0].top))))
    _show_table(columns, ((p.path, *(f"{g.label} {g.probability:.1%}" for g in p.top)) for p in predictions))


def _explain(arguments: list[str]) -> None:
    from vitrail.flags import ExplainFlags

    flags = _parse(ExplainFlags, "explain", arguments)
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
        print(f"wrote {out} and {beside}")


def _report(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import ReportFlags

    flags = _parse(ReportFlags, "report", arguments)
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


def _bench(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import BenchFlags

    flags = _parse(BenchFlags, "bench", arguments)
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


def _verify_resume(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import VerifyResumeFlags

    flags = _parse(VerifyResumeFlags, "verify-resume", arguments)
    from vitrail.verify import verify_resume

    with ProgressDisplay(flags.quiet) as display:
        found = verify_resume(flags.config, flags.steps, flags.kills, flags.seed, display)
    if flags.json:
        print(json.dumps({"exact": found.exact, **asdict(found)}))
    else:
        print(f"undisturbed                     model.safetensors {found.undisturbed_sha256}")
        killed = ", ".join(map(str, found.killed_after_steps))
        print(f"killed after steps {killed:13}model.safetensors {found.killed_sha256}")
    if not found.exact:
        what = "its metrics differ" if found.undisturbed_sha256 == found.killed_sha256 else "its weights differ"
        raise VitrailError(f"a run of {flags.config} that is killed and resumed is not the undisturbed one: {what}")
    if not flags.json:
        print(f"the same, to the bit, after {found.num_steps} steps; metrics too")


def _compare(arguments: list[str]) -> None:
    from vitrail.console import ProgressDisplay
    from vitrail.flags import CompareFlags

    flags = _parse(CompareFlags, "compare", arguments)
    from vitrail.compare import make_plan, run_plan

    base = replace(_preset_config(flags.preset), data=flags.data, budget=flags.budget)
    arms = [arm for arm in flags.arms.split(",") if arm]
    with ProgressDisplay(flags.quiet) as display:
        plan = make_plan(flags.question, base, flags.out, display, arms=arms, num_seeds=flags.seeds)
        if flags.plan:
            print(json.dumps(plan.to_json()) if flags.json else "\n".join(plan.describe()))
            return
        for line in plan.describe():
            say(line)
        try:
            results = run_plan(plan, display)
        except (Interrupted, KeyboardInterrupt) as stop:
            reason = str(stop) or "stopped between two trainings"
            number = getattr(stop, "signal", signal.SIGINT)
            raise Interrupted(f"{reason}; go on with the same command again", number) from stop
    if flags.json:
        print(json.dumps(results))
    else:
        print((flags.out / "table.md").read_text())
        print(f"wrote results.json, table.csv, table.md and plot.png to {flags.out}")


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "explain": _explain,
    "report": _report,
    "bench": _bench,
    "verify-resume": _verify_resume,
    "compare": _compare,
}
"""What to call with the arguments after each verb."""
