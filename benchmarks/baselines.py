"""What bench.py compares with: other ways to do the same, floors, and random numbers to run on."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import corpus
import cost
import retrieval
from bank import MemoryBank
from common import UserError, optional, write_json
from memory import Memories, causal_attention, chunk_attention
from model import Cache
from quantize import Codec, default_spec, layout
from train import recall_table

# -- Attention: eq. (3.1) in four ways --------------------------------------------------------


def attention_case(b, T, dtype):
    """-> [q, k, v, mem_k, mem_v], a gradient of the output, and {name: function of the former};
    T tokens after a header.

    4 sequences and the heads of b.config; on a CPU one sequence and a quarter of the heads. The
    table is that of training: each chunk has a memory, chunk c reads those of chunks c-R+1..c.
    """
    config = b.config
    share = 4 if b.device.type == "cpu" else 1
    B = 4 // share
    H = max(1, config.n_head // share)
    Hkv = max(1, config.n_kv_head // share)
    P = len(config.header)
    C = config.chunk_len
    R = config.n_recall
    S = config.memory_tokens
    dh = config.head_dim
    n = P + T
    n_chunks = -(-T // C)  # and memories, of a sequence
    M = B * n_chunks
    make = partial(torch.randn, dtype=dtype, device=b.device, requires_grad=True)
    q = make(B, H, n, dh)
    k = make(B, Hkv, n, dh)
    v = make(B, Hkv, n, dh)
    mem_k = make(M, Hkv, S, dh)
    mem_v = make(M, Hkv, S, dh)
    recall = recall_table(np.arange(M).reshape(B, n_chunks), R).to(b.device)  # (B, n_chunks, R)
    count = torch.full((M,), S, device=b.device)
    # Who reads what: rows are header and context, columns the memory tokens, header and context.
    chunk = torch.arange(n_chunks, device=b.device)
    reads = (chunk <= chunk[:, None]) & (chunk > chunk[:, None] - R)  # (n_chunks, n_chunks)
    reads = reads.repeat_interleave(C, 0)[:T]  # (T, n_chunks)
    reads = reads.repeat_interleave(S, 1)  # (T, n_chunks*S)
    reads = F.pad(reads, (0, 0, P, 0))  # (n, n_chunks*S): the header reads no memory
    past = torch.ones(n, n, dtype=bool, device=b.device).tril()

    def masked(q, k, v, mem_k, mem_v, start=0, end=n, first=0, last=n_chunks):
        """Tokens start..end attend memories first..last of their sequence and tokens ..end."""

        def join(mem, x):
            mem = mem.unflatten(0, (B, n_chunks))[:, first:last]  # (B, m, Hkv, S, dh)
            mem = mem.transpose(1, 2).flatten(2, 3)  # (B, Hkv, m*S, dh)
            both = torch.cat([mem, x[:, :, :end]], 2)  # (B, Hkv, m*S + end, dh)
            return both.repeat_interleave(H // Hkv, 1)  # (B, H, m*S + end, dh)

        mask = torch.cat([reads[start:end, first * S : last * S], past[start:end, :end]], 1)
        keys = join(mem_k, k)
        values = join(mem_v, v)
        return F.scaled_dot_product_attention(q[:, :, start:end], keys, values, attn_mask=mask)

    def loop(*tensors):  # over the chunks, as the paper did (Remark 7.1)
        parts = []
        for i in range(n_chunks):
            start = 0 if i == 0 else P + i * C
            end = min(n, P + (i + 1) * C)
            first = max(0, i - R + 1)
            parts.append(masked(*tensors, start, end, first, i + 1))
        return torch.cat(parts, 2)

    def merged(*tensors):
        return chunk_attention(*tensors, count, recall, C, P)

    def causal(q, k, v, mem_k, mem_v):  # without memories
        return causal_attention(q, k, v)

    dout = q.detach().flip(2)  # any numbers
    ways = dict(merged=merged, concatenate=masked, loop=loop, causal=causal)
    return [q, k, v, mem_k, mem_v], dout, ways


def both(f, tensors, dout):
    """Forward and backward: the output, and the gradients of all that it depends on."""
    y = f(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dout, allow_unused=True)]


# -- Floors -----------------------------------------------------------------------------------


def step_bytes(b, batch, context, memory):
    """What a decoding step must read: the weights, and keys and values of every sequence."""
    config = b.config
    slots = config.n_layer * context
    if memory:
        slots += config.n_memory_layer * config.n_recall * config.memory_tokens
    weights = config.n_params + config.vocab_size * config.n_embd
    cache = batch * slots * 2 * config.n_kv_head * config.head_dim
    return b.dtype.itemsize * (weights + cache)


def floor(b, batch, T, n_new, memory):
    """The least seconds for `batch` prompts of T tokens and n_new more of each: products at rate
    b.F, bytes at rate b.BW, whichever takes longer. The drive is not in it: it can work beside."""
    config = b.config
    prefill_flops = cost.forward(config, T, head=False) + 2 * config.vocab_size * config.n_embd
    if memory:
        n_chunks = -(-T // config.chunk_len)
        prefill_flops += n_chunks * config.n_recall * cost.read_explicit(config)
    prefill = batch * prefill_flops / b.F
    seconds = max(prefill, step_bytes(b, batch, T, memory) / b.BW)  # gives the first token
    products = batch * cost.forward(config, 1) / b.F
    for i in range(1, n_new):
        seconds += max(products, step_bytes(b, batch, T + i, memory) / b.BW)
    return seconds


# -- Memories to read -------------------------------------------------------------------------


class WorstCase:
    """The search of the worst case (7.5): it takes its time, and then every query is given
    references that no other query gets, so that all are loaded from the drive.

    n: references. search: a function of the number of queries, see `searching`; None: no time.
    """

    def __init__(self, n, search=None):
        self.ids = np.random.default_rng(0).permutation(n)
        self.given = 0
        self.search_for = search

    def search(self, queries, k):
        n = len(queries)
        if self.search_for is not None:
            self.search_for(n)
        at = np.arange(self.given, self.given + n * k) % len(self.ids)
        self.given += n * k
        return self.ids[at].reshape(n, k), np.zeros((n, k))


class InMemory:
    """Stands for a bank whose memories are on the device already."""

    def __init__(self, pool):
        self.pool = pool

    def recall(self, ids):
        return self.pool[torch.as_tensor(ids, device=self.pool.kv.device)]


class RandomCodec(Codec):
    """Decodes as a trained one does; but there is no FAISS index that would encode."""

    def save(self, path):
        np.savez(path / "codec.npz", spec=self.spec, table=self.table.cpu().numpy(), crc=0)


def random_codec(config):
    spec = default_spec(config.head_dim, 10**9)
    fields, _ = layout(spec)
    rows = sum(1 << bits for _, bits in fields)
    return RandomCodec(spec, torch.randn(rows, config.head_dim))


def trained(codec, dim):
    """-> a codec of this spec, and FAISS's own index of it. Trained on as few vectors as FAISS
    accepts: its speed does not depend on what it has learnt."""
    few = 256
    for _, bits in codec.fields:
        few = max(few, 1 << bits)
    codec = Codec.train(torch.randn(few, dim), codec.spec)
    return codec, codec._index()


def random_codes(config, codec, n):
    """n memories: any bits, but the bits between the fields are 0, or FAISS would stop us all."""
    used = np.zeros(8 * codec.bytes, bool)
    for first, bits in codec.fields:
        used[first : first + bits] = True
    mask = torch.from_numpy(np.packbits(used, bitorder="little"))  # (bytes,)
    shape = (n, *config.memory_shape[:-1], codec.bytes)
    return torch.randint(256, shape, dtype=torch.uint8) & mask


def decoding(b, batch, codec):
    """A function: brings the codes of R memories a sequence into a cache's slots, as recalls do."""
    config = b.config
    n = batch * config.n_recall
    codes = random_codes(config, codec, n).to(b.device)
    pool = Memories(codes, torch.full((n,), config.memory_tokens, device=b.device))
    cache = Cache(config, batch, 1, dtype=b.dtype, device=b.device)
    table = torch.arange(n, device=b.device).view(batch, -1)  # (B, R)
    return partial(cache.load_memories, pool, table, codec)


