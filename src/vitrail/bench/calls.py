"""What is timed, as a call to repeat: a training step, an inference, the bare matrix products of a step.

Peers train with AdamW on pixels that lie ready as normalised floats, as their READMEs would have a user write
it. Vitrail's step is the whole one, from uint8 pixels, crop and flip included; it uses AdamW here too.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.augment import Augment
from vitrail.bench.peers import IMAGE_SIZE, MLP_DIM, MODEL, NUM_CLASSES, PEERS, RUNTIMES, Setup
from vitrail.config import AugmentConfig, OptimConfig, Preprocessing, ResolvedConfig
from vitrail.data import ImageSet
from vitrail.evaluate import compute_logits
from vitrail.learner import Learner
from vitrail.resolve import prepare_cpu
from vitrail.vit import VisionTransformer

PREPROCESSING = Preprocessing(image_size=IMAGE_SIZE, num_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Task = Literal["train", "infer", "forward", "trace", "augment", "products_shared", "products_apart"]
Call = Callable[[], object]


def build_call(task: Task, setup: Setup, batch_size: int, threads: int) -> Call:
    """What to repeat to time `task`; one call handles `batch_size` images."""
    torch.manual_seed(0)
    if setup.name in RUNTIMES:
        return _build_runtime(setup, batch_size, threads)
    if setup.name != "vitrail":
        torch.set_num_threads(threads)
        return _build_training(setup, batch_size) if task == "train" else _build_inference(setup, batch_size)
    prepare_cpu(threads, trains=task == "train")
    if task in ("products_shared", "products_apart"):
        return _build_products(setup, batch_size, 1 if task == "products_shared" else threads)
    images = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(batch_size) % NUM_CLASSES, tuple("0123456789"), 0)
    if task == "train":
        return _build_our_training(setup, data, threads)
    if task == "augment":
        augment = Augment(AugmentConfig(), PREPROCESSING, NUM_CLASSES, seed=0)
        return lambda: augment(data.take(torch.arange(batch_size)), 0)
    return _build_our_inference(task, setup, data)


def _build_training(setup: Setup, batch_size: int) -> Call:
    model = PEERS[setup.name](setup.fused_attn).train()
    forward = torch.compile(model) if setup.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(batch_size) % NUM_CLASSES

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(setup):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def _build_inference(setup: Setup, batch_size: int) -> Call:
    model = PEERS[setup.name](setup.fused_attn).eval()
    forward = torch.compile(model) if setup.compile else model
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)

    def infer() -> Tensor:
        with torch.inference_mode(), _autocast(setup):
            return forward(images)

    return infer


def _autocast(setup: Setup) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if setup.precision == "bf16" else nullcontext()


def _build_our_training(setup: Setup, data: ImageSet, threads: int) -> Call:
    config = ResolvedConfig(
        device="cpu",
        threads=threads,
        precision=setup.precision,
        model=MODEL,
        optim=OptimConfig(optimizer="adamw", batch_size=len(data)),
        classes=data.class_names,
        preprocessing=PREPROCESSING,
        num_train=len(data),
        num_val=1,
        num_skipped=0,
        epoch_images=len(data),
        num_steps=1000,
        data_sha256="",
    )
    learner, everything = Learner(config), torch.arange(len(data))
    return lambda: learner.step(data.take(everything), 0)


def _build_our_inference(task: Task, setup: Setup, data: ImageSet) -> Call:
    """A single picture runs as `predict` runs it, many as `evaluate` does."""
    model = _build_our_model().to(DTYPES[setup.precision])
    pixels = torch.randn(len(data), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=DTYPES[setup.precision])
    if task == "infer" and len(data) > 1:
        return lambda: compute_logits(model, data, PREPROCESSING)
    return torch.inference_mode()(lambda: model.trace(pixels) if task == "trace" else model(pixels))


def _build_our_model() -> VisionTransformer:
    return VisionTransformer(MODEL, IMAGE_SIZE, 3, NUM_CLASSES).eval()


def _build_runtime(setup: Setup, batch_size: int, threads: int) -> Call:
    """Our weights, exported to ONNX, in one of the runtimes."""
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _build_our_model(),
            (torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE),),
            path,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
        if setup.name == "openvino":
            import openvino

            hints = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[setup.precision],
            }
            compiled: Any = openvino.Core().compile_model(path, "CPU", hints)
            return lambda: compiled(images)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {session.get_inputs()[0].name: images})


def _build_products(setup: Setup, batch_size: int, num_workers: int) -> Call:
    """The matrix products of a training step and nothing else: forward, and for both operands backward.

    Every product of one shape uses the same memory, so this is rather more than a step could reach. Each
    worker does its share of the batch on a thread of its own.
    """
    pool = ThreadPoolExecutor(
        num_workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads() // num_workers,)
    )
    shares = [_list_products(batch_size // num_workers, DTYPES[setup.precision]) for _ in range(num_workers)]

    def multiply(products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for a, b, out in products:
            torch.matmul(a, b, out=out)

    return lambda: list(pool.map(multiply, shares))


def _list_products(num_images: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(a, b, a·b) for each product of the blocks; the patch embedding and the head are left out as too small."""
    width, heads = MODEL.embed_dim, MODEL.num_heads
    tokens, per_head = (IMAGE_SIZE // MODEL.patch_size) ** 2 + 1, width // heads

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    def linear(rows: int, fan_in: int, fan_out: int) -> tuple[Tensor, Tensor]:
        return new(rows, fan_in), new(fan_out, fan_in).mT

    rows, looks = num_images * tokens, num_images * heads
    block = [linear(rows, width, 3 * width), linear(rows, width, width)]
    block += [linear(rows, width, MLP_DIM), linear(rows, MLP_DIM, width)]
    block += [(new(looks, tokens, per_head), new(looks, tokens, per_head).mT)]
    block += [(new(looks, tokens, tokens), new(looks, tokens, per_head))]
    # The last one is made of the class token alone, whose heads look at whole tokens (`Attention._look_once`).
    last = [linear(num_images, width, width), linear(num_images, width, width)]
    last += [linear(num_images, width, MLP_DIM), linear(num_images, MLP_DIM, width)]
    last += [(new(heads, num_images, per_head), new(heads, per_head, width))]
    last += [(new(num_images, heads, width), new(num_images, tokens, width).mT)]
    last += [(new(num_images, heads, tokens), new(num_images, tokens, width))]
    last += [(new(heads, num_images, width), new(heads, per_head, width).mT)]
    once, at_last = ([product for pair in pairs for product in _list_passes(*pair)] for pairs in (block, last))
    return once * (MODEL.depth - 1) + at_last


def _list_passes(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """a·b, and the products of both gradients, each laid out in memory as autograd lays them out."""
    out = a @ b
    of_b = (a.mT, out, torch.empty_like(b)) if b.is_contiguous() else (out.mT, a, torch.empty_like(b.mT))
    return [(a, b, out), (out, b.mT, torch.empty_like(a)), of_b]
