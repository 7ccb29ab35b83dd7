"""How fast it is beside how fast it could be, on the machine at hand (sec. 7.5, Remark 7.1).

    python bench.py all            everything; fits into 10 minutes on a GPU
    python bench.py attention      chunk attention beside concatenating, looping, and no memory
    python bench.py throughput     the workload of Table 7.6, and where its time goes
    python bench.py train          a training step of both stages
    python bench.py fits           the memory that one window's step takes, by what saves some
    python bench.py load           memories from the drive
    python bench.py codec          the vector codec beside FAISS
    python bench.py search         the flat search beside a plain product
    python bench.py peers          a plain GPT's training step, transformers' decoding

A time says little about another machine. So goals are ratios: of two ways to do the same, which
take turns in one process, or of a floor to a time. The floor is what this device was just measured
to do: BW, bytes/s of a large copy, and F, FLOP/s of a large product. Weights and memories are
random numbers: they cost what trained ones cost.

In benchmarks/: machine.py (the clock), baselines.py, training.py (a step), peers.py, table.py (the
goals). A figure is a number in a dict {name: number}, in the order in which it is printed.
"""

import argparse
import gc
import json
import math
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

import cost
from bank import MemoryBank
from benchmarks import baselines, peers, table
from benchmarks.machine import describe, file_name, name_of, roofline, times
from benchmarks.training import TrainingStep, empty
from common import UserError, find_device, optional, run, write_json
from generate import generate
from memory import Memories
from model import PRESETS, Cache, Config, Memory3
from train import TrainConfig

# -- Attention ---------------------------------------------------------------------------------


def attention(b):
    """Eq. (3.1) in one layer, T = max_context."""
    out = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out |= attention_errors(b, dtype)
    tensors, dout, ways = baselines.attention_case(b, b.config.max_context, b.dtype)
    forward = {}
    forward_and_backward = {}
    for name, way in ways.items():
        forward[name] = partial(way, *tensors)
        forward_and_backward[name] = partial(baselines.both, way, tensors, dout)
    with torch.no_grad():
        for name, seconds in times(b, forward).items():
            out[f"forward: {name}, ms"] = seconds * 1e3
    taken = times(b, forward_and_backward)
    for name, seconds in taken.items():
        out[f"forward + backward: {name}, ms"] = seconds * 1e3
    for name in ("concatenate", "loop", "causal"):
        out[f"merged / {name}"] = taken["merged"] / taken[name]
    return out


def attention_errors(b, dtype):
    """The worst of the output and five gradients against float64: of the whole tensor,
    |x - y| / |y|, and of one number, over the largest."""
    T = min(b.config.max_context, 1000) - 3
    tensors, dout, ways = baselines.attention_case(b, T, dtype)
    exact_tensors = [x.detach().double().requires_grad_() for x in tensors]  # the same numbers
    exact = baselines.both(ways["concatenate"], exact_tensors, dout.double())
    ours = baselines.both(ways["merged"], tensors, dout)
    whole = []
    single = []
    for x, y in zip(ours, exact, strict=True):
        difference = x - y
        whole.append((difference.norm() / y.norm()).item())
        single.append((difference.norm(math.inf) / y.norm(math.inf)).item())
    name = str(dtype).removeprefix("torch.")
    return {f"error, {name}": max(whole), f"error of one number, {name}": max(single)}


# -- Throughput: Table 7.6 ---------------------------------------------------------------------


def throughput(b):
    """2C tokens in, 2C out (128 + 128): three retrievals of R memories for each sequence."""
    with torch.device(b.device):
        model = Memory3(b.config).to(b.dtype).eval()  # random weights
    model.fingerprint = lambda: "random"  # nobody is to hash all these weights
    model.fuse(b.device.type == "cuda")
    search, how = baselines.searching(b)
    out = {}
    with tempfile.TemporaryDirectory(dir=b.tmp) as folder:
        banks = {}
        banks["bf16"] = baselines.random_bank(b, folder, 96)
        banks["codes"] = baselines.random_bank(b, folder, 96, baselines.random_codec(b.config))
        out["page cache dropped"] = baselines.drop(banks["bf16"])
        out["search by"] = how
        for batch in (32, 1):
            figures = workload(b, model, search, banks, batch)
            figures |= apart(b, model, search, banks["bf16"], batch)
            for name, x in figures.items():
                out[f"batch {batch}: {name}"] = x
    return out