def random_bank(b, folder, queries, codec=None):
    """A bank of random memories, its cache in RAM off. There are enough for nine runs that recall
    for `queries` queries, or what half of the free disk holds (UserError: not even for one)."""
    config = b.config
    path = Path(folder) / ("codes" if codec else "bf16")
    vector_bytes = codec.bytes if codec else 2 * config.head_dim
    record = math.prod(config.memory_shape[:-1]) * vector_bytes
    n = queries * config.n_recall
    room = shutil.disk_usage(folder).free // 2 // record
    if room < n:
        raise UserError(f"{folder}: {n:,} memories want {2 * n * record:,} free bytes; see --tmp")
    n = min(9 * n, room)
    write_json(path.parent / "meta.json", dict(n_vocab=config.vocab_size))
    texts = np.random.default_rng(0).integers(0, config.vocab_size, (n, config.ref_len))
    references = corpus.References.create(f"{path}.refs", texts, config.vocab_size)
    writer = SimpleNamespace(config=config, device=b.device, fingerprint=lambda: "random")
    MemoryBank.create(path, writer, references)
    if codec:
        (path / "codes").mkdir()
        codec.save(path / "codes")
        some = random_codes(config, codec, 64)
    else:
        some = torch.randn(64, *config.memory_shape).bfloat16()
    bank = MemoryBank.open(path, writer, codes=codec is not None, cache=0)
    rows = some.view(torch.uint8).view(64, record).numpy()
    for ids in np.array_split(np.arange(n), -(-n // 64)):
        texts = bank.references.rows(ids)
        bank._put(texts, [(bank.store, rows)], [config.memory_tokens] * len(ids))
    return bank


def drop(bank):
    """Takes a bank's records out of the page cache. Were they gone? None: no telling."""
    fd = bank.store.fd
    try:
        os.fsync(fd)  # what is not on the drive yet would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(fd, [bytearray(1)], len(bank) // 2 * bank.store.stride, os.RWF_NOWAIT)
        return False  # it came without waiting for the drive
    except BlockingIOError:
        return True
    except (OSError, AttributeError):
        return None


def readers(bank, k):
    """{name: function}: k random records, others each time, by three ways. The bank's recall
    also verifies checksums, and brings them to the device."""
    size = bank.record_bytes
    stride = bank.store.stride
    file = bank.path / "memories.bin"
    worst_case = WorstCase(len(bank))
    fd = os.open(file, os.O_RDONLY)
    rows = np.empty((k, size), np.uint8)
    threads = ThreadPoolExecutor(8)

    def some_ids():
        ids, _ = worst_case.search([""], k)
        return np.sort(ids[0])

    def preadv():  # nothing but the reads, into memory that is there
        ids = some_ids()

        def read(j):
            os.preadv(fd, [rows[j]], int(ids[j]) * stride)

        for _ in threads.map(read, range(k)):
            pass
        return rows

    def memmap():  # a new map each time: pages stay in the page cache as long as they are mapped
        return np.memmap(file, np.uint8, "r").reshape(-1, stride)[some_ids(), :size]

    def ours():
        return bank.recall(some_ids())

    return dict(bank=ours, preadv=preadv, memmap=memmap)


# -- Searches ----------------------------------------------------------------------------------

FLAT = 100_000  # references: the most for which retrieval.py takes an exact index


def searching(b):
    """-> search(n): embeds n texts of a chunk's length and finds R of FLAT references for each, on
    the CPU; and how: with FAISS, or, where it is missing, by a product in PyTorch."""
    dim = 1024  # as bge-m3
    R = b.config.n_recall
    embedder = retrieval.embedder(f"hash:{dim}")
    words = Path(__file__).read_text().split()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((FLAT, dim), np.float32)

    def texts(n):
        return [" ".join(rng.choice(words, b.config.chunk_len)) for _ in range(n)]

    try:
        faiss = optional("faiss")
    except UserError:
        on_torch = torch.from_numpy(vectors)

        def search(n):
            product(torch.from_numpy(embedder.encode(texts(n))), on_torch, R)

        return search, f"a product in PyTorch over {FLAT:,} x {dim}"
    index = faiss.IndexFlatIP(dim)
    index.add(vectors)

    def search(n):
        index.search(embedder.encode(texts(n)), R)

    return search, f"FAISS, flat, {FLAT:,} x {dim}"


def product(queries, vectors, k):
    """The k largest inner products of queries (n, dim) with vectors (N, dim)."""
    return (queries @ vectors.T).topk(k)


def flat(dim, queries):
    """-> our Retriever of FLAT random vectors, these (FLAT, dim), and what any text embeds to."""
    faiss = optional("faiss")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((FLAT, dim), np.float32)
    embedded = rng.standard_normal((queries, dim), np.float32)
    index = faiss.IndexFlatIP(dim)
    index.add(vectors)
    embedder = SimpleNamespace(name="given", dim=dim, encode=lambda texts: embedded)
    return retrieval.Retriever("", index, embedder, None, dict(blank=[])), vectors, embedded
