"""Many processes that train one model: who each is, and the little they say to each other.

`torchrun` starts the processes and tells each its place; the collectives, DistributedDataParallel and
FSDP2 are PyTorch's own. What is said is numbers in tensors: no object is ever pickled. Alone, nothing
here does anything, so that one process and many run the same code.
"""

import os
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes of a run: `size` of them, `local_size` on this machine; this one is number `rank`."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """This process's part of `count` things: int64, in order; the parts are disjoint and hold all."""
        return torch.arange(count).tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, *values: int) -> list[int]:
        """The largest of each value over the processes."""
        if self.size == 1:
            return list(values)
        highest = torch.tensor(values)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return [int(value) for value in highest]

    def agree(self, value: float) -> float:
        """The first process's value, on all of them: for what each would measure a little differently."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.item()

    def wait(self) -> None:
        """Go on only when all processes have come here."""
        self.sum(torch.zeros(1))


@contextmanager
def join_world() -> Generator[World]:
    """Meet the other processes that torchrun started, if it did: gloo between CPUs, nccl between GPUs."""
    if "WORLD_SIZE" not in os.environ:
        yield World()
        return
    # Said once by every process of gradients that are not laid out as their weights are; it costs us nothing seen.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    # torchrun's store outlives its processes: without a name of their own, those started again would now and then
    # read the addresses of those that died, and knock in vain (pytorch/pytorch#135712, #167288).
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
    try:
        yield World(rank, size, int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()


def replicate(module: nn.Module, example: Tensor) -> nn.Module:
    """`module` with its gradients summed over the processes, in fp32, while backward still runs.

    DistributedDataParallel would take the mean and, in bf16, add in bf16. A loss here is already a part
    of the whole batch's, so the sum is what is wanted. After its first backward it sorts gradients into other
    buckets, and where three processes or more add up a bucket, the order is another too: one backward on
    `example` is taken here, so that a resumed run's first step adds as an undisturbed one's does.
    """
    replica = DistributedDataParallel(module)
    replica.broadcast_buffers = False  # they are brought home with the gradients
    replica.register_comm_hook(None, _sum_in_fp32)
    replica(example).sum().backward()
    replica.zero_grad()
    return replica


def _sum_in_fp32(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradients = bucket.buffer().float()
    work = dist.all_reduce(gradients, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda summed: bucket.buffer().copy_(summed.value()[0]))


def shard(model: nn.Module, dtype: torch.dtype, world: World) -> None:
    """Let each process hold a part of every tensor of `model` and of its gradients and optimizer state (FSDP2).

    A block is gathered in `dtype` when it is needed. Gradients are the mean over the processes, taken in fp32.
    """
    # FSDP2 takes a second to import, and few runs need it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in cast(nn.ModuleList, model.get_submodule("blocks")):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def sharing_gradients(module: Any, now: bool) -> Generator[None]:
    """Around a forward and backward: whether its gradients go to the other processes at once, or wait."""
    waiting: AbstractContextManager[None] = nullcontext()
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
        module.set_requires_gradient_sync(now)
    elif isinstance(module, DistributedDataParallel) and not now:
        waiting = cast(AbstractContextManager[None], module.no_sync())
    with waiting:
        yield


def gather(tensor: Any) -> Tensor:
    """The whole of a tensor, of which each process may hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole `tensor`, cut as `like` is."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
