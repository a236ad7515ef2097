"""Two models on the same images: how far apart they are, image by image, in accuracy and in loss.

    python benchmarks/paired.py docs/results/best-5 cifar10 --data ../shared/cifar10 --split val

Prints the first less the second with Student's 95% interval over the images. Much of what makes an image hard it has
for both, so this tells smaller differences than two intervals side by side. With `--split test` only what was chosen
before may be compared. `--flip` has the first model look at each picture and at its mirror image, and answer with the
mean of the two probabilities; name one model twice to see what that brings.
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.compare.statistics import estimate_mean
from vitrail.data import load_split
from vitrail.errors import ignore_events
from vitrail.evaluate import compute_logits
from vitrail.run import load_run


def score_images(model: str, data: str, split: str, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each image of the split whether it was right, 0 or 100, its cross-entropy in nats, and its label."""
    run = load_run(model)
    images = load_split(run.config, data, split, ignore_events)
    looks = [images, replace(images, images=images.images.flip(-1))] if flip else [images]
    net, pre = run.load_model(), run.config.preprocessing
    probabilities = torch.stack([compute_logits(net, look, pre).double().softmax(1) for look in looks]).mean(0)
    right = (probabilities.argmax(1) == images.labels).double() * 100
    return right, F.nll_loss(probabilities.log(), images.labels, reduction="none"), images.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--flip", action="store_true", help="the first looks at mirror images too")
    arguments = parser.parse_args()
    data, split = arguments.data, arguments.split
    *first, labels = score_images(arguments.first, data, split, arguments.flip)
    *second, others = score_images(arguments.second, data, split, flip=False)
    if not torch.equal(labels, others):
        parser.error(f"the two hold out other images for {split}; give runs of one val_fraction and val_seed")
    name = arguments.first + " with mirror images" * arguments.flip
    print(f"{name} less {arguments.second}, {len(labels)} images of {split}")
    for name, a, b, form in zip(("accuracy, points", "loss, nats"), first, second, (".2f", ".4f"), strict=True):
        difference = estimate_mean((a - b).tolist()).show(f"+{form}")
        print(f"  {name}: {difference}; {a.mean().item():{form}} and {b.mean().item():{form}}")


if __name__ == "__main__":
    main()
