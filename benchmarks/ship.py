"""Make a finished run a model that ships: weights in bf16, config, learning curve, and a card with measured numbers.

    python benchmarks/ship.py runs/best --data ../shared/cifar10 --name cifar10 --note "JPEG-encoded once, ..."

Both accuracies are those of the rounded weights, measured here by `evaluate`, so `vitrail evaluate` agrees anywhere.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from results_table import command
from safetensors.torch import load_file, save_file

from vitrail.evaluate import evaluate
from vitrail.plain import to_dict
from vitrail.resolve import count_training_flops
from vitrail.run import BUNDLED, Run, load_run

CARD = """\
# {name}: a plain Vision Transformer for small pictures

Ships with vitrail; made by `python benchmarks/ship.py`. Weights: bf16 safetensors, {megabytes:.1f} MB.

- **Model**: {parameters:.2f} M parameters; {width} wide, {depth} deep, {heads} heads, patch {patch},
  {size}×{size} pixels.
- **Classes**: {classes}.
- **Preprocessing**: in `config.json`, and applied by vitrail: the middle square, brought to {size}×{size},
  normalised by mean {mean} and deviation {std} of the channels.
- **Data**: the {num_train:,} training images of CIFAR-10 that were not held out, and nothing else. {note}
- **Training**: `{command}`: {passes:.1f} passes,
  {minutes:.0f} minutes, {pflop:.2f} PFLOP, in {precision} on {threads} CPU threads. {before}
- **Accuracy of these weights**: val {val}, test {test} (95% Wilson intervals). `val` was chosen on; `test` was not.

## Limits

- It knows ten classes and always names one of them, also for a picture of none. It learned from pictures of 32
  pixels; a larger one, brought to {size}, may be sharper than any of those.
- CIFAR-10 has near duplicates between train and test (3.3% of test, Barz and Denzler 2020), and its pictures come from
  the web of 2008: expect less on your own.
- It is for learning, teaching and as a baseline, not for decisions about people, safety or health.
"""


def build_bundle(run: Run, folder: Path) -> Run:
    """Write the run's config, curve and bf16 weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(run.config, data="cifar10")
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n")
    shutil.copy(run.folder / "metrics.jsonl", folder)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(run.weights).items()}
    save_file(state, folder / "model.safetensors")
    return load_run(folder)


def build_card(run: Run, bundle: Run, data: str, note: str, before: str = "") -> str:
    """The card's text. Reads test, once."""
    config, pre = bundle.config, bundle.config.preprocessing
    measured = {split: evaluate(bundle, data, split) for split in ("val", "test")}
    last = run.read_metrics()[-1]
    return CARD.format(
        name=bundle.folder.name,
        megabytes=bundle.weights.stat().st_size / 1e6,
        parameters=sum(p.numel() for p in bundle.load_model().parameters()) / 1e6,
        width=config.model.embed_dim,
        depth=config.model.depth,
        heads=config.model.num_heads,
        patch=config.model.patch_size,
        size=pre.image_size,
        classes=", ".join(config.classes),
        mean=", ".join(f"{value:.3f}" for value in pre.mean),
        std=", ".join(f"{value:.3f}" for value in pre.std),
        num_train=config.num_train,
        note=note,
        before=before,
        command=command(run, "vitrail"),
        passes=last["epoch"],
        minutes=last["elapsed_s"] / 60,
        pflop=count_training_flops(run.config) / 1e15,
        precision=config.precision,
        threads=config.threads,
        **{split: f"{m.accuracy:.2%} ({m.accuracy_low:.2%} to {m.accuracy_high:.2%})" for split, m in measured.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default="cifar10")
    parser.add_argument("--note", default="", help="what there is to say of the data")
    parser.add_argument("--before", default="", help="what the weights it began with, by --init-from, had cost")
    arguments = parser.parse_args()
    run = load_run(arguments.run)
    bundle = build_bundle(run, BUNDLED / arguments.name)
    card = build_card(run, bundle, arguments.data, arguments.note, arguments.before)
    (bundle.folder / "README.md").write_text(card)
    print(f"wrote {bundle.folder}")


if __name__ == "__main__":
    main()
