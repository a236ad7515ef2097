"""The verbs that train: train, compare, verify-resume."""

import itertools
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vitrail.errors import Interrupted, VitrailError
from vitrail.verbs.speak import leads, parse, say


def run_train(arguments: list[str]) -> None:
    """Train a new run, or go on with one."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import TrainFlags

    preset, arguments = take_preset(arguments)
    resuming = "--resume" in arguments
    arguments = _name_resumed(arguments) if resuming else arguments
    start = _begun_config(_find_option(arguments, "--out"), preset) if resuming else preset_config(preset)

    flags = parse(TrainFlags, "train", arguments, TrainFlags(start))
    if resuming:
        from vitrail.train import check_unchanged

        check_unchanged(start, flags.config)
    from vitrail.train import resume, train

    if flags.out is None and "WORLD_SIZE" in os.environ:
        raise VitrailError("many processes need to mean the same run folder; give --out RUN")
    out = flags.out or _next_run_folder(flags.config)
    try:
        with ProgressDisplay(flags.quiet or not leads()) as display:
            run = resume(out, display) if resuming else train(flags.config, out, display)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with: vitrail train --resume --out {out}", stop.signal) from stop
    if not leads():
        return
    last = run.read_metrics()[-1]
    if flags.json:
        init = run.folder / "init.json"
        begun = {"init": json.loads(init.read_text())} if init.exists() else {}
        print(json.dumps({"run": str(run.folder), **last, **begun}))
    else:
        print(f"{run.folder}: val accuracy {last['val_accuracy']:.1%} after {last['elapsed_s'] / 60:.1f} min")
        print(f"next: vitrail evaluate {run.folder}")


def _name_resumed(arguments: list[str]) -> list[str]:
    """`--resume RUN` in its long form, `--resume --out RUN`."""
    after = arguments.index("--resume") + 1
    named = after < len(arguments) and not arguments[after].startswith("-")
    return [*arguments[:after], "--out", *arguments[after:]] if named else arguments


def take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
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


def preset_config(preset: str | None) -> Any:
    """The config of a preset, the default one if none is named."""
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


def run_compare(arguments: list[str]) -> None:
    """A grid of trainings that answers one question."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import CompareFlags

    flags = parse(CompareFlags, "compare", arguments)
    from vitrail.compare import make_plan, run_plan

    base = replace(preset_config(flags.preset), data=flags.data, budget=flags.budget)
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


def run_verify_resume(arguments: list[str]) -> None:
    """Whether a killed and resumed run is the undisturbed one here."""
    from vitrail.console import ProgressDisplay
    from vitrail.flags import VerifyResumeFlags

    flags = parse(VerifyResumeFlags, "verify-resume", arguments)
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
