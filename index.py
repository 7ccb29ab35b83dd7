"""A FAISS index of references, of any size: its kinds, how it is made, how it is read (sec. 3.1).

choose_factory      the kind of index for a number of references
encode_shard        embeds and codes a share of the references
join                makes the index from all shards
open_index          opens an index, if it is what its meta.json says
search              FAISS's search, with ids first and nothing made up

An index is made in <path>/parts/, so that a stopped run can go on, and so that several processes
can share the work:
    plan.json, embedder.npy, empty.faiss    made once, by whichever process comes first
    1-of-2.codes, 2-of-2.codes              the references of each shard, as codes of the index
    1-of-2.blank, 2-of-2.blank              ids of those that have no vector
`join` puts the codes into the empty index in the order of the references. So two shards make the
same index as one, and neither all vectors nor two copies of the index are ever in RAM. With on_disk
not even one is: the inverted lists go to a file of their own, index.ivfdata.

Whoever makes, removes or joins anything in parts/ holds the lock of the index's directory; the
codes of a shard are locked by the process that writes them. Both locks are flock's: where several
machines write shards, their shared disk must know it. While one process learns lists and codes, the
others wait for that lock.
"""

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import corpus
from common import (
    UserError,
    check,
    checksum,
    command,
    lock,
    make_directory,
    optional,
    read_array,
    read_json,
    replace_file,
    write_json,
    write_sealed,
)
from embed import embedder, normalize

