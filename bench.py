"""How fast it is beside how fast it could be, on the machine at hand (sec. 7.5, Remark 7.1).

    python bench.py all            everything; meant to fit into 10 minutes on a GPU
    python bench.py attention      chunk attention beside concatenating, looping, and no memory
    python bench.py throughput     the workload of Table 7.6, and where its time goes
    python bench.py train          a training step of both stages
    python bench.py load           memories from the drive
    python bench.py codec          the vector codec beside FAISS
    python bench.py search         the flat search beside a plain product

A time says little about another machine. So goals are ratios: of two ways to do the same, which
take turns in one process, or of a floor to a time. The floor is what this device was just measured
to do: BW, bytes/s of a large copy, and F, FLOP/s of a large product. Weights and memories are
random numbers: they cost what trained ones cost.

In benchmarks/: machine.py (the clock), baselines.py, training.py (a step), table.py (the goals).
"""

import argparse
import gc
import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

import cost
from bank import MemoryBank
from benchmarks import baselines, table
from benchmarks.machine import describe, file_name, name_of, roofline, times
from benchmarks.training import training_step
from common import UserError, find_device, run, write_json
from generate import generate
from model import PRESETS, Config, Memory3
from train import TrainConfig

# -- Attention ---------------------------------------------------------------------------------


def attention(b):
    """Eq. (3.1) in one layer, T = max_context. Errors: the worst of the output and five gradients
    against float64; of the whole tensor, |x - y| / |y|, and of one number, over the largest."""
    out, case = {}, partial(baselines.attention_case, b)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors, dout, ways = case(min(b.config.max_context, 1000) - 3, dtype)
        exact = [x.detach().double().requires_grad_() for x in tensors]  # the same numbers
        want = baselines.both(ways["concatenate"], exact, dout.double())
        for name, p in (("error", 2), ("error of one number", math.inf)):
            pairs = zip(baselines.both(ways["merged"], tensors, dout), want, strict=True)
            errors = [((x - y).norm(p) / y.norm(p)).item() for x, y in pairs]
            out[f"{name}, {str(dtype)[6:]}"] = max(errors)
    tensors, dout, ways = case(b.config.max_context, b.dtype)
    with torch.no_grad():
        forward = times(b, {k: partial(f, *tensors) for k, f in ways.items()})
    t = times(b, {k: partial(baselines.both, f, tensors, dout) for k, f in ways.items()})
    out |= {f"forward: {k}, ms": x * 1e3 for k, x in forward.items()}
    out |= {f"forward + backward: {k}, ms": x * 1e3 for k, x in t.items()}
    return out | {f"merged / {k}": t["merged"] / t[k] for k in t if k != "merged"}


# -- Throughput: Table 7.6 ---------------------------------------------------------------------


def throughput(b):
    """2C tokens in, 2C out (128 + 128): three retrievals of R memories for each sequence."""
    with torch.device(b.device):
        model = Memory3(b.config).to(b.dtype).eval()  # random weights
    model.fingerprint = lambda: "random"  # to hash billions of weights takes minutes
    with tempfile.TemporaryDirectory(dir=b.tmp) as folder:
        codec, bank = baselines.random_codec(b.config), baselines.random_bank
        banks = dict(bf16=bank(b, folder, 96), codes=bank(b, folder, 96, codec))
        out = {"page cache dropped": baselines.drop(banks["bf16"])}
        for B in (32, 1):
            out |= {f"batch {B}: {k}": x for k, x in workload(b, model, banks, B).items()}
            out |= {f"batch {B}: {k}": x for k, x in apart(b, model, banks["bf16"], B).items()}
    return out


