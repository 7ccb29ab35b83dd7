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
    wait(b.device)
    start = time.perf_counter()
    for _ in range(n):
        f()
    wait(b.device)
    return (time.perf_counter() - start) / n


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(b, runs, before=None, share=1.0):
    """runs {name: function} -> {name: seconds}, medians of nine rounds, the first dropped (7.5).

    In a round each has its turn, so that what else the machine does hits all alike; what is quick
    is called many times a turn. before(): precedes every turn, which is of one call then.
    No new round begins after share * b.seconds, but at least two count.
    """
    taken = {name: [] for name in runs}
    n_calls = dict.fromkeys(runs, 1)
    stop = time.perf_counter() + share * b.seconds
    for i in range(9):
        if i > 2 and time.perf_counter() > stop:
            break
        for name, f in runs.items():
            if before:
                before()
            seconds = clock(b, f, n_calls[name])
            taken[name].append(seconds)
            if i == 1 and not before:  # the first call builds and tunes things, the second tells
                n_calls[name] = 1 + int(0.01 / seconds)
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def roofline(b):
    """BW, bytes/s, and F, FLOP/s in b.dtype, of the device."""
    cuda = b.device.type == "cuda"
    n_bytes = 1 << 30 if cuda else 1 << 28
    width = 8192 if cuda else 2048
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    matrix = torch.randn(width, width, device=b.device).to(b.dtype)

    def copy():
        target.copy_(source)

    def multiply():
        return matrix @ matrix

    taken = times(b, dict(copy=copy, product=multiply), share=0.1)
    return 2 * n_bytes / taken["copy"], 2 * width**3 / taken["product"]


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
    made["threads"] = torch.get_num_threads()
    made["python"] = platform.python_version()
    for package in ("torch", "numpy", "faiss-cpu"):
        try:
            made[package] = version(package)
        except PackageNotFoundError:
            made[package] = "none"
    if b.device.type == "cuda":
        made["CUDA"] = torch.version.cuda
    config = b.config
    group = config.n_head // config.n_kv_head
    keys = config.n_recall * config.memory_tokens
    path, why = attention_path(b.device, b.dtype, config.max_context, config.head_dim, group, keys)
    built, reason = kernels.available(b.device)
    made["attention"] = f"{path} ({why})"
    made["kernels"] = f"yes ({reason})" if built else f"no ({reason})"
    made["BW, GB/s"] = round(b.BW / 1e9, 2)
    made["F, TFLOP/s"] = round(b.F / 1e12, 3)
    return made