FORMAT = "memory3 index 2"
NOTHING = -1.0  # the score where nothing was found: no cosine is below
# What meta.json has: which index, embedder, tokenizer and references belong together
META = dict(
    format=str,
    n=int,
    dim=int,
    embedder=str,
    embedder_id=str,
    factory=str,
    tokenizer=str,  # ".." is that of the directory in which the index lies
    tokenizer_id=str,
    references=str,  # their hash
    checksum=int,  # of index.faiss
    blank=list,  # ids of references without a vector
)
LISTS = "index.ivfdata"  # the inverted lists of an index made with on_disk, beside index.faiss
BATCH = 1024  # references that are embedded at a time
FIT = 1 << 20  # references, at most, from which an embedder learns its frequencies
A_LIST = 40  # vectors from which each list is learnt, at least: FAISS asks for 39
CODES = 32_768  # vectors, at most, from which product codes are learnt
BYTES = 8_192  # vectors, at most, from which the range of each number is learnt, for its byte (SQ8)
PIECE = 1 << 20  # references that are put into lists at a time, where these stay on disk
# The kinds whose vectors can be coded apart and put in later, with their ids
KINDS = ["IndexFlat", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ"]
KINDS += ["IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"]


def cure_for(path, name=None):
    """The command, with all its flags, that makes an index which is missing or wrong."""
    path = Path(path)
    if (path.parent / "texts.sqlite").exists():  # the index of a knowledge base
        flags = ["--kb", path.parent]
        if name is None:  # else it keeps the embedder, and the factory that was given with it
            flags += ["--embedder", "hash"]
        return f"make it anew with: {command('kb.py', 'index', *flags)}"
    flags = ["--data", path.parent, "--references", path.stem]
    if name:
        flags += ["--embedder", name]
    return f"make it anew with: {command('retrieval.py', 'index', *flags)}"


# -- Kinds ------------------------------------------------------------------------------------

FLAT = 100_000  # up to so many references, every vector is compared, exactly
SCALAR = 10_000_000  # up to so many, a number is kept in one byte; beyond, in a quarter of one
GRAPH = 8192  # beyond so many lists, a graph finds them faster than comparing all
PROBES = 128  # lists that a query looks into
ROUNDS = 10  # of k-means, for the lists
DISTANCE = 400  # multiplications that take as long as FAISS's distance of a few numbers in k-means
# Of the RAM that making an index takes: see `predict`
MARGIN = 1.05
WORK = 32 << 20


def choose_factory(n, dim=512):
    """The FAISS factory string for n vectors of `dim` numbers.

    Up to FLAT references the search is exact. Beyond, there are about 4 sqrt(n) lists; if those are
    more than GRAPH, a graph (HNSW) finds them. Their vectors are kept in one byte a number (SQ8)
    or, beyond SCALAR references, in one byte for 4 numbers (PQ). At a million references, with
    4,096 lists, a query takes 1.2 times as long with a graph as without, for the same recall
    (experiments/README.md).
    >>> choose_factory(20_000), choose_factory(1_000_000), choose_factory(112_000_000)
    ('Flat', 'IVF4096,SQ8', 'IVF32768_HNSW32,PQ128')
    """
    if n <= FLAT:
        return "Flat"
    lists = 1 << round(np.log2(4 * n**0.5))
    graph = "_HNSW32" if lists > GRAPH else ""
    codes = "SQ8" if n <= SCALAR or dim % 4 else f"PQ{dim // 4}"
    return f"IVF{lists}{graph},{codes}"


def empty_index(factory, dim):
    """The untrained index that a factory string names. UserError for a kind that is not in KINDS:
    it would lose ids, or could not be made in parts."""
    faiss = optional("faiss")
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        line = f"--factory {factory}: FAISS cannot make it of {dim} numbers: {_reason(error)}"
        raise UserError(line) from None
    inner = inner_index(index)
    kind = type(inner).__name__
    valid = kind in KINDS and inner.metric_type == faiss.METRIC_INNER_PRODUCT
    cure = "take Flat, SQ8 or PQ64, alone or after IVF1024 or IVF4096_HNSW32"
    check(valid, f"--factory {factory}: an {kind} cannot be made in parts or loses ids; {cure}")
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(PROBES, inner.nlist)
        inner.cp.min_points_per_centroid = 1  # no warning: sample_size has chosen how many
        quantizer = faiss.downcast_index(inner.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = 2 * PROBES  # lists it looks at to find the nearest
    return index


def inner_index(index):
    """The index that holds the vectors, behind any rotation of them (OPQ, PCA)."""
    faiss = optional("faiss")
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _reason(error):
    """FAISS's message, without the place in its source."""
    return str(error).split("failed: ")[-1].split("Error: ")[-1].splitlines()[0]


def n_lists(index):
    """How many lists an inverted file has; 0 if every vector is compared."""
    return getattr(inner_index(index), "nlist", 0)


def scanned(n, index):
    """How many codes a query is compared with."""
    return n * min(1, PROBES / max(1, n_lists(index)))


def sample_size(n, index):
    """From how many references lists are learnt, and from how many of those the codes."""
    if index.is_trained:
        return 0, 0
    codes = BYTES if type(inner_index(index)).__name__.endswith("Quantizer") else CODES
    lists = A_LIST * n_lists(index)
    return min(n, max(lists, codes)), min(n, codes)


class Prediction(NamedTuple):
    """What an index of n vectors takes."""

    size: float  # bytes, in RAM and on disk
    peak: float  # the most bytes of RAM while it is made, about
    training: float  # multiplications, to learn its lists and codes
    coding: float  # multiplications, to find the list and the code of each vector


def predict(n, index):
    """The Prediction for n vectors. What is left out takes little beside it: the graph of lists,
    and the bytes of SQ8."""
    lists = n_lists(index)
    size = n * index.sa_code_size()
    if lists:
        # for each vector an id; for each list a centroid and its 2 x 32 neighbours in the graph
        size += 8 * n + lists * (4 * index.d + 4 * 2 * 32)
    sample, codes = sample_size(n, index)
    # the sample, and a copy and the residuals of the part from which codes are learnt; later the
    # index. What the allocator keeps of the one while the other grows was measured
    peak = MARGIN * max(size, 4 * index.d * (sample + 2 * codes)) + WORK
    training = ROUNDS * sample * lists * index.d
    coding = n * lists * index.d  # all centroids are compared: exact_quantizer
    pq = getattr(inner_index(index), "pq", None)
    if pq is not None:  # its parts of a few numbers each have their own k-means, of 25 rounds
        training += 25 * codes * pq.ksub * pq.M * DISTANCE
        coding += n * pq.ksub * index.d
    return Prediction(size, peak, training, coding)


# -- Making it --------------------------------------------------------------------------------


def encode_shard(
    path,
    references,
    tokenizer_name,
    encoder,
    factory=None,
    shard=(1, 1),
    progress=True,
):
    """Embeds the references of shard (i, n), 1 <= i <= n: an n-th of the batches of BATCH.

    Afterwards `path`/parts has all that `join` needs of it. Returns the fitted embedder. progress:
    prints what it will take, before any work, and shows a bar.
    """
    parts = Path(path, "parts")
    how = references, tokenizer_name, encoder, factory, progress
    i, n_shards = shard
    codes = parts / f"{i}-of-{n_shards}.codes"
    if progress:
        print(forecast(path, references, tokenizer_name, encoder, factory, n_shards))
    try:
        with lock(path):
            plan, model, index = _prepare(path, *how)
            # opened while nobody may join: what `join` removes later is whole
            code_file = codes.open("ab")
            blank_file = codes.with_suffix(".blank").open("a+b")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("before anything was embedded: nothing is kept") from None
    tokenizer = corpus.tokenizer(tokenizer_name)
    quantizer = exact_quantizer(index)
    start, stop = rows_of_shard(plan["n"], i, n_shards)
    with code_file, blank_file:
        fcntl.flock(code_file, fcntl.LOCK_EX)  # one process a shard; a second one waits
        # after a kill only whole batches count, and only those blank ids that have a code
        done = os.fstat(code_file.fileno()).st_size // index.sa_code_size()
        if start + done > stop:  # damaged: begin anew
            done = 0
        if start + done < stop:
            done = done // BATCH * BATCH
        code_file.truncate(done * index.sa_code_size())
        blank_file.seek(0)
        written = blank_file.read()
        listed = np.frombuffer(written[: len(written) // 8 * 8], "<i8")
        n_blank = np.count_nonzero(listed < start + done)
        blank_file.truncate(8 * n_blank)
        with tqdm(total=stop - start, initial=done, desc="embedding", disable=not progress) as bar:
            try:
                for first in range(start + done, stop, BATCH):
                    ids = np.arange(first, min(first + BATCH, stop), dtype="<i8")
                    vectors = embed_references(model, references, tokenizer, ids)  # (n, dim)
                    blank = ids[~vectors.any(1)]
                    blank_file.write(blank.tobytes())
                    blank_file.flush()  # first: a code vouches for what is said of its reference
                    code_file.write(encode(index, vectors, quantizer).tobytes())
                    code_file.flush()
                    bar.update(len(ids))
                    done += len(ids)
            except KeyboardInterrupt:
                kept = f"after {done:,} of {stop - start:,} references, which are kept"
                raise KeyboardInterrupt(f"{kept}: the same command goes on") from None
    return model


def prepare(path, references, tokenizer_name, encoder, factory=None, n_shards=1, progress=True):
    """What comes before the shards, which then all find it done: words are counted, lists and codes
    are learnt. Returns the bytes of a code."""
    if progress:
        print(forecast(path, references, tokenizer_name, encoder, factory, n_shards))
    try:
        with lock(path):
            how = references, tokenizer_name, encoder, factory, progress
            _, _, index = _prepare(path, *how)
            return index.sa_code_size()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("before anything was embedded: nothing is kept") from None


def rows_of_shard(n, i, n_shards):
    """start and stop of shard i's references: whole batches, so that all shards compute as one."""
    return share_of(n, i, n_shards, BATCH)


def share_of(n, i, n_shards, batch):
    """start and stop of the i-th of n_shards shares of 0..n-1, each of whole batches.

    >>> [share_of(10, i, 3, 2) for i in (1, 2, 3)]
    [(0, 2), (2, 6), (6, 10)]
    """
    n_batches = -(-n // batch)
    start = n_batches * (i - 1) // n_shards * batch
    stop = n_batches * i // n_shards * batch
    return min(start, n), min(stop, n)


def exact_quantizer(index):
    """Finds the lists of vectors by comparing all, for an index with a graph (HNSW); else None.

    For a thousand vectors at a time a matrix product is faster than the graph, and never wrong.
    """
    faiss = optional("faiss")
    if not isinstance(index, faiss.IndexIVF):
        return None
    graph = faiss.downcast_index(index.quantizer)
    if not isinstance(graph, faiss.IndexHNSW):
        return None
    exact = faiss.IndexFlatIP(index.d)
    exact.add(graph.reconstruct_n(0, index.nlist))
    return exact


def encode(index, vectors, quantizer):
    """The codes of vectors (n, dim) -> (n, code bytes) uint8; quantizer: see exact_quantizer."""
    if quantizer is None:
        return index.sa_encode(vectors)
    faiss = optional("faiss")
    lists, _ = search(quantizer, vectors, 1)  # (n, 1)
    codes = np.zeros((len(vectors), index.sa_code_size()), np.uint8)
    pointers = [faiss.swig_ptr(array) for array in (vectors, lists, codes)]
    index.encode_vectors(len(vectors), *pointers, True)  # True: a code begins with its list
    return codes


def embed_references(model, references, tokenizer, ids):
    """The vectors of references (n, dim) float32; 0 for one without any word."""
    texts = [text_of(references, tokenizer, i) for i in ids]
    vectors = np.asarray(model.encode(texts), np.float32)
    for i, vector in zip(ids, vectors, strict=True):
        check(np.isfinite(vector).all(), f"embedder {model.name} gives NaN for reference {i}")
    return vectors


def text_of(references, tokenizer, i):
    return normalize(tokenizer.decode(references[int(i)].tolist()))


def _prepare(path, references, tokenizer_name, encoder, factory, progress):
    """What all shards share: the plan, the fitted embedder, the trained index without vectors."""
    faiss = optional("faiss")
    parts = Path(path, "parts")
    file = parts / "plan.json"
    tokenizer = corpus.tokenizer(tokenizer_name)
    model = embedder(encoder)
    chosen = factory  # by hand; None: by size
    factory = factory_for(len(references), model.dim, factory)
    # a data set may be moved: its tokenizer is that of the directory above, wherever that lies
    in_parent = Path(tokenizer_name).resolve() == Path(path).resolve().parent
    plan = dict(
        format=FORMAT,
        n=len(references),
        dim=model.dim,
        embedder=model.name,
        unfitted=model.id,
        factory=factory,
        chosen=chosen,
        tokenizer=".." if in_parent else str(tokenizer_name),
        tokenizer_id=tokenizer.id,
        references=references.hash,
    )
    if file.exists():
        try:
            made = read_json(file, {}, "")
            if made == plan | dict(embedder_id=made.get("embedder_id")):
                state = read_array(parts / "embedder.npy", "<u4", (None,), "")
                if isinstance(encoder, str):
                    model = embedder(encoder, state)
                if model.id == made["embedder_id"]:  # an object may have to be fitted
                    return made, model, faiss.read_index(str(parts / "empty.faiss"))
        except (UserError, RuntimeError):  # FAISS's is the latter
            pass  # damaged: what is unfinished is made anew
    index = empty_index(factory, model.dim)
    shutil.rmtree(parts, ignore_errors=True)  # unfinished, and of another plan
    make_directory(parts)
    sample = tqdm(_spread(len(references), FIT), "counting words", disable=not progress)
    texts = (text_of(references, tokenizer, i) for i in sample)
    model = model.fit(text for text in texts if text)  # a deleted one is empty and does not count
    _train(index, factory, model, references, tokenizer)
    plan["embedder_id"] = model.id
    replace_file(parts / "embedder.npy", lambda f: np.save(f, model.state))
    faiss.write_index(index, str(parts / "empty.faiss"))
    write_json(file, plan)  # the last: it says that the others are there
    return plan, model, index


def factory_for(n, dim, chosen=None):
    """The factory string of an index of n vectors: the one chosen by hand, or ours."""
    factory = chosen or choose_factory(n, dim)
    return factory.removeprefix("IDMap2,")  # ids are rows here


def _spread(n, most):
    """At most `most` ids, spread evenly over 0..n-1."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def _train(index, factory, model, references, tokenizer):
    """Learns lists and codes from a sample of the references."""
    n = len(references)
    n_sample, n_codes = sample_size(n, index)
    ids = _spread(n, n_sample)
    if len(ids) == 0:
        return
    lists = n_lists(index)
    check(lists <= len(ids), f"--factory {factory}: {lists} lists for {len(ids)} references")
    vectors = np.zeros((len(ids), model.dim), np.float32)  # the one large array of all this
    for i in range(0, len(ids), BATCH):
        part = ids[i : i + BATCH]
        vectors[i : i + BATCH] = embed_references(model, references, tokenizer, part)
    try:
        if isinstance(index, optional("faiss").IndexIVF):
            # The lists from all, the codes from fewer: of those FAISS makes two more copies
            pointer = optional("faiss").swig_ptr(vectors)
            index.train_q1(len(vectors), pointer, False, index.metric_type)
            vectors = vectors[_spread(len(vectors), n_codes)]
        index.train(np.ascontiguousarray(vectors))
    except RuntimeError as error:
        line = f"--factory {factory} cannot learn from {len(ids)} references: {_reason(error)}"
        raise UserError(line) from None


def forecast(path, references, tokenizer_name, encoder, factory=None, n_shards=1):
    """One line on what an index will take, before the work. Times are those of a small part, on
    this machine as busy as it is."""
    model = embedder(encoder)
    tokenizer = corpus.tokenizer(tokenizer_name)
    n = len(references)
    factory = factory_for(n, model.dim, factory)
    index = empty_index(factory, model.dim)
    takes = predict(n, index)
    a_reference = _seconds_to_embed(model, references, tokenizer)
    a_product = _seconds_to_multiply(index.d)
    training = takes.training * a_product
    coding = (n * a_reference + takes.coding * a_product) / n_shards
    of = f", each of {n_shards} shards" if n_shards > 1 else ""
    return (
        f"{path}: {n:,} references as {factory}, {index.sa_code_size()} bytes each: "
        f"{takes.size / 1e6:,.0f} MB in RAM and on disk, about {takes.peak / 1e6:,.0f} MB of RAM "
        f"while it is made; about {training:,.0f} s to train, {coding:,.0f} s to embed and code{of}"
    )


def _seconds_to_embed(model, references, tokenizer):
    """Seconds a reference, of a sample that is larger the faster it goes."""
    size = min(64, BATCH)
    while True:
        ids = _spread(len(references), size)
        began = time.perf_counter()
        embed_references(model, references, tokenizer, ids)
        seconds = time.perf_counter() - began
        if seconds > 0.1 or size >= min(BATCH, len(references)):
            return seconds / max(1, len(ids))
        size *= 4


def _seconds_to_multiply(dim, n=1024):
    """Seconds a multiplication, in what k-means and coding do: finding the nearest of n."""
    faiss = optional("faiss")
    x = np.random.default_rng(0).standard_normal((n, dim), np.float32)
    flat = faiss.IndexFlatIP(dim)
    flat.add(x)
    search(flat, x, 1)  # has threads and pages to find
    times = 0
    began = time.perf_counter()
    while time.perf_counter() - began < 0.1:
        search(flat, x, 1)
        times += 1
    return (time.perf_counter() - began) / (times * n * n * dim)


def join(path, references, progress=True, on_disk=False):
    """Makes the index from all its shards. UserError if one of them is not done.

    on_disk: its inverted lists go to a file of their own, and are never in RAM as a whole, neither
    here nor where it is opened. Where another process has just joined it, nothing is left to do.
    """
    path = Path(path)
    cure = cure_for(path)
    check(path.is_dir(), f"{path}/parts: no shards to join; {cure}")
    with lock(path):
        if (path / "parts/plan.json").exists():
            _join(path, references, progress, on_disk)
        else:
            check(is_of(path, references), f"{path}/parts: no shards to join; {cure}")


def is_index(path):
    """Whether an index is at `path`: its meta.json is written last."""
    return Path(path, "meta.json").exists()


def is_of(path, references):
    """Whether an index of these references is at `path`."""
    if not is_index(path):
        return False
    file = Path(path, "meta.json")
    return read_json(file, dict(references=str), cure_for(path))["references"] == references.hash


def _join(path, references, progress, on_disk):
    """`join`, by whoever holds the lock."""
    faiss = optional("faiss")
    parts = path / "parts"
    cure = cure_for(path)
    plan = read_json(parts / "plan.json", dict(n=int, references=str, embedder=str), cure)
    cure = cure_for(path, plan["embedder"])
    line = f"{parts} is of other references than {references.path}; {cure}"
    check(plan["references"] == references.hash, line)
    try:
        index = faiss.read_index(str(parts / "empty.faiss"))
    except RuntimeError as error:
        raise UserError(f"{parts} is damaged ({_reason(error)}); {cure}") from None
    files = _finished(parts, plan["n"], index.sa_code_size(), cure)
    made = parts / "index.faiss"
    lists = parts / LISTS
    lists.unlink(missing_ok=True)  # of a run that was killed
    if on_disk:
        inverted = n_lists(index)
        check(inverted, f"--on_disk: {plan['factory']} has no inverted lists; leave it out")
        _merge_on_disk(index, files, lists, plan["n"], progress)
    else:
        _fill(index, files, plan["n"], progress)
    faiss.write_index(index, str(made))
    del index
    blank = []
    for file in files:
        blank += np.fromfile(file.with_suffix(".blank"), "<i8").tolist()
    meta = {key: plan[key] for key in (*META, "chosen") if key in plan}
    meta |= dict(checksum=checksum(made), blank=blank)
    # From here on the old index is no more; a kill leaves the parts, and this is done again
    made.replace(path / "index.faiss")
    if on_disk:
        meta["lists_bytes"] = lists.stat().st_size
        lists.replace(path / LISTS)
    shutil.copy(parts / "embedder.npy", path / "embedder.npy")
    # the last: until its checksum is there, nobody takes the index for the new one
    write_sealed(path / "meta.json", meta)
    shutil.rmtree(parts)
    if not on_disk:
        Path(path, LISTS).unlink(missing_ok=True)  # of an older index, as are the changes
    Path(path, "changes.npz").unlink(missing_ok=True)


def _finished(parts, n, size, cure):
    """The code files of one complete set of shards, in order."""
    # shards may be there of several divisions: 1-of-2 beside 1-of-3; one of them is complete
    sets = {int(file.stem.split("-of-")[1]) for file in parts.glob("*-of-*.codes")}
    missing = "1/1"
    for n_shards in sorted(sets):
        files = []
        for i in range(1, n_shards + 1):
            start, stop = rows_of_shard(n, i, n_shards)
            file = parts / f"{i}-of-{n_shards}.codes"
            if not file.exists() or file.stat().st_size != (stop - start) * size:
                missing = f"{i}/{n_shards}"
                break
            files.append(file)
        if len(files) == n_shards:
            return files
    again = cure.partition(": ")[2]
    raise UserError(f"{parts}: shard {missing} is not done: run {again} --shard {missing}")


def _fill(index, files, n, progress):
    """Puts all codes into an empty index: row i is reference i."""
    inner = inner_index(index)
    if n_lists(index):
        _reserve(inner, files)
    row = 0  # of the index, and so the id of the reference
    with tqdm(total=n, desc="joining", disable=not progress) as bar:
        for codes in _blocks(files, index.sa_code_size()):
            if n_lists(index):
                inner.add_sa_codes(codes, np.arange(row, row + len(codes)))
            else:
                inner.add_sa_codes(codes)
            row += len(codes)
            bar.update(len(codes))
    index.ntotal = inner.ntotal


def _reserve(inner, files):
    """Makes each inverted list as large as it will be; otherwise they grow by doubling."""
    faiss = optional("faiss")
    n_bytes = inner.coarse_code_size()  # a code begins with the number of its list, low byte first
    weights = 256 ** np.arange(n_bytes)  # (n_bytes,)
    counts = np.zeros(inner.nlist, np.int64)  # entries of each list
    for codes in _blocks(files, inner.sa_code_size()):
        numbers = codes[:, :n_bytes].astype(np.int64) @ weights  # (n,)
        counts += np.bincount(numbers, minlength=inner.nlist)
    lists = faiss.downcast_InvertedLists(inner.invlists)
    for i, count in enumerate(counts.tolist()):
        lists.resize(i, count)
        lists.resize(i, 0)  # the room stays


def _merge_on_disk(index, files, lists, n, progress):
    """Puts all codes into the file `lists`, and makes it the inverted lists of the empty index:
    pieces of PIECE references are written to disk, and FAISS merges them there."""
    faiss = optional("faiss")
    merge_ondisk = optional("faiss.contrib.ondisk").merge_ondisk
    parts = lists.parent
    pieces = []
    row = 0  # of the index, and so the id of the reference
    with tqdm(total=n, desc="joining", disable=not progress) as bar:
        for codes in _blocks(files, index.sa_code_size(), PIECE):
            piece = faiss.clone_index(index)
            inner = inner_index(piece)
            inner.add_sa_codes(codes, np.arange(row, row + len(codes)))
            piece.ntotal = inner.ntotal
            pieces.append(str(parts / f"{len(pieces)}.piece"))
            faiss.write_index(piece, pieces[-1])
            row += len(codes)
            bar.update(len(codes))
    merge_ondisk(index, pieces, str(lists))
    for piece in pieces:
        os.remove(piece)


def _blocks(files, size, rows=8192):
    """Yields all codes of the files, (n, size) uint8, some rows at a time."""
    for file in files:
        with file.open("rb") as f:
            while data := f.read(rows * size):
                yield np.frombuffer(data, np.uint8).reshape(-1, size)


# -- Reading it -------------------------------------------------------------------------------


def open_index(file, meta, cure, shared=False):
    """Opens a FAISS index, if it is what its meta.json says. It is never in RAM twice.

    shared: inverted lists stay in the file, whose pages the system keeps in RAM for all processes
    as long as there is room; nothing can be added. Lists in a file of their own always do."""
    faiss = optional("faiss")
    check(file.exists(), f"{file} is missing; {cure}")
    check(checksum(file) == meta["checksum"], f"{file} is damaged or half renewed; {cure}")
    flags = 0
    if "lists_bytes" in meta:
        lists = file.with_name(LISTS)
        valid = lists.exists() and lists.stat().st_size == meta["lists_bytes"]
        check(valid, f"{lists} is missing or cut off; {cure}")
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    elif shared:
        flags = faiss.IO_FLAG_MMAP
    try:
        index = faiss.read_index(str(file), flags)
    except RuntimeError:
        raise UserError(f"{file} is no index of this FAISS version; {cure}") from None
    if flags and n_lists(index):
        lists = faiss.downcast_InvertedLists(inner_index(index).invlists)
        if hasattr(lists, "prefetch_nthread"):
            lists.prefetch_nthread = 0  # 32 threads a search cost more than they bring
    valid = index.ntotal == meta["n"] and index.d == meta["dim"]
    check(valid, f"{file} has {index.ntotal:,} vectors of {index.d}, unlike meta.json; {cure}")
    return index


def search(index, vectors, k):
    """The k nearest of each of vectors (n, dim), best first: ids (n, k) int64 and scores (n, k)
    float32; -1 and -inf if there are no more."""
    faiss = optional("faiss")
    n = len(vectors)
    ids = np.full((n, k), -1, np.int64)
    scores = np.full((n, k), -np.inf, np.float32)
    there = min(k, index.ntotal)
    if n and there:
        # FAISS uses BLAS from so many queries x dim on (default: 128,000); it pays from 4 queries
        faiss.cvar.distance_compute_blas_threshold = 4 * index.d
        found_scores, found = index.search(vectors, there)
        ids[:, :there] = found
        scores[:, :there] = found_scores
    scores[ids < 0] = -np.inf
    return ids, scores


def best_of(ids, scores, k):
    """The k best of each row of ids and scores (n, m), best first; ties keep their order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (n, k)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def exact_index(dim):
    """An empty index of vectors with ids of their own: they can be added and removed."""
    faiss = optional("faiss")
    return faiss.index_factory(dim, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