def workload(b, model, banks, B):
    """Whole runs and decoding steps."""
    c, C, T, traces = b.config, b.config.chunk_len, 2 * b.config.chunk_len, {}
    x = torch.randint(c.vocab_size, (B, T), device=b.device)  # the prompts
    text = torch.randint(c.vocab_size, (B, c.n_recall * c.ref_len), device=b.device)  # RAG's

    def run(name, n, *memory, tokens=x):
        trace = generate(model, tokens, n, *memory, plain=not memory)[1]
        traces.setdefault(name, []).append(trace.seconds)

    runs = dict(without=partial(run, "without", T))
    for name, bank in banks.items():  # each run recalls what no other has just read
        runs[name] = partial(run, name, T, baselines.Unique(len(bank)), bank)
    runs["RAG"] = partial(run, "RAG", T, tokens=torch.cat([text, x], 1))
    # A step is what more tokens of a chunk take: all else is in both. Memories come from RAM.
    warm = MemoryBank.open(banks["bf16"].path, model, banks["bf16"].references)
    for n in (2, C):
        runs[f"plain {n}"] = partial(run, "", n)
        runs[f"memory {n}"] = partial(run, "", n, baselines.Unique(B * c.n_recall), warm)
    t = times(b, runs, lambda: [baselines.drop(bank) for bank in banks.values()], share=4)
    plain, step = ((t[f"{k} {C}"] - t[f"{k} 2"]) / (C - 2) for k in ("plain", "memory"))
    out = {"step, ms": step * 1e3, "step, with / without": step / plain}
    out["floor / step"] = baselines.step_bytes(b, B, T + C / 2, memory=True) / b.BW / step
    for name, seconds in list(t.items())[:4]:
        least = baselines.floor(b, B, T + text.shape[1] * (name == "RAG"), T, name in banks)
        out |= {f"{name}: tokens/s": B * T / seconds, f"{name}: floor / time": least / seconds}
        out |= {f"{name} / without": t["without"] / seconds} if name != "without" else {}
        for key in traces[name][0]:  # Remark 7.1's breakdown, by generate's own clock
            out[f"{name}: {key}, ms"] = 1e3 * median(s[key] for s in traces[name][1:])
    return out


def apart(b, model, bank, B):
    """What is not in a run, or not told by its clock: of one retrieval, and of the prompt."""
    with torch.inference_mode():
        t = times(b, baselines.pieces(b, model, bank, B))
    out = {f"apart: {k}, ms": s * 1e3 for k, s in t.items()}
    return out | {"prefill, with / without": t["prefill, memory"] / t["prefill, plain"]}


# -- Training ----------------------------------------------------------------------------------


