"""Random interruptions of small trainings: how many end with other bytes than the undisturbed run? (None should.)

    python benchmarks/faults.py --interruptions 200

Each training has a config of its own, drawn by the seed: augmentation, mixing, dropout, averaging, optimizer,
precision, sizes. It is run once undisturbed, then interrupted up to ten times at random moments, while reading, in a
step or while saving, by SIGKILL, SIGTERM, Ctrl-C or a double Ctrl-C, and resumed each time. When it is finished, the
SHA-256 of its weights and its metrics, times aside, are compared. A life that ends in any other way is a failure too.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vitrail.config import AugmentConfig, ModelConfig, OptimConfig, RunConfig
from vitrail.data import load_training_data
from vitrail.errors import Interrupted, ignore_events
from vitrail.presets import get_preset
from vitrail.resolve import choose_machine, resolve
from vitrail.run import Run, create_run, load_run
from vitrail.train import resume
from vitrail.verify import hash_weights, timeless_metrics

PER_TRAINING = 10
KINDS = {
    "SIGKILL": [signal.SIGKILL],
    "SIGTERM": [signal.SIGTERM],
    "Ctrl-C": [signal.SIGINT],
    "Ctrl-C twice": [signal.SIGINT, signal.SIGINT],
}
STOPPED, FAILED = 3, 1  # exit codes of a life


def draw_config(draw: random.Random) -> RunConfig:
    """A small training on digits, of which anything that could break a resume may be part."""
    model = ModelConfig(
        patch_size=2,
        embed_dim=draw.choice([16, 32]),
        depth=2,
        num_heads=4,
        drop_rate=draw.choice([0.0, 0.1]),
        drop_path_rate=draw.choice([0.0, 0.1]),
        rel_pos=draw.choice(["none", "neighbour"]),
    )
    optim = OptimConfig(
        optimizer=draw.choice(["muon", "adamw"]),
        batch_size=draw.choice([48, 64, 100]),
        micro_batch_size=draw.choice([0, 20]),
        ema_decay=draw.choice([0.0, 0.9]),
        clip_norm=draw.choice([0.0, 1.0]),
        coarse_fraction=draw.choice([0.0, 0.5]),
    )
    augment = AugmentConfig(
        policy=draw.choice(["none", "trivialaugment"]),
        erasing=draw.choice([0.0, 0.3]),
        mixup=draw.choice([0.0, 0.2]),
        cutmix=draw.choice([0.0, 1.0]),
    )
    return replace(
        get_preset("tiny"),
        model=model,
        optim=optim,
        augment=augment,
        seed=draw.randrange(1000),
        precision=draw.choice(["fp32", "bf16"]),
        threads=draw.choice([1, 2]),
        checkpoint_steps=draw.choice([0, 1, 3]),
    )


def begin(config: RunConfig, num_steps: int, folders: list[Path]) -> list[Run]:
    """Run folders of one resolved config, nothing trained yet.

    Made in a process of its own: one that has used torch's threads can no longer be forked.
    """
    child = os.fork()
    if child == 0:
        train_set, val_set, preprocessing = load_training_data(config, ignore_events)
        resolved = replace(resolve(choose_machine(config), train_set, val_set, preprocessing), num_steps=num_steps)
        for folder in folders:
            create_run(folder, resolved)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("could not begin a training")
    return [load_run(folder) for folder in folders]


def start(run: Run) -> int:
    """Go on with `run` in a forked process, which spares each life the imports; its process id."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            resume(run.folder)
        except (Interrupted, KeyboardInterrupt):
            code = STOPPED
        except BaseException:  # noqa: BLE001 - a forked process may not run on into its parent's code
            traceback.print_exc()
            code = FAILED
        os._exit(code)
    return child


def interrupt(run: Run, kind: str, after_s: float) -> bool:
    """One life, ended after `after_s` seconds if it lasts so long; whether it ended as it should."""
    child = start(run)
    time.sleep(after_s)
    for number in KINDS[kind]:
        os.kill(child, number)  # a child that has ended stays there until it is waited for
        time.sleep(0.002)
    return end(child)


def end(child: int) -> bool:
    """Wait for a life to end; whether it ended as it should."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code in (0, STOPPED, -signal.SIGKILL, -signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, kinds, counts = random.Random(arguments.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        while (left := arguments.interruptions - sum(kinds.values())) > 0:
            config, folder = draw_config(draw), Path(scratch) / str(counts["trainings"])
            whole, run = begin(config, arguments.steps, [folder / "whole", folder / "run"])
            began = time.monotonic()
            counts["failed lives"] += not end(start(whole))
            lasts_s = time.monotonic() - began
            for _ in range(min(left, PER_TRAINING)):
                kind = draw.choice(list(KINDS))
                counts["failed lives"] += not interrupt(run, kind, draw.uniform(0, lasts_s))
                kinds[kind] += 1
                if run.weights.exists():
                    break  # it was quicker than we were
            if not run.weights.exists():
                counts["failed lives"] += not end(start(run))
            same = hash_weights(whole) == hash_weights(run) and timeless_metrics(whole) == timeless_metrics(run)
            counts["trainings"] += 1
            counts["other bytes"] += not same
            print(f"{sum(kinds.values())} interruptions, {dict(counts)}", file=sys.stderr, flush=True)
    result = {name: counts[name] for name in ("trainings", "other bytes", "failed lives")}
    print(json.dumps({"interruptions": sum(kinds.values()), "by": dict(kinds), **result}))
    return int(counts["other bytes"] + counts["failed lives"] > 0)


if __name__ == "__main__":
    sys.exit(main())
