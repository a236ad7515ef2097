"""Where the time of a training step goes: data and augmentation, and what replicas, a short last block and sums
written at once are worth.

    python benchmarks/step.py --data ../shared/cifar10

Prints one JSON object, of steps on whole pictures. `share_of_step`: fetching and augmenting a batch over the whole
step, median over steps, for the preset's own augmentation and for heavier ones. `replicas`: images per second with a
replica for each thread over those of one replica with all threads, alternating, median and extremes of the pairs.
`last_block`: likewise, over those of a step whose last block makes all tokens, as `trace` does, though the head reads
only one; `linear`, of a step whose linear layers add bias and residual in passes of their own (in fp32 all do).
"""

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from vitrail.augment import Augment
from vitrail.config import AugmentConfig, ResolvedConfig
from vitrail.data import ImageSet, SampleStream, load_training_data
from vitrail.errors import ignore_events
from vitrail.learner import Learner
from vitrail.presets import get_preset
from vitrail.resolve import choose_machine, prepare_cpu, resolve
from vitrail.vit import VisionTransformer

NUM_STEPS = 15
NUM_PAIRS = 7
STEPS_PER_PAIR = 6
CHOICES = {
    "preset": None,
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "randaugment, erasing, mixup, cutmix": AugmentConfig(policy="randaugment", erasing=0.25, mixup=0.8, cutmix=1.0),
}


def measure(config: ResolvedConfig, train_set: ImageSet) -> float:
    """The median share, over steps, of fetching and augmenting in the whole step."""
    learner = Learner(config)
    augment = Augment(config.augment, config.preprocessing, len(config.classes), config.seed)
    stream = SampleStream(train_set.labels, config.seed, balanced=False)
    size, shares = config.optim.batch_size, list[float]()
    for step in range(NUM_STEPS):
        began = time.perf_counter()
        augment(train_set.take(stream.indices(step * size, size)), step * size)
        data_s = time.perf_counter() - began
        began = time.perf_counter()
        learner.step(train_set.take(stream.indices(step * size, size)), step)
        shares.append(data_s / (time.perf_counter() - began))
    return statistics.median(shares[3:])


def compare_steps(config: ResolvedConfig, train_set: ImageSet) -> dict[str, dict[str, float]]:
    """How many times as fast a step is as without each of what makes it fast, in pairs of a few steps."""
    stream = SampleStream(train_set.labels, config.seed, balanced=False)
    batch = train_set.take(stream.indices(0, config.optim.batch_size))
    with mock.patch("vitrail.learner.MAX_REPLICAS", 1):
        one = Learner(config)
    many = Learner(config)

    def seconds(learner: Learner, without: AbstractContextManager[Any]) -> float:
        with without:
            began = time.perf_counter()
            for step in range(STEPS_PER_PAIR):
                learner.step(batch, step)
            return time.perf_counter() - began

    nothing = nullcontext()
    all_tokens = mock.patch.object(VisionTransformer, "forward", lambda self, images: self.trace_labels(images)[0])
    torchs_layers = mock.patch("vitrail.linear._writes_once", return_value=False)
    others = {"replicas": (one, nothing), "last_block": (many, all_tokens), "linear": (many, torchs_layers)}
    seconds(many, nothing)
    found = dict[str, dict[str, float]]()
    for name, other in others.items():
        seconds(*other)
        ratios = [seconds(*other) / seconds(many, nothing) for _ in range(NUM_PAIRS)]
        found[name] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="quick")
    arguments = parser.parse_args()
    preset = choose_machine(replace(get_preset(arguments.preset), data=arguments.data))
    preset = replace(preset, optim=replace(preset.optim, coarse_fraction=0.0))  # whole pictures, as the last steps take
    prepare_cpu(preset.threads)
    train_set, val_set, preprocessing = load_training_data(preset, ignore_events)
    config = replace(resolve(preset, train_set, val_set, preprocessing), num_steps=NUM_STEPS)
    shares = {
        name: measure(replace(config, augment=choice or preset.augment), train_set) for name, choice in CHOICES.items()
    }
    print(
        json.dumps(
            {
                "preset": preset.preset,
                "torch": torch.__version__,
                "share_of_step": shares,
                **compare_steps(config, train_set),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
