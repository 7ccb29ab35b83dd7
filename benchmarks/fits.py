"""What fits on my card: the most memory that a training step of a shape holds at once.

    python benchmarks/fits.py --preset 2.4b --context 2048
    python benchmarks/fits.py --preset 2.4b --context 2048 --measure      and runs it, on this GPU

Counted, not estimated: a whole step of train.py runs on tensors that have shapes and no numbers
(PyTorch's FakeTensor), and every storage is counted from its making to its end: weights, gradients,
AdamW's states, activations, and what lies between. Not counted: the CUDA context and the libraries'
workspaces (about 1 GB together), and what the allocator loses between blocks. Beside it stands what
`bench.py fits` has measured, if benchmarks/ has the JSON of a GPU: there fused kernels run, which
keep fewer activations. 1 GB = 10^9 bytes.
"""

import argparse
import json
import math
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from common import check, run  # noqa: E402
from model import PRESETS, Config, Memory3  # noqa: E402
from optimizer import first_states  # noqa: E402

# what each row of the table changes, and its flags
CASES = {
    "as it is": {},
    "--recompute": dict(recompute=True),
    "--param_dtype bfloat16": dict(param_dtype="bfloat16"),
    "--param_dtype bfloat16 --recompute": dict(param_dtype="bfloat16", recompute=True),
}
CARDS = (16, 24, 40, 80, 141)  # GB
SOME = 16  # windows, so many that their activations are more than the optimizer's step takes


class Counted(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive = {}  # bytes of each storage
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.alive:
            return  # a view, or changed in place
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key)


def step(config, cfg, device):
    """One step of cfg.batch windows, all at a time, as train.py's: the second of a run, for AdamW's
    states are there from the first on."""
    dtype = getattr(torch, cfg.param_dtype)
    with torch.device(device):
        torch.set_default_dtype(dtype)  # of the weights that are made now
        model = Memory3(config)
        torch.set_default_dtype(torch.float32)
        model.recompute = cfg.recompute
        optimizer = train.make_optimizer(model, cfg)
        first_states(optimizer)
        if cfg.param_dtype == "bfloat16":
            for state in optimizer.state.values():
                state["step"] = 1  # RoundedAdamW reads it, and a tensor without numbers has none
        tokens = torch.zeros((cfg.batch, cfg.context), dtype=torch.int64)
        references = recall = None
        if cfg.stage == "explicit":
            n_chunks = cfg.context // config.chunk_len
            n = cfg.batch * n_chunks
            references = torch.zeros((n, config.ref_len), dtype=torch.int64)
            recall = torch.zeros((cfg.batch, n_chunks, config.n_recall), dtype=torch.int64)
    bf16 = cfg.dtype == "bfloat16"
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        loss = train.loss_on(model, (tokens, tokens, references, recall), device)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()


def counted(config, cfg):
    """The most bytes of a step, with the fused attention of a GPU, whose tensors are the CPU's."""
    counter = Counted()
    fused = mock.patch("memory.attention_path", lambda *rest: ("cpu-flash", "counted"))
    # tokens without numbers cannot be checked
    unchecked = mock.patch("torch.compiler.is_compiling", lambda: True)
    with FakeTensorMode(), fused, unchecked, counter:
        step(config, cfg, "cpu")
    return counter.peak


def measured(config, cfg):
    """The most bytes that PyTorch's allocator held in a step on this GPU, or None: too few."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(config, cfg, "cuda")
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def windows_that_fit(one, some, twice):
    """Peaks of 1, SOME, 2 * SOME windows -> bytes of one, of each more, how many fit each of CARDS.

    With few windows the peak may be in the optimizer's step, which no window makes higher; with
    many it is at the end of the forward pass, and every window adds the same.
    >>> windows_that_fit(10e9, 12e9, 28e9)
    (10000000000.0, 1000000000.0, [20, 28, 44, 84, 145])
    """
    each = (twice - some) / SOME
    most = []
    for size in CARDS:
        n = SOME + math.floor((1e9 * size - some) / each)
        most.append(max(n, 0) if one <= 1e9 * size else 0)
    return one, each, most


def from_bench(preset, context):
    """What `bench.py fits` measured on a GPU, one window: its name and {(stage, flags): bytes}."""
    for file in sorted(Path(__file__).parent.glob("*.json")):
        found = json.loads(file.read_text()).get("fits", {})
        there = found.get("kind") == "cuda" and found.get("preset") == preset
        if there and context == Config.preset(preset).max_context:
            break
    else:
        return None, {}
    peaks = {}
    for name, gib in found["figures"].items():
        stage, _, how = name.removesuffix(": peak memory, GiB").partition(", ")
        for flags, changes in CASES.items():
            weights = f"{changes.get('param_dtype', 'float32')} weights"
            if how == weights + ", recomputing" * changes.get("recompute", False):
                peaks[stage, flags] = gib * 2**30
    return found["device"], peaks


def row_of(stage, flags, one, measured, each, most):
    """A row of the table. Numbers are bytes; measured: None where there is nothing."""
    shown = f"{measured / 1e9:.2f}" if measured else ""
    fits = "".join(f"{n:>7}" for n in most)
    return f"{stage + ' ' + flags:45}{one / 1e9:>9.2f}{shown:>10}{each / 1e9:>8.3f}{fits}"


def settings(stage, context, windows, dtype, changes):
    return train.TrainConfig(stage=stage, context=context, batch=windows, dtype=dtype, **changes)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=list(PRESETS), default="2.4b", help="(default 2.4b)")
    p.add_argument("--context", type=int, help="tokens of a window (default: the preset's most)")
    p.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of products"
    )
    p.add_argument("--measure", action="store_true", help="also runs each step on this GPU")
    args = p.parse_args(argv)
    config = Config.preset(args.preset)
    context = args.context or config.max_context
    check(1 <= context <= config.max_context, f"--context {context}: 1 to {config.max_context}")
    whole = context % config.chunk_len == 0
    check(whole, f"--context {context}: no multiple of chunk_len {config.chunk_len}")
    check(torch.cuda.is_available() or not args.measure, "--measure: there is no CUDA here")

    print(f"{args.preset}, windows of {context} tokens, products in {args.dtype}")
    device, peaks = from_bench(args.preset, context)
    cards = "".join(f"{size:>7}" for size in CARDS)
    above = "GB, 1 window".rjust(19) + "each".rjust(8) + "  windows on a card of"
    print(f"{'':45}{above}")
    print(f"{'GB at the peak of a step':45}{'counted':>9}{'measured':>10}{'more':>8}{cards} GB")
    rows = {}
    for stage in ("implicit", "explicit"):
        for flags, changes in CASES.items():
            counts = []
            for n in (1, SOME, 2 * SOME):
                cfg = settings(stage, context, n, args.dtype, changes)
                counts.append(counted(config, cfg))
            one, each, most = windows_that_fit(*counts)
            peak = peaks.get((stage, flags))
            line = row_of(stage, flags, one, peak, each, most)
            if args.measure:
                here = measured(config, settings(stage, context, 1, args.dtype, changes))
                line += f"  here {here / 1e9:.2f}" if here else "  too large here"
            print(line, flush=True)
            rows[stage, flags] = one, each, most
    if peaks:
        print(f"measured: {device}, python bench.py fits")
    return rows


if __name__ == "__main__":
    run(main)
