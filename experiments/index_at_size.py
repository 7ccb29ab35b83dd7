"""The index at size: what a million references take, and what it finds of them (sec. 3.1).

    OMP_NUM_THREADS=1 python experiments/index_at_size.py                  # some minutes
    OMP_NUM_THREADS=1 python experiments/index_at_size.py --n 300000 --json FILE
    python experiments/index_at_size.py --on_paper 10000000 --json FILE    # by the slopes of FILE

Vectors lie in clusters, as those of texts do: a centre and noise as long as it is, scaled to length
1. A query is a vector moved by half as much noise. The index is made as `retrieval.py index` makes
it, of the kind that N asks for; then it is compared with comparing all. --factory tries others.
Printed: the forecast, seconds of the processor to train and to code, bytes on disk, the peak of RAM
beyond what importing took, recall@5, ms a query, alone and in batches of 32. Each query is asked
once; one alone has one thread, whatever there are, for FAISS gives each query of a batch to one.
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
from common import check, make_directory, optional, read_json, run, write_json  # noqa: E402
from index import (  # noqa: E402
    choose_factory,
    empty_index,
    encode_shard,
    is_index,
    join,
    predict,
    prepare,
    scanned,
    search,
)
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


def reset_peak():
    """Forgets the peak of RAM so far -> bytes of RAM now. (Linux; elsewhere the peak stays.)"""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
        return status_bytes("VmRSS")
    return peak_bytes()


def peak_bytes():
    """The most bytes of RAM since then."""
    if Path("/proc/self/status").exists():
        return status_bytes("VmHWM")
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def status_bytes(name):
    """What Linux says of this process: VmRSS, its RAM, or VmHWM, the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])


def ms_a_query(index, queries, batch):
    """Milliseconds a query, each asked once: of the clock, and of the processor."""
    began = time.perf_counter()
    began_working = time.process_time()
    for i in range(0, len(queries), batch):
        search(index, queries[i : i + batch], K)
    milliseconds = 1e3 / len(queries)
    worked = time.process_time() - began_working
    return milliseconds * (time.perf_counter() - began), milliseconds * worked


def show(result):
    for name, value in result.items():
        print(f"{name:18} {value:,.4g}" if isinstance(value, float) else f"{name:18} {value}")


def build(path, references, tokenizer, vectors, factory, result):
    """Makes the index; what it took goes into result."""
    before = reset_peak()
    began = time.perf_counter()
    how = references, tokenizer, vectors, factory
    for name, step in (("train", prepare), ("code", encode_shard)):
        worked = time.process_time()
        step(path, *how, progress=name == "train")
        result[f"{name}_seconds"] = time.process_time() - worked
    join(path, references, False)
    result["build_seconds"] = time.perf_counter() - began
    result["build_peak_bytes"] = peak_bytes() - before


def ask(retriever, vectors, n_queries, result):
    """Times and recall of queries that are near vectors."""
    faiss = optional("faiss")
    rng = np.random.default_rng(1)
    queries = vectors.rows(rng.integers(0, vectors.n, 3 * n_queries))
    queries = unit(queries + 0.5 * unit(rng.standard_normal(queries.shape, np.float32)))
    alone, by_one, by_two = np.split(queries, 3)  # none is asked twice
    search(retriever.index, vectors.rows(range(32)), K)  # pages and threads are there
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    result["ms_alone"], result["processor_ms_alone"] = ms_a_query(retriever.index, alone, 1)
    result["ms_in_32"], result["processor_ms_in_32"] = ms_a_query(retriever.index, by_one, 32)
    faiss.omp_set_num_threads(2)
    result["ms_in_32_by_two"], _ = ms_a_query(retriever.index, by_two, 32)
    faiss.omp_set_num_threads(threads)
    found = search(retriever.index, alone, K)[0]
    true = exact(vectors, alone)
    shared = [len(set(x) & set(y)) / K for x, y in zip(found.tolist(), true.tolist(), strict=True)]
    result["recall_at_5"] = float(np.mean(shared))
    result["first_is_first"] = float((found[:, 0] == true[:, 0]).mean())