class Workload:
    """Runs of `generate` on random tokens, and what their traces say of the parts."""

    def __init__(self, b, model, batch):
        config = b.config
        self.model = model
        self.n = 2 * config.chunk_len
        self.prompts = torch.randint(config.vocab_size, (batch, self.n), device=b.device)
        n_text = config.n_recall * config.ref_len
        text = torch.randint(config.vocab_size, (batch, n_text), device=b.device)
        self.prompts_with_text = torch.cat([text, self.prompts], 1)  # RAG
        self.seconds = {}  # of each run by name, as generate's own clock has it

    def without(self, name, n):
        trace = generate(self.model, self.prompts, n, plain=True)[1]
        self.seconds.setdefault(name, []).append(trace.seconds)

    def with_memories(self, name, n, retriever, bank):
        trace = generate(self.model, self.prompts, n, retriever, bank)[1]
        self.seconds.setdefault(name, []).append(trace.seconds)

    def with_text(self, name, n, search):
        search(len(self.prompts))  # once, as the paper's RAG does
        trace = generate(self.model, self.prompts_with_text, n, plain=True)[1]
        self.seconds.setdefault(name, []).append(trace.seconds)


def workload(b, model, search, banks, batch):
    """Whole runs, embedding and search in them, and decoding steps."""
    config = b.config
    C = config.chunk_len
    n = 2 * C
    work = Workload(b, model, batch)
    runs = dict(without=partial(work.without, "without", n))
    for name, bank in banks.items():  # each run recalls what no other has just read
        retriever = baselines.WorstCase(len(bank), search)
        runs[name] = partial(work.with_memories, name, n, retriever, bank)
    runs["RAG"] = partial(work.with_text, "RAG", n, search)
    # A step is what more tokens of a chunk take: all else is in both. Memories come from RAM.
    warm = MemoryBank.open(banks["bf16"].path, model)
    for few in (2, C):
        retriever = baselines.WorstCase(batch * config.n_recall)
        runs[f"plain {few}"] = partial(work.without, "", few)
        runs[f"memory {few}"] = partial(work.with_memories, "", few, retriever, warm)

    def drop():
        for bank in banks.values():
            baselines.drop(bank)

    taken = times(b, runs, drop, share=4)
    plain_step = (taken[f"plain {C}"] - taken["plain 2"]) / (C - 2)
    step = (taken[f"memory {C}"] - taken["memory 2"]) / (C - 2)
    step_floor = baselines.step_bytes(b, batch, n + C / 2, memory=True) / b.BW
    out = {}
    out["step, ms"] = step * 1e3
    out["step, with / without"] = step / plain_step
    out["floor / step"] = step_floor / step
    for name in ("without", *banks, "RAG"):
        prompt = work.prompts_with_text if name == "RAG" else work.prompts
        least = baselines.floor(b, batch, prompt.shape[1], n, memory=name in banks)
        out[f"{name}: tokens/s"] = batch * n / taken[name]
        out[f"{name}: floor / time"] = least / taken[name]
        if name != "without":
            out[f"{name} / without"] = taken["without"] / taken[name]
        counted = work.seconds[name][1:]  # the first run warms up
        for part in counted[0]:  # Remark 7.1's breakdown
            out[f"{name}: {part}, ms"] = 1e3 * median(seconds[part] for seconds in counted)
    return out


def apart(b, model, search, bank, batch):
    """The pieces of one retrieval, and the prompt's pass with and without memories."""
    config = b.config
    R = config.n_recall
    T = 2 * config.chunk_len
    warm = MemoryBank.open(bank.path, model)
    pool = warm.recall(range(2 * batch * R))
    recall = torch.arange(2 * batch * R, device=b.device).view(batch, 2, R)  # each has its own
    tokens = torch.randint(config.vocab_size, (batch, T), device=b.device)
    codec = baselines.random_codec(config).to(b.device)

    def prefill(header, memories, table):
        cache = Cache(config, batch, T, header, b.dtype, b.device)
        model(tokens, None, memories, table, cache)

    runs = {"embed and search": partial(search, batch)}
    if b.device.type == "cuda":
        codes = baselines.random_codes(config, codec, batch * R)
        runs["copy bf16"] = partial(pool.kv[: batch * R].cpu().pin_memory().to, b.device)
        runs["copy codes"] = partial(codes.pin_memory().to, b.device)
    runs["decode codes"] = baselines.decoding(b, batch, codec)
    runs["prefill, plain"] = partial(prefill, False, None, None)
    runs["prefill, memory"] = partial(prefill, True, pool, recall)
    with torch.inference_mode():
        taken = times(b, runs)
    out = {f"apart: {name}, ms": seconds * 1e3 for name, seconds in taken.items()}
    out["prefill, with / without"] = taken["prefill, memory"] / taken["prefill, plain"]
    return out


