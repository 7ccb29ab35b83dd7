"""How many references a second the hashed embedder reads, by kind of text (sec. 3.1).

    python benchmarks/embedding.py                       one process, then two at once
    python benchmarks/embedding.py --processes 1 4

As `retrieval.py index` reads them: the tokens of a reference become text, the text a vector. Prose
is that of the docstrings of Python's own library, 80 words a text; made-up words come as often as
Zipf's law says, 80 a text; cities are data/cities, where it is prepared. Seconds are those of the
clock, and, in the last column, of the processor.
"""

import argparse
import ast
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import corpus  # noqa: E402
from common import number, run  # noqa: E402
from embed import HashEmbedder  # noqa: E402
from index import BATCH, embed_references  # noqa: E402

WORDS = 80  # of a text
TEXTS = 20_000  # of each kind, at most


def prose():
    """The docstrings of the standard library."""
    words = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "lib2to3"} & set(file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                words += (ast.get_docstring(node) or "").split()
    return cut(words)


def zipf(n_words=1_600_000, n_distinct=200_000):
    """Made-up words of 3 to 9 letters; the i-th most frequent comes 1 / i as often as the first."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    names = ["".join(rng.choice(letters, size)) for size in rng.integers(3, 10, n_distinct)]
    shares = 1 / np.arange(1, n_distinct + 1)
    return cut([names[i] for i in rng.choice(n_distinct, n_words, p=shares / shares.sum())])


def cut(words):
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)][:TEXTS]


def cities(tokenizer):
    if not (ROOT / "data/cities/kb.bin").exists():
        return []
    references = corpus.References.open(ROOT / "data/cities/kb")
    return [tokenizer.decode(references[i].tolist()) for i in range(min(TEXTS, len(references)))]


def measure(kind):
    """-> texts, words of a text, seconds to embed them: of the clock, of the processor."""
    tokenizer = corpus.tokenizer(str(ROOT / "data/cities"))
    texts = cities(tokenizer) if kind == "cities" else dict(prose=prose, zipf=zipf)[kind]()
    if not texts:
        return 0, 0, 0, 0
    references = [np.array(tokenizer.encode(text)) for text in texts]
    model = HashEmbedder().fit(texts)
    seconds = 0
    worked = 0
    for i in range(0, len(texts), BATCH):
        ids = range(i, min(i + BATCH, len(texts)))
        began = time.perf_counter()
        began_working = time.process_time()
        embed_references(model, references, tokenizer, ids)
        worked += time.process_time() - began_working
        seconds += time.perf_counter() - began
    return len(texts), sum(len(text.split()) for text in texts) / len(texts), seconds, worked


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--kinds", nargs="+", default=["cities", "prose", "zipf"])
    p.add_argument("--processes", type=number(int, 1), nargs="+", default=[1, 2], help="at once")
    p.add_argument("--one", action="store_true", help="one process, its four numbers alone")
    a = p.parse_args(argv)
    if a.one:
        print(*measure(a.kinds[0]))
        return
    print(f"{'':8}{'texts':>8}{'words each':>12}{'processes':>11}{'texts/s':>10}{'a core':>10}")
    for kind in a.kinds:
        for n in a.processes:
            words = [sys.executable, __file__, "--one", "--kinds", kind]
            how = dict(stdout=subprocess.PIPE, text=True)
            started = [subprocess.Popen(words, **how) for _ in range(n)]
            rows = [process.communicate()[0].split() for process in started]
            n_texts, n_words, *_ = map(float, rows[0])
            rate = sum(n_texts / max(float(row[2]), 1e-9) for row in rows)
            a_core = n * n_texts / max(sum(float(row[3]) for row in rows), 1e-9)
            line = f"{kind:8}{n_texts:8,.0f}{n_words:12.0f}{n:11}{rate:10,.0f}{a_core:10,.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    run(main)
