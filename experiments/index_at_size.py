"""The index at size: what a million references take, and what it finds of them (sec. 3.1).

    OMP_NUM_THREADS=1 python experiments/index_at_size.py                  # some minutes
    OMP_NUM_THREADS=2 python experiments/index_at_size.py                  # asks the same index

Vectors lie in clusters, as those of texts do: a centre and noise as long as it is, scaled to length
1. A query is a vector moved by half as much noise. The index is made as `retrieval.py index` makes
it, of the kind that N asks for; then it is compared with comparing all. --factory tries others.
Printed: the forecast, seconds, bytes on disk, the peak of RAM beyond what importing took, recall@5,
ms a query, alone and in batches of 32.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus  # noqa: E402
from common import make_directory, optional, run, write_json  # noqa: E402
from retrieval import Retriever  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
K = 5


class Vectors:
    """N vectors in a file, and the embedder that finds them: the text of reference i is "i"."""

    def __init__(self, path, n, dim, clusters):
        self.path = path
        self.n = n
        self.dim = dim
        self.clusters = clusters
        self.name = f"clustered:{dim}"
        self.id = f"{self.name}:{n}:{clusters}"
        self.state = np.zeros(0, "<u4")

    def make(self):
        rng = np.random.default_rng(0)
        centres = unit(rng.standard_normal((self.clusters, self.dim), np.float32))
        with open(f"{self.path}.tmp", "wb") as file:
            for start in range(0, self.n, 10_000):
                rows = min(10_000, self.n - start)
                which = rng.integers(0, self.clusters, rows)
                noise = unit(rng.standard_normal((rows, self.dim), np.float32))
                file.write(unit(centres[which] + noise).tobytes())
        os.replace(f"{self.path}.tmp", self.path)

    def rows(self, ids):
        """Vectors ids (n, dim), read one by one: a map of the file would count as RAM."""
        out = np.zeros((len(ids), self.dim), np.float32)
        size = 4 * self.dim
        with open(self.path, "rb") as file:
            for row, i in zip(out, ids, strict=True):
                row[:] = np.frombuffer(os.pread(file.fileno(), size, int(i) * size), np.float32)
        return out

    def blocks(self):
        """All vectors, 50,000 at a time: (first id, (n, dim))."""
        for start in range(0, self.n, 50_000):
            count = min(50_000, self.n - start) * self.dim
            block = np.fromfile(self.path, np.float32, count, offset=4 * start * self.dim)
            yield start, block.reshape(-1, self.dim)

    def fit(self, texts):
        return self

    def encode(self, texts):
        return self.rows([int(text) for text in texts])


class Numbers:
    """References 0..n-1: the text of each is its number."""

    path = Path("numbers")

    def __init__(self, n, tokenizer):
        self.n = n
        self.tokenizer = tokenizer
        self.hash = f"numbers:{n}"

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.array(self.tokenizer.encode(str(i)))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact(vectors, queries):
    """The K best of all vectors (n, K), by comparing all."""
    ids = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    for start, block in vectors.blocks():
        cosines = queries @ block.T  # (n, 50,000)
        best = np.argpartition(-cosines, K, axis=1)[:, :K]
        ids = np.concatenate([ids, best + start], 1)
        scores = np.concatenate([scores, np.take_along_axis(cosines, best, 1)], 1)
        keep = np.argsort(-scores, axis=1)[:, :K]
        ids = np.take_along_axis(ids, keep, 1)
        scores = np.take_along_axis(scores, keep, 1)
    return ids


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ms_a_query(index, queries, batch, passes=5):
    """Milliseconds a query, mean over the batches of the fastest of some passes: what else runs on
    the machine only adds."""
    seconds = []
    for i in range(0, len(queries), batch):
        each = []
        for _ in range(passes):
            began = time.perf_counter()
            index.search(queries[i : i + batch], K)
            each.append(time.perf_counter() - began)
        seconds.append(min(each))
    return 1e3 * sum(seconds) / len(queries)


def main(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    p.add_argument("--n", type=int, default=1_000_000, help="references")
    p.add_argument("--dim", type=int, default=512, help="numbers a vector")
    p.add_argument("--clusters", type=int, default=20_000, help="clusters that they lie in")
    p.add_argument("--queries", type=int, default=1000, help="queries")
    p.add_argument("--factory", help="FAISS factory string (None: chosen by size)")
    p.add_argument("--probes", type=int, help="lists looked into (None: as the index has it)")
    p.add_argument("--tokenizer", default=str(ROOT / "data/cities"), help="a data directory")
    p.add_argument(
        "--out", default="out/index_at_size", help="vectors and index (4 KB a reference)"
    )
    p.add_argument("--json", help="file for the figures")
    a = p.parse_args(argv)
    faiss = optional("faiss")
    out = make_directory(a.out)
    vectors = Vectors(out / "vectors.bin", a.n, a.dim, a.clusters)
    if not vectors.path.exists() or vectors.path.stat().st_size != 4 * a.n * a.dim:
        vectors.make()
    references = Numbers(a.n, corpus.tokenizer(a.tokenizer))
    path = out / f"{a.factory or 'chosen'}.index"
    result = dict(n=a.n, dim=a.dim, threads=faiss.omp_get_max_threads())
    before = peak_bytes()
    if not (path / "meta.json").exists():
        began = time.perf_counter()
        Retriever.build(path, references, a.tokenizer, vectors, a.factory)
        result["build_seconds"] = time.perf_counter() - began
        result["build_peak_bytes"] = peak_bytes() - before
    retriever = Retriever.open(path, vectors, references)
    result["peak_bytes"] = peak_bytes() - before
    result["index_bytes"] = (path / "index.faiss").stat().st_size
    result["factory"] = retriever.meta["factory"]
    if a.probes:
        faiss.extract_index_ivf(retriever.index).nprobe = a.probes
    rng = np.random.default_rng(1)
    queries = vectors.rows(rng.integers(0, a.n, a.queries))
    queries = unit(queries + 0.5 * unit(rng.standard_normal(queries.shape, np.float32)))
    retriever.index.search(queries[:32], K)  # pages and threads are there
    result["ms_alone"] = ms_a_query(retriever.index, queries, 1)
    result["ms_in_32"] = ms_a_query(retriever.index, queries, 32)
    found = retriever.index.search(queries, K)[1]
    true = exact(vectors, queries)
    shared = [len(set(x) & set(y)) / K for x, y in zip(found.tolist(), true.tolist(), strict=True)]
    result["recall_at_5"] = float(np.mean(shared))
    result["first_is_first"] = float((found[:, 0] == true[:, 0]).mean())
    for name, value in result.items():
        print(f"{name:18} {value:,.4g}" if isinstance(value, float) else f"{name:18} {value}")
    ratio = result["peak_bytes"] / result["index_bytes"]
    print(f"peak of RAM / index: {ratio:.2f}")
    if a.json:
        write_json(a.json, result)
    return result


if __name__ == "__main__":
    run(main)