def train(b):
    """A step of 16 windows of max_context tokens; where not even one fits, with half the layers."""
    c, half = b.config, "half the layers: "
    if not (out := training(b, c)):
        c = replace(c, n_layer=c.n_layer // 2, n_memory_layer=c.n_memory_layer // 2)
        out = {half + name: x for name, x in training(b, c).items()}
    return out or {half + "fits": False}


def training(b, c):
    """{} where a window of either stage does not fit into the device's memory."""
    cfg, out, runs = TrainConfig(), {}, {}
    step, largest = training_step(b, c, cfg)
    for stage, explicit in (("implicit", False), ("explicit", True)):
        if not (micro := largest(explicit)):
            return {}
        runs[stage], out[f"{stage}: micro-batch"] = partial(step, micro, explicit), micro
        if b.device.type == "cuda":
            out[f"{stage}: peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    t = times(b, runs)
    for stage, s in t.items():
        flops = cfg.batch * cost.step_flops(c, stage == "explicit")  # counted, not measured
        out |= {f"{stage}: step, s": s, f"{stage}: tokens/s": cfg.batch * c.max_context / s}
        out[f"{stage}: MFU"] = flops / s / b.F
    return out | {"explicit / implicit": t["explicit"] / t["implicit"]}


# -- Loading, codec, search --------------------------------------------------------------------


def load(b):
    """160 memories a time, from the drive and from the page cache."""
    out, k = {}, 32 * b.config.n_recall
    with tempfile.TemporaryDirectory(dir=b.tmp) as folder:
        bank = baselines.random_bank(b, folder, 32)
        runs, out["page cache dropped"] = baselines.readers(bank, k), baselines.drop(bank)
        cold = times(b, runs, partial(baselines.drop, bank))
        (bank.path / "memories.bin").read_bytes()  # into the page cache
        warm = times(b, runs)
    for state, t in (("cold", cold), ("warm", warm)):
        out |= {f"{state}: {x}, GB/s": k * bank.record_bytes / s / 1e9 for x, s in t.items()}
        out |= {f"{state}: bank / {x}": t[x] / t["bank"] for x in ("preadv", "memmap")}
    return out


def codec(b):
    """The codec beside FAISS on one thread: decoding 160 memories, encoding 4,096 vectors."""
    c, codec, faiss = b.config, baselines.random_codec(b.config), None
    x = torch.randn(4096, c.head_dim)  # keys and values to encode
    codes = baselines.random_codes(c, codec, 32 * c.n_recall).view(-1, codec.bytes)  # (N, 14)
    with suppress(ImportError):  # without FAISS: only how fast it decodes
        import faiss

        faiss.omp_set_num_threads(1)
        codec, index = baselines.trained(codec, c.head_dim)
    runs = {"decode into the cache": baselines.decoding(b, 32, codec.to(b.device))}
    runs["decode"] = partial(codec.decode, codes.to(b.device))
    if faiss:
        runs |= {"FAISS decode": partial(index.sa_decode, codes.numpy())}
        runs |= {"encode": partial(codec.encode, x)}
        runs |= {"FAISS encode": partial(index.sa_encode, x.numpy())}
    t = times(b, runs)
    out = {f"{k}, vectors/s": len(x if "encode" in k else codes) / s for k, s in t.items()}
    out["decode 160 memories, ms"] = t["decode into the cache"] * 1e3
    if faiss:
        want = torch.from_numpy(index.sa_decode(codes.numpy()))
        difference = (codec.decode(codes).cpu() - want).abs().max() / want.abs().max()
        same = (codec.encode(x).numpy() == index.sa_encode(x.numpy())).all(1)
        out |= {"decode - FAISS": float(difference), "codes equal": float(same.mean())}
        out["decode / FAISS"] = t["FAISS decode"] / t["decode into the cache"]
        faiss.omp_set_num_threads(torch.get_num_threads())
    return out


def search(b):
    """32 queries of 1,024 numbers: Retriever.search beside a product and topk, on the CPU."""
    retriever, x, q = baselines.flat(1024, 32)
    x, q = torch.from_numpy(x), torch.from_numpy(q)  # (N, 1024), (32, 1024)
    runs = dict(FAISS=lambda: retriever.search([""] * 32, 5), torch=lambda: (q @ x.T).topk(5))
    t = times(b, runs)
    ratio = {"FAISS / torch": t["FAISS"] / t["torch"]}
    return ratio | {f"{k}, ms": s * 1e3 for k, s in t.items()}


# -- Command line ------------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (attention, throughput, train, load, codec, search)}


def main(argv=None):
    """Measures, prints and keeps the parts asked for; {part: what was measured on this device}."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("part", choices=["all", *PARTS])
    p.add_argument("--preset", choices=PRESETS, help="2.4b; for a whole model on a CPU: toy")
    p.add_argument("--device", default="auto", help="cuda where there is one")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="on a GPU: bfloat16")
    p.add_argument("--seconds", type=float, default=20, help="for one comparison, about")
    p.add_argument("--compile", action="store_true", help="train with torch.compile")
    p.add_argument("--tmp", default="out", help="a directory on the drive to read memories from")
    p.add_argument("--out", default="benchmarks", help='results go to OUT/<device>.json ("": none)')
    b = SimpleNamespace(**vars(p.parse_args(argv)))
    b.device = find_device(b.device)
    cuda = b.device.type == "cuda"
    b.dtype = getattr(torch, b.dtype or ("bfloat16" if cuda else "float32"))
    if cuda:
        torch.cuda.set_device(b.device)  # what waits and counts asks the current one
    os.makedirs(b.tmp, exist_ok=True)
    os.makedirs(b.out or b.tmp, exist_ok=True)
    b.BW, b.F = roofline(b)  # bytes/s, FLOP/s
    file = Path(b.out) / f"{file_name(name_of(b.device))}.json"
    parts = json.loads(file.read_text()) if b.out and file.exists() else {}
    for part in PARTS if b.part == "all" else [b.part]:
        gc.collect()  # what a part leaves, models of billions of weights
        toy = not cuda and part in ("throughput", "train")  # a whole model
        preset = b.preset or ("toy" if toy else "2.4b")
        b.config = Config.preset(preset)
        made = describe(b, preset)
        print(f"\n{part}:", "; ".join(f"{k} {v}" for k, v in made.items()))
        try:
            made["figures"] = PARTS[part](b)
        except (UserError, OSError, ImportError, RuntimeError) as e:
            if b.part != "all":
                raise
            print(f"{part} is not measured: {e}")  # the others still are
            continue
        for name, x in made["figures"].items():
            print(f"  {name:42} {x:12.5g}" if isinstance(x, float) else f"  {name:42} {x!s:>12}")
        parts[part] = made
        if b.out:
            write_json(file, parts)  # after each part: a kill loses one
    print("", *table.lines(parts), json.dumps(parts), sep="\n")
    return parts


if __name__ == "__main__":
    run(main)
