"""One training run on several processes, a GPU each (sec. 5): torchrun starts them.

    torchrun --nproc_per_node 8 train.py --parallel ddp ...        all weights on every GPU
    torchrun --nproc_per_node 8 train.py --parallel fsdp ...       each GPU holds an eighth of them

The processes share the windows of a step, and the mean of their gradients is the gradient of the
whole batch: up to rounding, the run is that of one process. ddp (DistributedDataParallel) is for
models that fit one GPU; fsdp (fully_shard) splits weights, gradients and optimizer states, and
gathers the weights of one block at a time, when it computes. Checkpoints are those of one process.
"""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common import check

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another ends with an error


def start(kind, device):
    """Joins the processes that torchrun started -> rank, number of processes, this one's device.

    Only rank 0 prints. If one process ends with an error, torchrun ends the others.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if kind == "none":
        check(size == 1, f"torchrun started {size} processes: add --parallel ddp or fsdp")
        return 0, 1, device
    started = "RANK" in os.environ
    check(started, f"--parallel {kind}: start it with torchrun --nproc_per_node N train.py ...")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)
    rank = dist.get_rank()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, size, device


def share(kind, model, loss_on, dtype, device):
    """-> step_loss(batch, device), the loss of a process's windows: after its backward, p.grad is
    the mean over all processes. dtype: of the computation."""
    if kind == "fsdp":
        shard(model, dtype)
    both = BothPasses(model, loss_on)
    if kind == "ddp":
        # the gradients lie where they are exchanged: no second copy of them
        return DistributedDataParallel(both, gradient_as_bucket_view=True)
    return both


def shard(model, dtype):
    """fsdp: each process keeps its part of every weight."""
    policy = MixedPrecisionPolicy()
    if torch.bfloat16 in (dtype, model.embed.weight.dtype):
        # weights travel in bfloat16, gradients are added in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    # Embeddings and the last norm are in no block. They must be split again after each pass, too:
    # validation would leave them whole, where the optimizer expects its parts
    fully_shard(model, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(model, "write")  # gathers them as forward does


class BothPasses(torch.nn.Module):
    """Write and forward as one pass, the loss of a batch: what ddp wraps must be one module."""

    def __init__(self, model, loss_on):
        super().__init__()
        self.model = model
        self.loss_on = loss_on

    def forward(self, batch, device):
        return self.loss_on(self.model, batch, device)


def adding_up(step_loss, last):
    """A context: ddp exchanges gradients only with the last micro-batch of a step."""
    waits = isinstance(step_loss, DistributedDataParallel) and not last
    return step_loss.no_sync() if waits else nullcontext()


def reduce(numbers, how, device):
    """Numbers of every process -> their "mean" or "max" over all, the same everywhere."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    if how == "mean":
        total /= dist.get_world_size()
    return total.tolist()


def gather(model, optimizer=None):
    """-> the whole weights and the optimizer's states, by name. Under fsdp they are on the CPU, and
    None in all processes but rank 0; otherwise they are those in use, not copies."""
    wholes = {}  # by parameter: input and output embeddings may be one
    weights = {}
    states = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in wholes:
            wholes[p] = whole(p.detach())
            state = optimizer.state[p] if optimizer else {}
            states[name] = {key: whole(value) for key, value in state.items()}
        weights[name] = wholes[p]
    return weights, states if optimizer else None


def whole(x):
    """All of a tensor of which each process holds a part; anything else as it is."""
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()
    return x.cpu() if dist.get_rank() == 0 else None


def scatter(model, optimizer, saved):
    """Undoes gather: each process copies its part of what a checkpoint holds."""
    optimizer.zero_grad(set_to_none=True)  # else a nan would stay in every later gradient
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(part(saved["model"][name], p))
        state = saved["optimizer"][name]
        optimizer.state[p] = {key: part(value, p) for key, value in state.items()}


def part(x, like):
    """This process's part of a checkpoint's tensor, cut as its parameter `like` is."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.to(like.device, copy=True)
    if isinstance(like, DTensor) and x.dim() > 0:
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return x


def local(x):
    """This process's part of a tensor, or all of it if it is not split."""
    return x.to_local() if isinstance(x, DTensor) else x


def stop():
    """Parts from the other processes at the end of the command."""
    if dist.is_initialized():
        dist.destroy_process_group()
