"""One question, some arms, the same minutes for each: a table for the lab notebook, chosen on `val`.

    python benchmarks/arms.py --data ../shared/cifar10 --budget 3min --out runs/heads "" "--model.num-heads 4"

Each arm is a string of `vitrail train` flags; the first is what the others are compared with. Seeds alternate: all arms
with seed 0, then all with seed 1, so that what else the machine does falls on all alike. Stop it at any moment and
run it again: finished runs are kept, a half-finished one is resumed. Run it with nothing else on the machine.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from scipy.stats import t

from vitrail.run import Run, load_run


def train(arm: str, seed: int, folder: Path, arguments: argparse.Namespace) -> Run:
    """The finished run of one arm and seed."""
    started = (folder / "config.json").exists()
    if not started or not (run := load_run(folder)).weights.exists():
        asked = [arguments.preset, "--data", arguments.data, "--budget", arguments.budget, "--seed", str(seed)]
        flags = ["--resume"] if started else asked + shlex.split(arm)
        subprocess.run([sys.executable, "-m", "vitrail", "train", *flags, "--quiet", "--out", str(folder)], check=True)
        run = load_run(folder)
    return run


def interval(values: list[float]) -> str:
    """Mean and half the 95% interval (Student's t) over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+", help="flags of `vitrail train`, an arm each; '' is the preset as it is")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
    for seed in range(arguments.seeds):
        for i, arm in enumerate(arguments.arms):
            runs[arm].append(train(arm, seed, arguments.out / f"arm{i}-seed{seed}", arguments).read_metrics()[-1])
    print("| arm | passes | val accuracy in % | against the first, same seeds |\n|---|---|---|---|")
    first = [100 * row["val_accuracy"] for row in runs[arguments.arms[0]]]
    for arm, rows in runs.items():
        reached = [100 * row["val_accuracy"] for row in rows]
        passes = statistics.mean(row["epoch"] for row in rows)
        against = "" if arm == arguments.arms[0] else interval([a - b for a, b in zip(reached, first, strict=True)])
        print(f"| `{arm or arguments.preset}` | {passes:.1f} | {interval(reached)} | {against} |")


if __name__ == "__main__":
    main()