# -- Training ----------------------------------------------------------------------------------


def train(b):
    """A step of 16 windows of max_context tokens; where not even one fits, with half the layers."""
    out = training(b, b.config)
    if out:
        return out
    layers = b.config.n_layer // 2
    memory_layers = b.config.n_memory_layer // 2
    half = replace(b.config, n_layer=layers, n_memory_layer=memory_layers)
    out = training(b, half)
    if not out:
        return {"half the layers: fits": False}
    return {f"half the layers: {name}": x for name, x in out.items()}


def training(b, config):
    """{} where a window of either stage does not fit into the device's memory."""
    cfg = TrainConfig()
    out = {}
    runs = {}
    empty(b.device)
    try:
        step = TrainingStep(b, config, cfg)
    except torch.OutOfMemoryError:
        return {}
    for stage in ("implicit", "explicit"):
        explicit = stage == "explicit"
        micro = step.largest(explicit)
        if micro is None:
            return {}
        runs[stage] = partial(step, micro, explicit)
        out[f"{stage}: micro-batch"] = micro
        if b.device.type == "cuda":
            out[f"{stage}: peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    taken = times(b, runs)
    for stage, seconds in taken.items():
        flops = cfg.batch * cost.step_flops(config, stage == "explicit")  # counted, not measured
        out[f"{stage}: step, s"] = seconds
        out[f"{stage}: tokens/s"] = cfg.batch * config.max_context / seconds
        out[f"{stage}: MFU"] = flops / seconds / b.F
    out["explicit / implicit"] = taken["explicit"] / taken["implicit"]
    return out


def fits(b):
    """Peak GiB of a step of one window of max_context tokens, by stage, by the weights' dtype, and
    with activations kept or computed again. Left out: what does not fit; without a GPU, all."""
    out = {}
    if b.device.type != "cuda":
        return out
    total = torch.cuda.mem_get_info(b.device)[1] / 2**30
    out["GiB there are"] = min(total, b.most_gib or total)
    for param_dtype in ("float32", "bfloat16"):
        for recompute in (False, True):
            cfg = TrainConfig(batch=1, param_dtype=param_dtype, recompute=recompute)
            how = f"{param_dtype} weights{', recomputing' if recompute else ''}"
            step = None
            for stage in ("implicit", "explicit"):
                empty(b.device)
                try:
                    step = step or TrainingStep(b, b.config, cfg)
                except torch.OutOfMemoryError:
                    break
                if step.fits(1, stage == "explicit"):
                    peak = torch.cuda.max_memory_allocated() / 2**30
                    out[f"{stage}, {how}: peak memory, GiB"] = peak
    return out


# -- Loading, codec, search --------------------------------------------------------------------


def load(b):
    """160 memories a time, from the drive and from the page cache."""
    k = 32 * b.config.n_recall
    out = {}
    with tempfile.TemporaryDirectory(dir=b.tmp) as folder:
        bank = baselines.random_bank(b, folder, 32)
        runs = baselines.readers(bank, k)
        out["page cache dropped"] = baselines.drop(bank)
        cold = times(b, runs, partial(baselines.drop, bank))
        (bank.path / "memories.bin").read_bytes()  # into the page cache
        warm = times(b, runs)
        read = k * bank.record_bytes
    for state, taken in (("cold", cold), ("warm", warm)):
        for name, seconds in taken.items():
            out[f"{state}: {name}, GB/s"] = read / seconds / 1e9
        for name in ("preadv", "memmap"):
            out[f"{state}: bank / {name}"] = taken[name] / taken["bank"]
    return out


def codec(b):
    """The codec beside FAISS on one thread: decoding 160 memories, encoding 4,096 vectors."""
    config = b.config
    codec = baselines.random_codec(config)
    codes = baselines.random_codes(config, codec, 32 * config.n_recall).view(-1, codec.bytes)
    try:
        faiss = optional("faiss")
    except UserError:  # without FAISS: only how fast it decodes
        runs = {"decode into the cache": baselines.decoding(b, 32, codec.to(b.device))}
        runs["decode"] = partial(codec.decode, codes.to(b.device))
        taken = times(b, runs)
        return codec_rates(taken, len(codes), 0)
    n_threads = torch.get_num_threads()
    faiss.omp_set_num_threads(1)  # PyTorch's, too
    codec, index = baselines.trained(codec, config.head_dim)
    x = torch.randn(4096, config.head_dim)  # keys and values to encode
    runs = {"decode into the cache": baselines.decoding(b, 32, codec.to(b.device))}
    runs["decode"] = partial(codec.decode, codes.to(b.device))
    runs["FAISS decode"] = partial(index.sa_decode, codes.numpy())
    runs["encode"] = partial(codec.encode, x)
    runs["FAISS encode"] = partial(index.sa_encode, x.numpy())
    taken = times(b, runs)
    out = codec_rates(taken, len(codes), len(x))
    theirs = torch.from_numpy(index.sa_decode(codes.numpy()))
    difference = (codec.decode(codes).cpu() - theirs).abs().max() / theirs.abs().max()
    same = (codec.encode(x).numpy() == index.sa_encode(x.numpy())).all(1)
    out["decode - FAISS"] = float(difference)
    out["codes equal"] = float(same.mean())
    out["decode / FAISS"] = taken["FAISS decode"] / taken["decode into the cache"]
    faiss.omp_set_num_threads(n_threads)
    return out


def codec_rates(taken, n_decoded, n_encoded):
    out = {}
    for name, seconds in taken.items():
        n = n_encoded if "encode" in name else n_decoded
        out[f"{name}, vectors/s"] = n / seconds
    out["decode 160 memories, ms"] = taken["decode into the cache"] * 1e3
    return out


def search(b):
    """32 queries of 1,024 numbers: Retriever.search beside a product and topk, on the CPU."""
    retriever, vectors, queries = baselines.flat(1024, 32)
    vectors = torch.from_numpy(vectors)  # (N, 1024)
    queries = torch.from_numpy(queries)  # (32, 1024)
    runs = {}
    runs["FAISS"] = partial(retriever.search, ["a text"] * 32, 5)
    runs["torch"] = partial(baselines.product, queries, vectors, 5)
    taken = times(b, runs)
    out = {"FAISS / torch": taken["FAISS"] / taken["torch"]}
    for name, seconds in taken.items():
        out[f"{name}, ms"] = seconds * 1e3
    return out


# -- Peers -------------------------------------------------------------------------------------


def peers_part(b):
    """A training step beside a plain GPT's of equal width, depth and tokens; greedy decoding
    beside transformers' with a static cache, the same shape, and beside our own with memories."""
    out = train_beside_plain(b)
    for batch in (1, 32):
        out |= decode_beside(b, batch)
    return out


def train_beside_plain(b):
    """b.config's implicit step, one micro-batch of cfg.batch windows, and the plain GPT's."""
    config = b.config
    cfg = TrainConfig(batch=8 if b.device.type == "cpu" else 16)
    ours = TrainingStep(b, config, cfg)
    theirs = TrainingStep(b, config, cfg)
    with torch.device(b.device):
        plain = peers.PlainGPT(config)
    theirs.model = plain
    theirs.optimizer = type(ours.optimizer)(plain.parameters(), cfg.lr, fused=True)
    theirs.loss_on = peers.loss_on
    if b.device.type == "cuda" or b.compile:  # both alike
        ours.model.fuse()
        theirs.loss_on = torch.compile(peers.loss_on)
    runs = dict(ours=partial(ours, cfg.batch, False), plain=partial(theirs, cfg.batch, False))
    taken = times(b, runs)
    ours_flops = cfg.batch * cost.step_flops(config, explicit=False)
    plain_flops = plain.step_flops(config, cfg.batch)
    time_ratio = taken["ours"] / taken["plain"]
    return {
        "training: our step, ms": taken["ours"] * 1e3,
        "training: plain GPT's step, ms": taken["plain"] * 1e3,
        "training / plain GPT's": time_ratio,
        "training, a FLOP / plain GPT's": time_ratio * plain_flops / ours_flops,
    }


def decode_beside(b, batch):
    """Tokens/s of steps within one chunk, the prompt's pass taken out by two lengths."""
    config = b.config
    C = config.chunk_len
    few = 2
    with torch.device(b.device):
        model = Memory3(config).to(b.dtype).eval()
    model.fingerprint = lambda: "random"
    model.fuse(b.device.type == "cuda")
    tokens = torch.randint(config.vocab_size, (batch, C), device=b.device)
    n_memories = batch * config.n_recall
    pool = Memories(
        torch.randn(n_memories, *config.memory_shape, device=b.device).to(b.dtype),
        torch.full((n_memories,), config.memory_tokens, device=b.device),
    )
    retriever = baselines.WorstCase(n_memories)
    bank = baselines.InMemory(pool)
    runs = {}
    for n in (few, C):
        runs[f"plain {n}"] = partial(generate, model, tokens, n, plain=True)
        runs[f"memories {n}"] = partial(generate, model, tokens, n, retriever, bank)
    try:
        llama = peers.llama_of(config, b.dtype, b.device)
        for n in (few, C):
            runs[f"transformers {n}"] = partial(peers.decode_with_transformers, llama, tokens, n)
    except ImportError:
        print("transformers is not installed: its decoding is not measured")
    taken = times(b, runs)
    rates = {}
    out = {}
    for name in ("plain", "memories", "transformers"):
        if f"{name} {C}" in taken:
            step = (taken[f"{name} {C}"] - taken[f"{name} {few}"]) / (C - few)
            rates[name] = batch / step
            out[f"decoding, batch {batch}: {name}, tokens/s"] = rates[name]
    key = f"decoding, batch {batch}: with / without memories"
    out[key] = rates["memories"] / rates["plain"]
    if "transformers" in rates:
        out[f"decoding, batch {batch} / transformers'"] = rates["plain"] / rates["transformers"]
    return out


# -- Command line ------------------------------------------------------------------------------

PARTS = dict(
    attention=attention,
    throughput=throughput,
    train=train,
    fits=fits,
    load=load,
    codec=codec,
    search=search,
    peers=peers_part,
)


def default_preset(part, device):
    """The paper's 2.4b where a GPU runs it; whole models on a CPU are the toy."""
    if part == "peers":
        return "small" if device.type == "cuda" else "toy"
    if device.type == "cpu" and part in ("throughput", "train"):
        return "toy"
    return "2.4b"


def parser():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("part", choices=["all", *PARTS], help="what to measure")
    p.add_argument(
        "--preset", choices=PRESETS, help="2.4b; whole models on a CPU: toy; peers on a GPU: small"
    )
    p.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="on a GPU: bfloat16")
    p.add_argument("--seconds", type=float, default=20, help="for one comparison, about")
    p.add_argument("--compile", action="store_true", help="train with torch.compile")
    p.add_argument("--most_gib", type=float, default=0, help="use no more GPU memory (0: all)")
    p.add_argument("--tmp", default="out", help="a directory on the drive to read memories from")
    p.add_argument("--out", default="benchmarks", help='results: OUT/<device>.json ("": none)')
    return p


