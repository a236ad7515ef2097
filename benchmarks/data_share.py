"""What share of a training step goes to fetching and augmenting its batch.

    python benchmarks/data_share.py --data ../shared/cifar10

Times, in turn within each step and over the same batches, the fetch with its augmentation and the whole step; prints
one JSON object with the median share of each augmentation, beside versions. The preset's own choice comes first.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from vitrail.augment import Augment
from vitrail.config import AugmentConfig, ResolvedConfig
from vitrail.data import ImageSet, SampleStream, load_training_data
from vitrail.errors import ignore_events
from vitrail.learner import Learner
from vitrail.presets import get_preset
from vitrail.resolve import choose_machine, prepare_cpu, resolve

NUM_STEPS = 15
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="quick")
    arguments = parser.parse_args()
    preset = choose_machine(replace(get_preset(arguments.preset), data=arguments.data))
    prepare_cpu(preset.threads)
    train_set, val_set, preprocessing = load_training_data(preset, ignore_events)
    config = replace(resolve(preset, train_set, val_set, preprocessing), num_steps=NUM_STEPS)
    shares = {
        name: measure(replace(config, augment=choice or preset.augment), train_set) for name, choice in CHOICES.items()
    }
    print(json.dumps({"preset": preset.preset, "torch": torch.__version__, "share_of_step": shares}, indent=1))


if __name__ == "__main__":
    main()
