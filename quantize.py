"""The vector codec: each key and each value of the explicit memories as a few bytes (sec. 3.3, B).

    "OPQ20_80,Residual2x14,PQ8x10": 80 numbers, 160 bytes in bf16 -> 14 bytes, 11.4 times fewer
        OPQ20_80        rotate, so that the pieces below become independent of one another
        Residual2x14    the two halves, each replaced by one of 2^14 centroids: 28 bits in 4 bytes
        PQ8x10          what is left over: eight pieces, one of 2^10 centroids each: 10 bytes

FAISS trains and encodes; we decode. A vector is the sum of the 2 + 8 centroids that its code names,
rotated back: done once, to the centroids. What remains is adding 10 rows of a table, on the GPU
after only the codes have crossed the bus, and without FAISS (sec. 3.3: "only the decoder").
As in the paper one codec serves keys and values of all layers; the coarse stage tells them apart.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, check, optional, replace_file

ITERATIONS = 10  # of each k-means; FAISS's 25 take 2.5 times as long for at most 3 % less error
BITS = "([1-9]|1[0-6])"
SPEC = re.compile(rf"(?:OPQ\d+(?:_\d+)?,)?Residual([1-4])x{BITS},PQ(\d+)x{BITS}")


def default_spec(dh, n):
    """The FAISS factory string for vectors of dh numbers (even), n of which are there to train on.
    k-means wants 39 vectors a centroid (FAISS's rule), so few vectors get few bits:
    >>> default_spec(80, 638_976), default_spec(80, 638_975)
    ('OPQ20_80,Residual2x14,PQ8x10', 'Residual2x10,PQ8x10')
    >>> default_spec(32, 10_000_000), default_spec(32, 20_000)
    ('Residual2x10,PQ8x10', 'Residual2x8,PQ8x8')
    """
    # FAISS cuts vectors into equal pieces only: of 4 to 10 numbers, often (paper: 10)
    divisors = [p for p in range(1, dh + 1) if dh % p == 0]
    pieces = max(p for p in divisors if p <= 4 << (dh >= 32) << (dh > 80))  # at most 4, 8, 16
    if dh >= 64 and n >= 39 << 14:
        rotated = max(p for p in divisors if p <= dh // 4)
        return f"OPQ{rotated}_{dh},Residual2x14,PQ{pieces}x10"
    # Small heads: 12 bits encode 4 times slower for 0.01 less relative error, OPQ gains nothing.
    bits = max((b for b in (6, 8, 10) if n >= 39 << b), default=4)
    return f"Residual2x{bits},PQ{pieces}x{bits}"


def layout(spec):
    """Where the centroid numbers lie in a code: [(first bit, bits), ...] and the bytes of a code.
    FAISS packs bits from the low end of each byte on, and both stages begin with a new byte:
    >>> layout("Residual2x10,PQ3x6")
    ([(0, 10), (10, 10), (24, 6), (30, 6), (36, 6)], 6)
    """
    match, like = SPEC.fullmatch(spec), "OPQ20_80,Residual2x14,PQ8x10"
    check(match, f"codec {spec!r}: give a string like {like!r}, at most 16 bits a number")
    halves, coarse, pieces, fine = map(int, match.groups())
    second = 8 * -(-halves * coarse // 8)  # first bit of the second stage
    fields = [(m * coarse, coarse) for m in range(halves)]
    fields += [(second + m * fine, fine) for m in range(pieces)]
    return fields, second // 8 + -(-pieces * fine // 8)


def unpack(codes, fields):
    """codes (n, bytes) uint8 -> the numbers at the fields' bits, (n, len(fields)) int32.
    Three neighbouring bytes hold any number of at most 16 bits; here 2, and 7 that cross a byte:
    >>> unpack(torch.tensor([[0b10110100, 0b00000001]], dtype=torch.uint8), [(0, 2), (2, 7)])
    tensor([[  0, 109]], dtype=torch.int32)
    """
    start, bits = torch.tensor(fields, dtype=torch.int32, device=codes.device).T
    byte = start // 8
    codes = F.pad(codes, (0, 2)).int()  # two zero bytes, for numbers that end with the code
    words = codes[:, byte] | codes[:, byte + 1] << 8 | codes[:, byte + 2] << 16
    return (words >> (start % 8)) & ((1 << bits) - 1)


class Codec:
    """Vectors of dh numbers <-> codes of `.bytes` bytes; `.spec` says how (see the top).

        codec = Codec.train(vectors)         # (n, dh), a sample of the bank's keys and values
        codes = codec.encode(memories.kv)    # (M, Lm, 2, Hkv, S, dh) -> (M, Lm, 2, Hkv, S, bytes)
        kv = codec.to("cuda").decode(codes)  # back, float32, on the GPU

    table (rows, dh) float32: all centroids, rotated back, number after number in code order.
    index: the FAISS index that encodes; None until needed where it comes from `file`."""

    def __init__(self, spec, table, index=None, file=None):
        self.spec, self.table, self.index, self.file = spec, table, index, file
        self.fields, self.bytes = layout(spec)
        sizes = torch.tensor([1 << bits for _, bits in self.fields], device=table.device)
        n = int(sizes.sum())
        check(len(table) == n, f"codec {spec}: {n} centroids needed, not {len(table)}")
        self.first = (sizes.cumsum(0) - sizes).int()  # the row of each number's centroid 0

    @staticmethod
    def train(vectors, spec=None):
        """A codec for vectors (n, dh), which are a uniform sample of the keys and values (App. B).
        spec: a FAISS factory string; None: `default_spec`. ValueError for too few vectors (k-means
        needs one a centroid), for NaN, and for a string that does not fit dh."""
        faiss, x = optional("faiss"), _rows(vectors)
        n, dh = x.shape
        spec = spec or default_spec(dh, n)
        bits = [bits for _, bits in layout(spec)[0]] + [8] * spec.startswith("OPQ")  # its own PQ
        least = 1 << max(bits)
        few = f"{n} vectors to train on, it needs {least} (and wants {39 * least})"
        check(n >= least, f"codec {spec}: {few}: give more references or fewer bits")
        try:
            index = faiss.index_factory(dh, spec)
        except RuntimeError as e:
            raise UserError(f"codec {spec}: not for vectors of {dh} numbers: uneven pieces") from e
        rotation, *pqs = _stages(index)
        if rotation:  # it is fitted to a PQ of its own: give it one that is as quiet as ours
            rotation.niter = rotation.niter_pq_0 = ITERATIONS
            pqs.append(faiss.ProductQuantizer(rotation.d_out, rotation.M, 8))
            rotation.pq = pqs[-1]
        for pq in pqs:
            pq.cp.niter, pq.cp.min_points_per_centroid = ITERATIONS, 1  # 1: do not warn
        index.train(x)
        if rotation:
            rotation.pq = None  # ours is gone after this
        return Codec(spec, fold(index), index)

    def encode(self, x):
        """x (..., dh), any float type, any device -> codes (..., bytes) uint8, on the CPU."""
        codes = self._index().sa_encode(_rows(x, self.table.shape[1]))
        return torch.from_numpy(codes).view(*x.shape[:-1], self.bytes)

    def decode(self, codes):
        """codes (..., bytes) uint8 -> (..., dh) float32 where the table is. FAISS's `sa_decode`."""
        ours = codes.dtype == torch.uint8 and codes.shape[-1] == self.bytes
        check(ours, f"codec {self.spec}: {self.bytes} uint8 needed, not another codec's")
        flat = codes.to(self.table.device).reshape(-1, self.bytes)
        rows = unpack(flat, self.fields) + self.first  # (n, numbers a code)
        x = F.embedding_bag(rows, self.table, mode="sum")  # (n, dh)
        return x.view(*codes.shape[:-1], self.table.shape[1])

    def to(self, device):
        """Moves the table that decodes; encoding stays on the CPU."""
        self.table, self.first = self.table.to(device), self.first.to(device)
        return self

    def save(self, path):
        """Writes codec.faiss (encodes) and codec.npz (decodes) into the directory `path`: codec.npz
        last, for it holds the checksum of the other."""
        new, index = Path(path, "codec.new"), optional("faiss").serialize_index(self._index())
        arrays = dict(spec=self.spec, table=self.table.cpu().numpy(), crc=zlib.crc32(index))
        new.parent.mkdir(parents=True, exist_ok=True)
        replace_file(new.with_suffix(".faiss"), lambda f: f.write(index), new)
        replace_file(new.with_suffix(".npz"), lambda f: np.savez(f, **arrays), new)

    @staticmethod
    def load(path):
        """Opens what `save` wrote; path: the directory or either file. Without codec.faiss or FAISS
        it only decodes. UserError without codec.npz, or if either is damaged."""
        folder = Path(path).parent if Path(path).suffix in (".npz", ".faiss") else Path(path)
        tables, file = folder / "codec.npz", folder / "codec.faiss"
        check(tables.exists(), f"{tables}: no codec here: train one")
        try:
            with np.load(tables) as z:
                crc, table = z["crc"], torch.from_numpy(z["table"])
                codec = Codec(str(z["spec"]), table, file=file)
        except Exception as e:  # zip, zlib, numpy and we each have errors of our own
            raise UserError(f"{tables}: not a whole codec ({e}): train it again") from e
        same = not file.exists() or zlib.crc32(file.read_bytes()) == crc
        check(same, f"{file}: not what {tables.name} was made with: train the codec again")
        return codec

    def _index(self):
        if self.index is None:
            check(self.file.exists(), f"{self.file}: missing, and it encodes")
            self.index = optional("faiss").read_index(str(self.file))
        return self.index


def fold(index):
    """All centroids of a trained FAISS index, rotated back: (rows, dh) float32.
    FAISS decodes A^T (coarse + fine), each of them pieces laid side by side. Piece m of a centroid
    meets only its rows of A, so row = piece @ A[its rows], and the decoded vector is their sum."""
    array, (rotation, *pqs), rows = optional("faiss").vector_to_array, _stages(index), []
    A = array(rotation.A).astype(float) if rotation else np.eye(index.d)
    for pq in pqs:
        centroids = array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        rows += [*centroids @ A.reshape(pq.M, pq.dsub, index.d)]  # (ksub, dh) each, float64
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _stages(index):
    """(rotation or None, coarse, fine) of an index: an OPQMatrix and two ProductQuantizers."""
    faiss, rotation = optional("faiss"), None
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        index = faiss.downcast_index(index.index)
    return rotation, faiss.downcast_index(index.q1.quantizer).pq, index.pq


def _rows(x, dh=None):
    """x (..., dh), tensor or array -> (n, dh) float32 as FAISS takes it."""
    x = torch.as_tensor(x).detach().float().cpu()
    fits = dh in (None, x.shape[-1])
    check(fits, f"codec: vectors of {dh} numbers needed, got the shape {tuple(x.shape)}")
    check(x.isfinite().all(), "codec: NaN or infinity among the vectors: check what wrote them")
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