def measure(b, part, preset):
    """-> how a part was measured, and its figures, as they are kept."""
    b.config = Config.preset(preset)
    made = describe(b, preset)
    print(f"\n{part}:", "; ".join(f"{key} {value}" for key, value in made.items()))
    made["figures"] = PARTS[part](b)
    for name, x in made["figures"].items():
        number = f"{x:12.5g}" if isinstance(x, float) else f"{x!s:>12}"
        print(f"  {name:44} {number}")
    return made


def main(argv=None):
    """Measures, prints and keeps the parts asked for; {part: what was measured on this device}."""
    b = SimpleNamespace(**vars(parser().parse_args(argv)))
    b.device = find_device(b.device)
    cuda = b.device.type == "cuda"
    default_dtype = "bfloat16" if cuda else "float32"
    b.dtype = getattr(torch, b.dtype or default_dtype)
    if cuda:
        torch.cuda.set_device(b.device)  # what waits and counts asks the current one
        if b.most_gib:  # as if it were a smaller card
            share = b.most_gib * 2**30 / torch.cuda.mem_get_info(b.device)[1]
            torch.cuda.set_per_process_memory_fraction(share, b.device)
    os.makedirs(b.tmp, exist_ok=True)
    os.makedirs(b.out or b.tmp, exist_ok=True)
    bandwidth, flops = roofline(b)
    b.BW = bandwidth  # bytes/s
    b.F = flops  # FLOP/s
    file = Path(b.out) / f"{file_name(name_of(b.device))}.json"
    parts = {}
    if b.out and file.exists():
        parts = json.loads(file.read_text())
    for part in PARTS if b.part == "all" else [b.part]:
        gc.collect()  # what a part leaves, models of billions of weights
        preset = b.preset or default_preset(part, b.device)
        try:
            parts[part] = measure(b, part, preset)
        except (UserError, OSError, RuntimeError) as error:
            if b.part != "all":
                raise
            print(f"{part} is not measured: {error}")  # the others still are
            continue
        if b.out:
            write_json(file, parts)  # after each part: a kill loses one
    print()
    for line in table.lines(parts):
        print(line)
    print(json.dumps(parts))
    return parts


if __name__ == "__main__":
    run(main)
