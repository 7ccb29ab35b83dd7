"""What bench.py compares with: other ways to do the same, floors, and random numbers to run on."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from common import UserError, write_json
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
    c, less = b.config, 4 if b.device.type == "cpu" else 1
    B, H, Hkv = 4 // less, max(1, c.n_head // less), max(1, c.n_kv_head // less)
    P, C, R, S, n = len(c.header), c.chunk_len, c.n_recall, c.memory_tokens, len(c.header) + T
    N = -(-T // C)  # chunks, and memories, of a sequence
    shapes = [(B, H, n), *[(B, Hkv, n)] * 2, *[(B * N, Hkv, S)] * 2]
    make = dict(dtype=dtype, device=b.device, requires_grad=True)
    tensors = [torch.randn(*shape, c.head_dim, **make) for shape in shapes]
    recall = recall_table(np.arange(B * N).reshape(B, N), R).to(b.device)  # (B, N, R)
    count = torch.full((B * N,), S, device=b.device)
    # Who reads what: rows are header and context, columns N*S memory tokens, header and context.
    at = torch.arange(N, device=b.device)
    reads = (at <= at[:, None]) & (at > at[:, None] - R)  # (N, N)
    reads = reads.repeat_interleave(C, 0)[:T].repeat_interleave(S, 1)  # (T, N*S)
    past = torch.ones(n, n, dtype=bool, device=b.device).tril()
    mask = torch.cat([F.pad(reads, (0, 0, P, 0)), past], 1)  # the header reads no memory

    def masked(q, k, v, mem_k, mem_v, a=0, z=n, first=0, last=N):
        """Tokens a..z attend memories first..last of their sequence and tokens ..z."""

        def join(mem, x):  # -> (B, H, (last-first)*S + z, dh)
            mem = mem.unflatten(0, (B, N))[:, first:last].transpose(1, 2).flatten(2, 3)
            return torch.cat([mem, x[:, :, :z]], 2).repeat_interleave(H // Hkv, 1)

        m = torch.cat([mask[a:z, first * S : last * S], mask[a:z, N * S : N * S + z]], 1)
        keys, values = join(mem_k, k), join(mem_v, v)
        return F.scaled_dot_product_attention(q[:, :, a:z], keys, values, attn_mask=m)

    def loop(*x):  # over the chunks, as the paper did (Remark 7.1)
        ends = [0, *(min(n, P + (i + 1) * C) for i in range(N))]
        parts = [masked(*x, *ends[i : i + 2], max(0, i - R + 1), i + 1) for i in range(N)]
        return torch.cat(parts, 2)

    def merged(*x):
        return chunk_attention(*x, count, recall, C, P)

    def causal(q, k, v, mem_k, mem_v):  # without memories
        return causal_attention(q, k, v)

    dout = tensors[0].detach().flip(2)  # any numbers
    return tensors, dout, dict(merged=merged, concatenate=masked, loop=loop, causal=causal)


def both(f, tensors, dout):
    """Forward and backward: the output, and the gradients of all that it depends on."""
    y = f(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dout, allow_unused=True)]


# -- Floors -----------------------------------------------------------------------------------


def step_bytes(b, B, context, memory):
    """What a decoding step must read: the weights, and keys and values of every sequence."""
    c = b.config
    slots = c.n_layer * context + memory * c.n_memory_layer * c.n_recall * c.memory_tokens
    weights = c.n_params + c.vocab_size * c.n_embd
    return b.dtype.itemsize * (weights + B * slots * 2 * c.n_kv_head * c.head_dim)


def floor(b, B, T, new, memory):
    """The least seconds for B prompts of T tokens and `new` more of each: products at rate b.F,
    bytes at rate b.BW, whichever takes longer. The drive is not in it: it can work beside."""
    c, token = b.config, B * cost.forward(b.config, 1) / b.F
    reads = memory * -(-T // c.chunk_len) * c.n_recall * cost.read_explicit(c)
    prefill = B * (cost.forward(c, T, head=False) + 2 * c.vocab_size * c.n_embd + reads) / b.F
    first, *steps = (step_bytes(b, B, T + i, memory) / b.BW for i in range(new))
    return max(first, prefill) + sum(max(s, token) for s in steps)


# -- Memories to read -------------------------------------------------------------------------


class Unique:
    """The search of the worst case (7.5): every query finds references that no other finds."""

    def __init__(self, n):
        self.ids, self.at = np.random.default_rng(0).permutation(n), 0

    def search(self, queries, k):
        at = np.arange(self.at, self.at + len(queries) * k) % len(self.ids)
        self.at += len(queries) * k
        return self.ids[at].reshape(-1, k), np.zeros((len(queries), k))


class RandomCodec(Codec):
    """Decodes as a trained one does; but there is no FAISS index that would encode."""

    def save(self, path):
        np.savez(path / "codec.npz", spec=self.spec, table=self.table.cpu().numpy(), crc=0)


def random_codec(c):
    spec = default_spec(c.head_dim, 10**9)
    return RandomCodec(spec, torch.randn(sum(1 << n for _, n in layout(spec)[0]), c.head_dim))


def trained(codec, dim):
    """-> a codec of this spec, and FAISS's own index of it. Trained on as few vectors as FAISS
    accepts: its speed does not depend on what it has learnt."""
    few = max(256, *(1 << bits for _, bits in codec.fields))
    codec = Codec.train(torch.randn(few, dim), codec.spec)
    return codec, codec._index()


def random_codes(c, codec, n):
    """n memories: any bits, but the bits between the fields are 0, or FAISS would stop us all."""
    used = np.zeros(8 * codec.bytes, bool)
    for first, bits in codec.fields:
        used[first : first + bits] = True
    mask = torch.from_numpy(np.packbits(used, bitorder="little"))
    return torch.randint(256, (n, *c.memory_shape[:-1], codec.bytes), dtype=torch.uint8) & mask


def decoding(b, B, codec):
    """A function: brings the codes of R memories a sequence into a cache's slots, as recalls do."""
    c = b.config
    codes = random_codes(c, codec, B * c.n_recall).to(b.device)
    pool = Memories(codes, torch.full((len(codes),), c.memory_tokens, device=b.device))
    cache = Cache(c, B, 1, dtype=b.dtype, device=b.device)
    table = torch.arange(len(codes), device=b.device).view(B, -1)
    return partial(cache.recall, pool, table, codec)


