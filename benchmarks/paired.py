"""Two models on the same images: how far apart they are, image by image, in accuracy and in loss.

    python benchmarks/paired.py docs/results/best-5 cifar10 --data ../shared/cifar10 --split val

Prints the first less the second with Student's 95% interval over the images. Much of what makes an image hard it has
for both, so this tells smaller differences than two intervals side by side. With `--split test` only what was chosen
before may be compared.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.compare.statistics import estimate_mean
from vitrail.data import load_split
from vitrail.errors import ignore_events
from vitrail.evaluate import compute_logits
from vitrail.run import load_run


def score_images(model: str, data: str, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """For each image of the split whether it was right, 0 or 100, its cross-entropy in nats, and its label."""
    run = load_run(model)
    images = load_split(run.config, data, split, ignore_events)
    logits = compute_logits(run.load_model(), images, run.config.preprocessing)
    right = (logits.argmax(1) == images.labels).double() * 100
    return right, F.cross_entropy(logits, images.labels, reduction="none").double(), images.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    arguments = parser.parse_args()
    models = arguments.first, arguments.second
    (*first, labels), (*second, others) = (score_images(model, arguments.data, arguments.split) for model in models)
    if not torch.equal(labels, others):
        parser.error(f"the two hold out other images for {arguments.split}; give runs of one val_fraction and val_seed")
    print(f"{arguments.first} less {arguments.second}, {len(labels)} images of {arguments.split}")
    for name, a, b, form in zip(("accuracy, points", "loss, nats"), first, second, ("+.2f", "+.4f"), strict=True):
        print(f"  {name}: {estimate_mean((a - b).tolist()).show(form)}")


if __name__ == "__main__":
    main()
