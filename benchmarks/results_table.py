"""The table of results in docs/benchmarks.md, and the learning curves, from finished runs that have been evaluated.

    vitrail train quick --data ../shared/cifar10 --budget 31min --out runs/half-hour
    vitrail evaluate runs/half-hour --split val && vitrail evaluate runs/half-hour --split test
    python benchmarks/results_table.py runs/half-hour --out docs/results

Prints a Markdown table, and copies what it was made from to `docs/results/<run>/` with a picture of the curve. After
runs that differ in their seed alone stands their mean, with the 95% interval over the seeds (Student's t). `--convnet`
says that the runs are those of benchmarks/convnet.py.
"""

import argparse
import json
import shutil
import statistics
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from convnet import in_place_of_the_vit
from matplotlib.figure import Figure
from scipy.stats import t

from vitrail.plain import to_dict
from vitrail.presets import get_preset
from vitrail.resolve import count_training_flops
from vitrail.run import Run, load_run

KEPT = ("config.json", "metrics.jsonl", "evaluation-val.json", "evaluation-test.json")


def evaluation(run: Run, split: str) -> dict[str, float]:
    """What `vitrail evaluate` wrote of a split."""
    return json.loads((run.folder / f"evaluation-{split}.json").read_text())


def accuracy(run: Run, split: str) -> str:
    """The accuracy of an evaluated split with its 95% interval over the images, in percent."""
    figures = evaluation(run, split)
    low, high = 100 * figures["accuracy_low"], 100 * figures["accuracy_high"]
    return f"{100 * figures['accuracy']:.2f} ({low:.2f}–{high:.2f})"


def command(run: Run, program: str) -> str:
    """The command that asks for this run."""
    config, preset = to_dict(run.config.asked()), to_dict(get_preset(run.config.preset))
    words = [program, "train", config["preset"]]
    words += [f"--{name} {config[name]}" for name in ("data", "budget", "seed")]
    if config["init_from"]:
        words.append(f"--init-from {config['init_from']}")
    for group in ("model", "optim", "augment", "input"):
        changed = {name: value for name, value in config[group].items() if value != preset[group][name]}
        words += [f"--{group}.{name.replace('_', '-')} {value}" for name, value in changed.items()]
    return " ".join(words)


def table_row(run: Run, program: str) -> str:
    """One run as a row: command, minutes, passes, parameters, PFLOP, val and test accuracy."""
    last = run.read_metrics()[-1]
    num_parameters = sum(p.numel() for p in run.load_model().parameters())
    cells = (
        f"`{command(run, program)}`",
        f"{last['elapsed_s'] / 60:.1f}",
        f"{last['epoch']:.1f}",
        f"{num_parameters / 1e6:.2f} M",
        f"{count_training_flops(run.config) / 1e15:.2f}",
        accuracy(run, "val"),
        accuracy(run, "test"),
    )
    return "| " + " | ".join(cells) + " |"


def mean_row(runs: list[Run]) -> str:
    """Seeds of one command as a row: their means, and of the accuracies the interval over the seeds."""
    last = [run.read_metrics()[-1] for run in runs]
    means = [statistics.mean(row["elapsed_s"] / 60 for row in last), statistics.mean(row["epoch"] for row in last)]
    cells = [f"mean of {len(runs)} seeds", *(f"{mean:.1f}" for mean in means), "", ""]
    for split in ("val", "test"):
        reached = [100 * evaluation(run, split)["accuracy"] for run in runs]
        half = t.ppf(0.975, len(runs) - 1) * statistics.stdev(reached) / len(runs) ** 0.5
        cells.append(f"{statistics.mean(reached):.2f} ± {half:.2f}")
    return "| " + " | ".join(cells) + " |"


def draw_curve(run: Run, picture: Path) -> None:
    """Training loss and validation accuracy over the minutes of a run."""
    rows = run.read_metrics()
    minutes = [row["elapsed_s"] / 60 for row in rows]
    figure = Figure(figsize=(6, 3.2), dpi=120, layout="constrained")
    left = figure.subplots()
    left.plot(minutes, [100 * row["val_accuracy"] for row in rows], "o-", color="tab:blue", markersize=3)
    left.set(xlabel="minutes", title=f"{run.folder.name}: {run.config.preset}, seed {run.config.seed}")
    left.set_ylabel("val accuracy, %", color="tab:blue")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(minutes, [row["train_loss"] for row in rows], color="tab:orange")
    right.set_ylabel("train loss, nats (smoothed labels)", color="tab:orange")
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--convnet", action="store_true")
    arguments = parser.parse_args()
    print("| command | minutes | passes | parameters | PFLOP | val, % | test, % |")
    print("|---|---|---|---|---|---|---|")
    runs = [load_run(folder) for folder in arguments.runs]
    for run in runs:
        kept = arguments.out / run.folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(run.folder / name, kept / name)
        draw_curve(run, kept / "curve.png")
    program = "python benchmarks/convnet.py" if arguments.convnet else "vitrail"
    with in_place_of_the_vit() if arguments.convnet else nullcontext():
        for _, group in groupby(runs, key=lambda run: replace(run.config.asked(), seed=0)):
            seeds = list(group)
            print(*(table_row(run, program) for run in seeds), sep="\n")
            if len(seeds) > 1:
                print(mean_row(seeds))


if __name__ == "__main__":
    main()