def random_bank(b, folder, queries, codec=None):
    """A bank of random memories, its cache in RAM off. There are enough for nine runs that recall
    for `queries` queries, or what half of the free disk holds (ValueError: not even for one)."""
    c, path = b.config, Path(folder) / ("codes" if codec else "bf16")
    record = math.prod(c.memory_shape[:-1]) * (codec.bytes if codec else 2 * c.head_dim)
    n, room = queries * c.n_recall, shutil.disk_usage(folder).free // 2 // record
    if room < n:
        raise UserError(f"{folder}: {n:,} memories want {2 * n * record:,} free bytes; see --tmp")
    n = min(9 * n, room)
    write_json(path.parent / "meta.json", dict(n_vocab=c.vocab_size))
    texts = np.random.default_rng(0).integers(0, c.vocab_size, (n, c.ref_len))
    references = corpus.References.create(f"{path}.refs", texts, c.vocab_size)
    writer = SimpleNamespace(config=c, device=b.device, fingerprint=lambda: "random")
    bank = MemoryBank.create(path, writer, references, codec=codec)
    some = random_codes(c, codec, 64) if codec else torch.randn(64, *c.memory_shape).bfloat16()
    for ids in np.array_split(np.arange(n), -(-n // 64)):
        bank._put(ids, some[: len(ids)], torch.full((len(ids),), c.memory_tokens))
    return MemoryBank.open(path, writer, references, cache=0)


def drop(bank):
    """Takes a bank's records out of the page cache. Were they gone? None: no telling."""
    fd = bank.file.fileno()
    try:
        os.fsync(fd)  # what is not on the drive yet would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(fd, [bytearray(1)], len(bank) // 2 * bank.record_bytes, os.RWF_NOWAIT)
        return False  # it came without waiting for the drive
    except BlockingIOError:
        return True
    except (OSError, AttributeError):
        return None


def readers(bank, k):
    """{name: function}: k random records, others each time, by three ways. The bank's recall
    also verifies checksums, and brings them to the device."""
    size, file, unique = bank.record_bytes, bank.path / "memories.bin", Unique(len(bank))
    fd, rows = bank.file.fileno(), np.empty((k, size), np.uint8)
    pool = ThreadPoolExecutor(8)

    def ids():
        return np.sort(unique.search([""], k)[0][0])

    def preadv():  # nothing but the reads, into memory that is there
        some = ids()
        list(pool.map(lambda j: os.preadv(fd, [rows[j]], int(some[j]) * size), range(k)))
        return rows

    def memmap():  # a new map each time: pages stay in the page cache as long as they are mapped
        return np.memmap(file, np.uint8, "r").reshape(-1, size)[ids()]

    return dict(bank=lambda: bank.recall(ids()), preadv=preadv, memmap=memmap)


def pieces(b, model, bank, B):
    """{name: function}: what one retrieval for B sequences consists of, and their prompts of 2C
    tokens with and without memories."""
    c, T, R, rng = b.config, 2 * b.config.chunk_len, b.config.n_recall, np.random.default_rng(0)
    words = Path(__file__).read_text().split()
    texts = [" ".join(rng.choice(words, c.chunk_len)) for _ in range(B)]
    pool = MemoryBank.open(bank.path, model, bank.references).recall(np.arange(2 * B * R))
    recall = torch.arange(2 * B * R, device=b.device).view(B, 2, R)  # each chunk has its own
    codec = random_codec(c).to(b.device)
    codes = random_codes(c, codec, B * R)
    runs = dict(embed=partial(retrieval.embedder("hash").encode, texts))
    with suppress(ImportError):  # without FAISS it is not measured
        runs["search"] = partial(flat(512, B)[0].search, texts, R)
    if b.device.type == "cuda":
        runs["copy bf16"] = partial(pool.kv[: B * R].cpu().pin_memory().to, b.device)
        runs["copy codes"] = partial(codes.pin_memory().to, b.device)
    runs["decode codes"] = decoding(b, B, codec)
    tokens = torch.randint(c.vocab_size, (B, T), device=b.device)
    for name, memory in (("plain", {}), ("memory", dict(memories=pool, recall=recall))):
        cache = partial(Cache, c, B, T, bool(memory), b.dtype, b.device)
        runs[f"prefill, {name}"] = lambda m=memory, new=cache: model(tokens, cache=new(), **m)
    return runs


FLAT = 100_000  # references: the most for which retrieval.py takes an exact index


def flat(dim, queries):
    """-> our Retriever of FLAT random vectors, these (FLAT, dim), and what any text embeds to."""
    import faiss

    rng = np.random.default_rng(0)
    x, q = (rng.standard_normal((rows, dim), np.float32) for rows in (FLAT, queries))
    index = faiss.IndexFlatIP(dim)
    index.add(x)
    embedder = SimpleNamespace(dim=dim, encode=lambda texts: q)
    return retrieval.Retriever("", index, embedder, None, {}), x, q