def on_paper(rows, n):
    """What an index of n vectors would take, by the slopes of those measured: a dict.

    Seconds grow with the multiplications that index.predict counts; milliseconds with the codes
    that a query is compared with. Indexes of product codes, and of other widths, are left out.
    """
    measured = []
    for row in rows.values():
        if "train_seconds" in row and "SQ8" in row["factory"] and "probes" not in row:
            measured.append(row)
    kinds = [empty_index(row["factory"], row["dim"]) for row in measured]
    work = [predict(row["n"], kind) for row, kind in zip(measured, kinds, strict=True)]
    dim = measured[0]["dim"]
    factory = choose_factory(n, dim)
    kind = empty_index(factory, dim)
    takes = predict(n, kind)
    compared = [scanned(row["n"], k) for row, k in zip(measured, kinds, strict=True)]
    result = dict(n=n, dim=dim, factory=factory, size=takes.size, peak=takes.peak)
    result["codes"] = scanned(n, kind)
    for name, counts, count in (
        ("train_seconds", [w.training for w in work], takes.training),
        ("code_seconds", [w.coding for w in work], takes.coding),
    ):
        counts = np.array(counts, float)  # their squares are more than integers hold
        seconds = [row[name] for row in measured]
        result[name] = count * np.dot(counts, seconds) / np.dot(counts, counts)
    for name in ("processor_ms_alone", "processor_ms_in_32"):
        slope, fixed = np.polyfit(compared, [row[name] for row in measured], 1)
        result[name] = float(fixed + slope * result["codes"])
    return result


def main(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    p.add_argument("--n", type=int, default=1_000_000, help="references")
    p.add_argument("--dim", type=int, default=512, help="numbers a vector")
    p.add_argument("--members", type=int, default=50, help="vectors of a cluster")
    p.add_argument("--queries", type=int, default=1000, help="queries of each kind")
    p.add_argument("--factory", help="FAISS factory string (None: chosen by size)")
    p.add_argument("--probes", type=int, help="lists looked into (None: as the index has it)")
    p.add_argument("--tokenizer", default=str(ROOT / "data/cities"), help="a data directory")
    p.add_argument(
        "--out", default="out/index_at_size", help="vectors and index (4 KB a reference)"
    )
    p.add_argument("--json", help="file for the figures, beside those of other sizes and kinds")
    p.add_argument("--on_paper", type=int, metavar="N", help="only what N would take, by --json")
    a = p.parse_args(argv)
    if a.on_paper:
        check(a.json, "--on_paper: give the figures of smaller indexes: --json FILE")
        result = on_paper(read_json(a.json, {}, "measure some indexes"), a.on_paper)
        show(result)
        return result
    faiss = optional("faiss")
    check(1 <= a.members <= a.n, f"--members {a.members}: give 1 to --n, {a.n}")
    out = make_directory(f"{a.out}/{a.n}x{a.dim}, {a.members} a cluster")
    vectors = Vectors(out / "vectors.bin", a.n, a.dim, a.n // a.members)
    if not vectors.path.exists() or vectors.path.stat().st_size != 4 * a.n * a.dim:
        vectors.make()
    references = Numbers(a.n, corpus.tokenizer(a.tokenizer))
    path = out / f"{a.factory or 'chosen'}.index"
    result = dict(n=a.n, dim=a.dim)
    if not is_index(path):
        build(path, references, a.tokenizer, vectors, a.factory, result)
    retriever = Retriever.open(path, vectors, references)
    result["index_bytes"] = (path / "index.faiss").stat().st_size
    result["factory"] = retriever.meta["factory"]
    name = f"{a.n} {result['factory']}"
    if a.probes:
        faiss.extract_index_ivf(retriever.index).nprobe = a.probes
        result["probes"] = a.probes
        name += f", {a.probes} lists"
    ask(retriever, vectors, a.queries, result)
    show(result)
    if "build_peak_bytes" in result:
        ratio = result["build_peak_bytes"] / result["index_bytes"]
        print(f"peak of RAM / index: {ratio:.2f}")
    if a.json:
        there = read_json(a.json, {}, "remove it") if Path(a.json).exists() else {}
        there[name] = there.get(name, {}) | result  # what building took stays
        write_json(a.json, there)
    return result


if __name__ == "__main__":
    run(main)
