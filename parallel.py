"""One training run on several processes, a GPU each (sec. 5): torchrun starts them.

    torchrun --nproc_per_node 8 train.py --parallel ddp ...        all weights on every GPU
    torchrun --nproc_per_node 8 train.py --parallel fsdp ...       each GPU holds an eighth of them

The processes share the windows of a step, and the mean of their gradients is the gradient of the
whole batch: up to rounding, the run is that of one process. ddp (DistributedDataParallel) is for
models that fit one GPU; fsdp (fully_shard) splits weights, gradients and optimizer states, and
gathers the weights of one block at a time, when it computes.

Files. What is whole, such as a model.pt or the first numbers of a new model, the first process
alone reads and writes; each gets its part of one tensor after the other, so that neither a host nor
a GPU holds a copy a process. Under fsdp each process saves the parts that it has
(torch.distributed.checkpoint) into a directory beside last.pt, which names it and has a checksum of
every file. Any number of processes goes on from either, one without torchrun, too.
"""

import os
import re
import shutil
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError, check, checksum

# A process that waits longer for another ends with an error: in a step of training, and while
# another one reads or writes files, which a slow disk may take long for
TIMEOUT = timedelta(minutes=10)
FILE_TIMEOUT = timedelta(hours=2)
file_group = None  # all processes, on their CPUs, with the second timeout


# -- Processes --------------------------------------------------------------------------------


def start(kind, device):
    """Joins the processes that torchrun started -> rank, number of processes, this one's device.

    If one process ends with an error, torchrun ends the others.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if kind == "none":
        check(size == 1, f"torchrun started {size} processes: add --parallel ddp or fsdp")
        return 0, 1, device
    started = "RANK" in os.environ
    check(started, f"--parallel {kind}: start it with torchrun --nproc_per_node N train.py ...")
    return join(device)


def join(device):
    """-> rank, number of processes, this one's device, when all have come."""
    global file_group
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        file_group = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    return dist.get_rank(), dist.get_world_size(), device


def run(main, *args):
    """main(*args), and parts from the other processes if all end alike."""
    try:
        main(*args)
    except UserError as error:
        if error.everywhere:
            stop()
        raise
    stop()


def stop():
    """Parts from the other processes, before Python ends.

    Python aborts if a thread of gloo then still has to give back a tensor, for which it needs the
    interpreter's lock. It gets that while this one sleeps.
    """
    global file_group
    if dist.is_initialized():
        dist.destroy_process_group()
        file_group = None
        time.sleep(0.2)


def together(function, *args):
    """function(*args) in every process, when all have ended; for what deals with files.

    A UserError of one is raised in all: none waits for it in vain, and the first process says it.
    """
    result = None
    fault = None
    try:
        result = function(*args)
    except UserError as error:
        fault = str(error)
    faults = [found for found in everywhere(fault) if found is not None]
    if faults:
        error = UserError(faults[0])
        error.everywhere = True
        raise error
    return result


def everywhere(value):
    """A value of each process -> the list of them all, in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=file_group)
    return values


def reduce(numbers, how, device):
    """Numbers of every process -> their "mean" or "max" over all, the same everywhere."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    if how == "mean":
        total /= dist.get_world_size()
    return total.tolist()


# -- Model and gradients ----------------------------------------------------------------------


def share(kind, model, loss_on, dtype, device):
    """-> step_loss(batch, device), the loss of a process's windows: after its backward, p.grad is
    the mean over all processes. dtype: of the computation.

    A model on the meta device gets its memory here, under fsdp for its parts alone, and no numbers:
    see load.
    """
    if kind == "fsdp":
        shard(model, dtype, device)
    if model.device.type == "meta":
        model.to_empty(device=device)
        if model.config.tied:
            model.head.weight = model.embed.weight
    both = BothPasses(model, loss_on)
    if kind == "ddp":
        # the gradients lie where they are exchanged: no second copy of them
        return DistributedDataParallel(both, gradient_as_bucket_view=True)
    return both


