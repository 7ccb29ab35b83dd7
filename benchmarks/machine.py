"""The machine that bench.py runs on: a clock for it, what it can do, and its name."""

import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

import kernels
from memory import attention_path

# b, the bench, has: device, dtype, config, seconds, tmp, compile, and from roofline BW and F


def clock(b, f, n=1):
    """Seconds of a call of f, n of them in a row. A GPU works on its own: wait for it."""
    wait = torch.cuda.synchronize if b.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n):
        f()
    wait()
    return (time.perf_counter() - start) / n


def times(b, runs, before=None, share=1.0):
    """runs {name: function} -> {name: seconds}, medians of nine rounds, the first dropped (7.5).

    In a round each has its turn, so that what else the machine does hits all alike; what is quick
    is called many times a turn. before(): precedes every turn, which is of one call then.
    No new round begins after share * b.seconds, but at least two count.
    """
    taken, n, stop = {name: [] for name in runs}, {}, time.perf_counter() + share * b.seconds
    for i in range(9):
        if i > 2 and time.perf_counter() > stop:
            break
        for name, f in runs.items():
            if before:
                before()
            taken[name].append(clock(b, f, n.get(name, 1)))
            if i == 1 and not before:  # the first call builds and tunes things, the second tells
                n[name] = 1 + int(0.01 / taken[name][1])
    return {name: median(x[1:]) for name, x in taken.items()}


def roofline(b):
    """BW and F (in b.dtype) of the device."""
    cuda = b.device.type == "cuda"
    a = torch.zeros(1 << (30 if cuda else 28), dtype=torch.uint8, device=b.device)
    m = torch.randn(*[8192 if cuda else 2048] * 2, device=b.device).to(b.dtype)
    c = torch.empty_like(a)
    t = times(b, dict(copy=lambda: c.copy_(a), product=lambda: m @ m), share=0.1)
    return 2 * len(a) / t["copy"], 2 * len(m) ** 3 / t["product"]


def name_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.+)", info.read_text()) if info.exists() else None
    return f"CPU {found[1] if found else platform.machine()}"


def file_name(name):
    """
    >>> file_name("CPU Intel(R) Xeon(R) Platinum 8481C"), file_name("NVIDIA H100 80GB HBM3")
    ('cpu-intel-xeon-platinum-8481c', 'nvidia-h100-80gb-hbm3')
    """
    name = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(b, preset):
    """What every result says about how it came about, and which implementation ran and why."""
    made = dict(device=name_of(b.device), kind=b.device.type, preset=preset, dtype=str(b.dtype)[6:])
    made |= dict(threads=torch.get_num_threads(), python=platform.python_version())
    for package in ("torch", "numpy", "faiss-cpu"):
        try:
            made[package] = version(package)
        except PackageNotFoundError:
            made[package] = "none"
    if b.device.type == "cuda":
        made["CUDA"] = torch.version.cuda
    c = b.config
    heads = c.head_dim, c.n_head // c.n_kv_head, c.n_recall * c.memory_tokens
    path, why = attention_path(b.device, b.dtype, c.max_context, *heads)
    built, reason = kernels.available(b.device)
    made |= dict(attention=f"{path} ({why})", kernels=f"{'yes' if built else 'no'} ({reason})")
    return made | {"BW, GB/s": round(b.BW / 1e9, 2), "F, TFLOP/s": round(b.F / 1e12, 3)}
