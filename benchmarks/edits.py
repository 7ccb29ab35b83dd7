"""What a change of a knowledge base costs, and opening it, by the number of its references.

    python benchmarks/edits.py --sizes 1000,10000,100000,1000000

Texts are random words; the model is tiny, since encoding a text is not what is measured (it is in
the figures all the same). Milliseconds, medians of 200 changes; the last line is the ratio of the
largest base to the smallest.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus  # noqa: E402
from bank import MemoryBank  # noqa: E402
from common import number, run  # noqa: E402
from eval import columns  # noqa: E402
from generate import remember  # noqa: E402
from model import Config, Memory3  # noqa: E402
from retrieval import Live  # noqa: E402

CITIES = Path(__file__).resolve().parent.parent / "data/cities"
SHAPE = dict(n_layer=2, n_memory_layer=1, n_head=2, n_kv_head=1, head_dim=16, mlp_width=32)
TIMES = 200  # changes that are timed of each kind


def make_base(folder, n, tokenizer):
    """A base of n random texts, its memories missing, with an index of 64 dimensions."""
    config = Config(vocab_size=tokenizer.n_vocab, header=tuple(tokenizer.header), **SHAPE)
    torch.manual_seed(0)
    model = Memory3(config).eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 4000, 20 * n)
    offsets = np.arange(0, 20 * n + 1, 20)
    shutil.copy(CITIES / "tokenizer.json", folder)
    references = corpus.References(Path(folder, "texts"), tokens, offsets, tokenizer.n_vocab)
    bank = MemoryBank.create(Path(folder, "base"), model, references)
    Live.build(bank.references, "hash:64", "Flat", progress=False)
    return bank


def median_ms(change):
    """change(n): called TIMES times -> the median milliseconds of a call."""
    taken = []
    for n in range(TIMES):
        began = time.perf_counter()
        change(n)
        taken.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken))


def megabytes():
    """What the process holds in RAM now (Linux). Its peak would be the largest base's before."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def measure(n, tokenizer):
    """-> dict of milliseconds for a base of n references."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        made = make_base(folder, n, tokenizer)
        path, model = made.path, made.model
        bank = MemoryBank.open(path, model)
        live = Live.open(bank.references)
        ids = rng.permutation(n)
        out = {}

        def text():
            return rng.integers(300, 4000, 20)

        def remember_one(k):
            remember(f"Zubrowka {k} has {k * k} people.", tokenizer, model.config, live, bank)
            live.refresh()

        def encode(k):
            with torch.inference_mode():
                model.write(torch.from_numpy(text())[None])

        out["append"] = median_ms(lambda k: bank.append(text()))
        out["replace"] = median_ms(lambda k: bank.replace(ids[k], text()))
        out["delete"] = median_ms(lambda k: bank.delete(ids[TIMES + k]))
        out["remember"] = median_ms(remember_one)
        out["encoding alone"] = median_ms(encode)
        live.save()
        out["open the base"] = median_ms(lambda k: MemoryBank.open(path, model))
        began = time.perf_counter()
        Live.open(bank.references)
        out["open the index"] = 1e3 * (time.perf_counter() - began)
        out["index, MB"] = (path / "index" / "index.faiss").stat().st_size / 1e6
    return out


def memory_of_edits(tokenizer, edits=10_000):
    """-> the megabytes that a process holds before and after so many edits of 1,000 references."""
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        bank = make_base(folder, 1000, tokenizer)
        live = Live.open(bank.references)
        for n in range(edits):
            if n == 500:
                before = megabytes()
            bank.replace(int(rng.integers(1000)), rng.integers(300, 4000, 20))
            if n % 100 == 0:
                live.search(["Zubrowka"], 1)
    return before, megabytes()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--sizes", default="1000,10000,100000", help="numbers of references, from 400")
    p.add_argument(
        "--edits", type=number(int, 500), default=10_000, help="for the memory: from 500"
    )
    a = p.parse_args(argv)
    tokenizer = corpus.tokenizer(CITIES)
    rows = []
    for n in map(number(int, 2 * TIMES), a.sizes.split(",")):
        rows.append((n, measure(n, tokenizer)))
        print(f"{n:,}: measured", file=sys.stderr)
    names = list(rows[0][1])
    lines = [[f"{n:,}", *(f"{row[name]:.1f}" for name in names)] for n, row in rows]
    ratios = [f"{rows[-1][1][name] / rows[0][1][name]:.2f}" for name in names]
    print(columns(["references", *names], *lines, ["ratio", *ratios]))
    before, after = memory_of_edits(tokenizer, a.edits)
    print(f"{a.edits:,} edits of 1,000 references: {before:.0f} MB after 500, {after:.0f} MB")
    return rows


if __name__ == "__main__":
    run(main)