def shard(model, dtype, device):
    """fsdp: each process keeps its part of every weight."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))  # else it takes a GPU it finds
    policy = MixedPrecisionPolicy()
    if torch.bfloat16 in (dtype, model.embed.weight.dtype):
        # weights travel in bfloat16, gradients are added in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Embeddings and the last norm are in no block. They must be split again after each pass, too:
    # validation would leave them whole, where the optimizer expects its parts
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
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


# -- Weights and optimizer states -------------------------------------------------------------


def whole_weights(model):
    """-> a state dict. Under fsdp it is on the CPU, and of None in all processes but the first;
    otherwise its tensors are those in use, not copies."""
    wholes = {}  # by parameter: input and output embeddings may be one
    weights = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in wholes:
            wholes[p] = whole(p.detach())
        weights[name] = wholes[p]
    return weights


def whole(x):
    """All of a tensor of which each process holds a part; anything else as it is."""
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()
    return x.cpu() if dist.get_rank() == 0 else None


def local(x):
    """This process's part of a tensor, or all of it if it is not split."""
    return x.to_local() if isinstance(x, DTensor) else x


def tensors(model, optimizer):
    """{name: tensor} of all weights and states: those in use, in parts where they are split."""
    found = {}
    for name, p in model.named_parameters():
        found[f"model.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def load(model, optimizer, state, folder, verify=True):
    """Copies what a checkpoint holds into the model and, if it is of a run, into the optimizer.

    state: the checkpoint as of read_checkpoint; processes but the first need none of its tensors.
    folder: the directory that it lies in.
    """
    optimizer.zero_grad(set_to_none=True)  # else a nan would stay in every later gradient
    if state.get("shards"):
        load_shards(folder, tensors(model, optimizer), state["shards"], verify)
        return
    for name, p in model.named_parameters():
        deal(state["model"] and state["model"][name], p.detach())
        if "optimizer" in state:
            saved = state["optimizer"]
            for key, target in optimizer.state[p].items():
                deal(saved and saved[name][key], target)


def deal(x, target):
    """Copies x, which the first process has whole, into `target`: each process takes its part."""
    if dist.is_initialized():
        # of the whole, one tensor at a time
        device = local(target).device
        if dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        whole_x = torch.empty(target.shape, dtype=target.dtype, device=device)
        if dist.get_rank() == 0:
            whole_x.copy_(torch.as_tensor(x))
        if isinstance(target, DTensor):
            x = distribute_tensor(whole_x, target.device_mesh, target.placements)
        else:
            dist.broadcast(whole_x, 0)
            x = whole_x
    target.copy_(torch.as_tensor(x))


# -- Checkpoints in parts ---------------------------------------------------------------------


def save_shards(folder, model, optimizer):
    """Each process writes its parts of weights and states into the directory `folder`, which is
    made anew. Returns what load_shards wants: dict(folder=name, files={name: checksum})."""
    parts = tensors(model, optimizer)

    def prepare():
        for name, x in parts.items():
            finite = local(x).isfinite().all()
            check(finite, f"{folder}: {name} holds nan or infinite numbers; nothing is saved")
        if dist.get_rank() == 0 and folder.exists():
            shutil.rmtree(folder)  # half written by a run that was killed

    together(prepare)
    try:
        dcp.save(parts, checkpoint_id=folder, process_group=file_group)
    except CheckpointException as error:  # of all processes, whoever failed
        fault = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} cannot be written: {fault}") from None
    names = [path.name for path in folder.iterdir()]
    own = {name: checksum(folder / name) for name in share_of(names)}
    files = {}
    for found in everywhere(own):
        files |= found
    return dict(folder=folder.name, files=files)


def load_shards(folder, parts, shards, verify=True):
    """Fills the tensors of `parts` with those of the directory that `shards` names: each process
    reads what it has a part of, however many processes wrote it. verify: check the files first,
    each process some of them."""
    folder = folder / shards["folder"]

    def check_files():
        for name in share_of(shards["files"]):
            cure = "take another copy of it, or train again"
            check((folder / name).is_file(), f"{folder / name} is missing: {cure}")
            same = not verify or checksum(folder / name) == shards["files"][name]
            check(same, f"{folder / name} is damaged: its bytes have changed; {cure}")

    together(check_files)
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        # .metadata is a pickle, which can run what its writer likes: resume only runs of your own
        dcp.load(parts, checkpoint_id=folder, process_group=file_group, no_dist=alone)


def share_of(names):
    """Those files of a directory of parts that this process checks: if it wrote some, its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    own = []
    for name in names:
        writer = re.match(r"__(\d+)_", name)  # .metadata has none
        if int(writer[1] if writer else 0) % size == rank:
            own.append(name)
    return own
