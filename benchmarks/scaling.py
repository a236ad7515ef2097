"""What more processes are worth on this machine, and on paper for more: the numbers of docs/scaling.md.

    python benchmarks/scaling.py --data ../shared/cifar10

Measured, in alternating turns: one process with two threads against two processes of one thread each (gloo), the same
world batch, whole steps of a preset from uint8 to the optimizer; and what the all-reduce of its gradients takes alone.
Then the sum for a cluster, whose assumptions are the constants below. Prints one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from vitrail.config import ModelConfig, RunConfig
from vitrail.data import SampleStream, load_training_data
from vitrail.distributed import World, join_world
from vitrail.errors import ignore_events
from vitrail.learner import Learner
from vitrail.model import count_flops, count_parameters
from vitrail.presets import get_preset
from vitrail.resolve import choose_machine, prepare_cpu, resolve

WARM_UP, NUM_STEPS = 3, 12
# What the paper's sum takes for given: an A100's published bf16 peak, the share of it that a small ViT's step reaches
# (a guess, and a kind one), NVLink within a machine of 8, one 200 Gbit/s card for each GPU beyond, latency per message.
GPU_FLOP_PER_S, GPU_SHARE = 312e12, 0.3
VIT_B_16 = ModelConfig(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4)
LINK_BYTES_PER_S = {8: 300e9, 256: 25e9}
LATENCY_S = {8: 5e-6, 256: 15e-6}


def take_turn(config: RunConfig, world: World) -> dict[str, float]:
    """Seconds of a step and of the bare all-reduce, medians, in this world."""
    config = choose_machine(config, world)
    prepare_cpu(config.threads)
    train_set, val_set, preprocessing = load_training_data(config, ignore_events)
    resolved = replace(resolve(config, train_set, val_set, preprocessing, world), num_steps=1000)
    learner, stream = Learner(resolved, world), SampleStream(train_set.labels, config.seed, balanced=False)
    size, times, reduces = config.optim.batch_size, list[float](), list[float]()
    gradients = torch.zeros(sum(p.numel() for p in learner.model.parameters()))
    for step in range(WARM_UP + NUM_STEPS):
        began = time.perf_counter()
        learner.step(train_set.take(stream.indices(step * size, size)[learner.share]), step)
        times.append(time.perf_counter() - began)
        world.wait()
        began = time.perf_counter()
        world.sum(gradients)
        reduces.append(time.perf_counter() - began)
    return {
        "step_s": statistics.median(times[WARM_UP:]),
        "all_reduce_s": statistics.median(reduces[WARM_UP:]),
        "gradient_bytes": 4.0 * gradients.numel(),
    }


def start_turn(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    """One turn in fresh processes: `count` of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    command += ["--data", arguments.data, "--preset", arguments.preset, "--threads", str(2 // count), "--turn"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def on_paper(flop_per_image: float, gradient_bytes: float, batch: int, gpus: int) -> dict[str, Any]:
    """Images per second of so many GPUs, if no all-reduce hides behind backward, and their share of n times one.

    A ring moves 2 (n - 1) / n of the bytes through each link, in 2 (n - 1) messages (Patarasuk and Yuan 2009).
    """
    compute_s = flop_per_image * batch / gpus / (GPU_FLOP_PER_S * GPU_SHARE)
    reduce_s = 2 * (gpus - 1) * (gradient_bytes / gpus / LINK_BYTES_PER_S[gpus] + LATENCY_S[gpus])
    return {
        "gpus": gpus,
        "world_batch": batch,
        "compute_s": compute_s,
        "all_reduce_s": reduce_s,
        "images_per_s": batch / (compute_s + reduce_s),
        "efficiency": compute_s / (compute_s + reduce_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn", action="store_true", help="one turn, inside a process that torchrun started")
    arguments = parser.parse_args()
    preset = get_preset(arguments.preset)
    config = replace(
        preset,
        data=arguments.data,
        threads=arguments.threads,
        device="cpu",
        optim=replace(preset.optim, coarse_fraction=0.0),
    )
    if arguments.turn:
        with join_world() as world:
            measured = take_turn(config, world)
            if world.leads:
                print(json.dumps(measured))
        return
    turns = [(start_turn(arguments, 1), start_turn(arguments, 2)) for _ in range(arguments.pairs)]
    ratios = [one["step_s"] / two["step_s"] for one, two in turns]
    batch = config.optim.batch_size
    result = {
        "preset": arguments.preset,
        "world_batch": batch,
        "gradient_bytes": turns[0][0]["gradient_bytes"],
        "one_process_step_s": statistics.median(one["step_s"] for one, _ in turns),
        "two_processes_step_s": statistics.median(two["step_s"] for _, two in turns),
        "two_processes_all_reduce_s": statistics.median(two["all_reduce_s"] for _, two in turns),
        "two_over_one": [statistics.median(ratios), min(ratios), max(ratios)],
    }
    result["on_paper"] = {
        name: [on_paper(*costs, batch, gpus) for gpus in LINK_BYTES_PER_S for batch in batches]
        for name, costs, batches in (
            (arguments.preset, _costs(config.model, 32, 10), (128, 4096)),
            ("ViT-B/16", _costs(VIT_B_16, 224, 1000), (1024, 4096)),
        )
    }
    print(json.dumps(result, indent=1))


def _costs(model: ModelConfig, image_size: int, num_classes: int) -> tuple[float, float]:
    """Operations of training on one colour image, and the bytes of all gradients."""
    shape = (model, image_size, 3, num_classes)
    return 3 * count_flops(*shape), 4.0 * count_parameters(*shape)


if __name__ == "__main__":
    main()
