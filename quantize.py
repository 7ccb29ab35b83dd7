"""The vector codec: each key and each value of the explicit memories as a few bytes (sec. 3.3, B).

    "OPQ20_80,Residual2x14,PQ8x10": 80 numbers, 160 bytes in bf16 -> 14 bytes, 11.4 times fewer
        OPQ20_80        rotate, so that the pieces below become independent of one another
        Residual2x14    the two halves, each replaced by one of 2^14 centroids: 28 bits in 4 bytes
        PQ8x10          what is left over: eight pieces, one of 2^10 centroids each: 10 bytes

FAISS trains and encodes; we decode. A code names 2 + 8 centroids; their sum, rotated back, is the
vector. We rotate the centroids back instead, once, so that decoding only adds 10 rows of a table.
It needs no FAISS (sec. 3.3: "only the decoder"), and it runs on the GPU after only the codes have
crossed the bus. As in the paper, one codec serves the keys and values of all layers; the coarse
stage tells them apart.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, check, make_directory, optional, read_bytes, replace_file

ITERATIONS = 10  # of each k-means; FAISS's 25 take 2.5 times as long for at most 3 % less error
PAPER = "OPQ20_80,Residual2x14,PQ8x10"
BITS = "([1-9]|1[0-6])"
COUNT = "[1-9][0-9]{0,3}"
SPEC = re.compile(rf"(?:OPQ{COUNT}(?:_{COUNT})?,)?Residual([1-4])x{BITS},PQ({COUNT})x{BITS}")


def default_spec(dh, n):
    """The FAISS factory string for vectors of dh numbers (even) when there are n to train on.

    k-means wants 39 vectors a centroid (FAISS's rule), so few vectors get few bits:
    >>> default_spec(80, 638_976), default_spec(80, 638_975)
    ('OPQ20_80,Residual2x14,PQ8x10', 'Residual2x10,PQ8x10')
    >>> default_spec(32, 10_000_000), default_spec(32, 20_000)
    ('Residual2x10,PQ8x10', 'Residual2x8,PQ8x8')
    """
    # FAISS cuts vectors into equal pieces only. We want pieces of 4 to 10 numbers (paper: 10).
    most = 4
    if dh >= 32:
        most = 8
    if dh > 80:
        most = 16
    pieces = _largest_divisor(dh, most)
    if dh >= 64 and n >= 39 * 2**14:
        rotated = _largest_divisor(dh, dh // 4)
        return f"OPQ{rotated}_{dh},Residual2x14,PQ{pieces}x10"
    # Small heads: 12 bits encode 4 times slower for 0.01 less relative error, OPQ gains nothing.
    bits = 4
    for more in (6, 8, 10):
        if n >= 39 * 2**more:
            bits = more
    return f"Residual2x{bits},PQ{pieces}x{bits}"


def _largest_divisor(n, most):
    """The largest number up to `most` that divides n."""
    return max(p for p in range(1, most + 1) if n % p == 0)


def layout(spec):
    """-> where a code holds the numbers of its centroids, [(first bit, bits), ...], and its bytes.

    FAISS packs bits from the low end of each byte on, and both stages begin with a new byte:
    >>> layout("Residual2x10,PQ3x6")
    ([(0, 10), (10, 10), (24, 6), (30, 6), (36, 6)], 6)
    """
    match = SPEC.fullmatch(spec)
    check(match, f"codec {spec!r}: give a string like {PAPER!r}, at most 16 bits a number")
    parts, coarse_bits, pieces, fine_bits = (int(number) for number in match.groups())
    fields = []
    for m in range(parts):
        fields.append((m * coarse_bits, coarse_bits))
    coarse_bytes = _bytes(parts * coarse_bits)
    for m in range(pieces):
        fields.append((8 * coarse_bytes + m * fine_bits, fine_bits))
    return fields, coarse_bytes + _bytes(pieces * fine_bits)


def _bytes(bits):
    """How many bytes hold so many bits."""
    return (bits + 7) // 8


def unpack(codes, fields):
    """codes (n, bytes) uint8 -> the numbers at the fields' bits, (n, len(fields)) int32.

    Any number of at most 16 bits lies within three neighbouring bytes. Here a number of 2 bits, and
    one of 7 bits that crosses a byte:
    >>> unpack(torch.tensor([[0b10110100, 0b00000001]], dtype=torch.uint8), [(0, 2), (2, 7)])
    tensor([[  0, 109]], dtype=torch.int32)
    """
    fields = torch.tensor(fields, dtype=torch.int32, device=codes.device)  # (numbers, 2)
    first_bit = fields[:, 0]
    bits = fields[:, 1]
    byte = first_bit // 8
    codes = F.pad(codes, (0, 2)).int()  # (n, bytes + 2): zeros after a number that ends the code
    low = codes[:, byte]  # (n, numbers)
    middle = codes[:, byte + 1] << 8
    high = codes[:, byte + 2] << 16
    words = low | middle | high
    mask = (1 << bits) - 1
    return (words >> (first_bit % 8)) & mask


class Codec:
    """Vectors of dh numbers <-> codes of `.bytes` bytes; `.spec` says how (see the top).

        codec = Codec.train(vectors)         # (n, dh), a sample of the bank's keys and values
        codes = codec.encode(memories.kv)    # (M, Lm, 2, Hkv, S, dh) -> (M, Lm, 2, Hkv, S, bytes)
        kv = codec.to("cuda").decode(codes)  # back, float32, on the GPU

    table (rows, dh) float32: all centroids, rotated back: those of a code's first number, then
    those of its second, and so on. index: the FAISS index that encodes; None until it is needed and
    read from `file`.
    """

    def __init__(self, spec, table, index=None, file=None):
        self.spec = spec
        self.table = table
        self.index = index
        self.file = file
        self.fields, self.bytes = layout(spec)
        sizes = torch.tensor([2**bits for _, bits in self.fields], device=table.device)
        n = int(sizes.sum())
        check(len(table) == n, f"codec {spec}: {n} centroids needed, not {len(table)}")
        self.first = (sizes.cumsum(0) - sizes).int()  # (numbers,): the row of its centroid 0

    @staticmethod
    def train(vectors, spec=None):
        """Trains a codec on vectors (n, dh), a uniform sample of the keys and values (App. B).

        spec: a FAISS factory string; None: `default_spec`. UserError for too few vectors (k-means
        needs one for each centroid), for numbers whose squares overflow float32, and for a string
        that does not fit dh.
        """
        faiss = optional("faiss")
        x = _rows(vectors)  # (n, dh)
        n, dh = x.shape
        if spec is None:
            spec = default_spec(dh, n)
        fields, _ = layout(spec)
        bits = max(bits for _, bits in fields)
        if spec.startswith("OPQ"):  # FAISS fits the rotation to a quantizer of 8 bits
            bits = max(bits, 8)
        least = 2**bits
        few = f"{n} vectors to train on, it needs {least} (and wants {39 * least})"
        check(n >= least, f"codec {spec}: {few}: give more references or fewer bits")
        try:
            index = faiss.index_factory(dh, spec)
        except RuntimeError as e:
            raise UserError(f"codec {spec}: not for vectors of {dh} numbers: uneven pieces") from e
        rotation, coarse, fine = _stages(index)
        quantizers = [coarse, fine]
        if rotation:  # give it a quantizer as quiet as the others
            even = rotation.d_out % rotation.M == 0
            check(even, f"codec {spec}: not for vectors of {dh} numbers: uneven pieces")
            rotation.niter = ITERATIONS
            rotation.niter_pq_0 = ITERATIONS
            private = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
            rotation.pq = private
            quantizers.append(private)
        for quantizer in quantizers:
            quantizer.cp.niter = ITERATIONS
            quantizer.cp.min_points_per_centroid = 1  # no warnings
        index.train(x)
        if rotation:
            rotation.pq = None  # it belongs to Python, which frees it after this
        return Codec(spec, fold(index), index)

    def encode(self, x):
        """x (..., dh), any float type, any device -> codes (..., bytes) uint8, on the CPU."""
        rows = _rows(x, self.table.shape[1])  # (n, dh)
        codes = torch.from_numpy(self._index().sa_encode(rows))  # (n, bytes)
        return codes.view(*x.shape[:-1], self.bytes)

    def decode(self, codes):
        """codes (..., bytes) uint8 -> (..., dh) float32 beside the table; as FAISS's sa_decode."""
        valid = codes.dtype == torch.uint8 and codes.shape[-1] == self.bytes
        check(valid, f"codec {self.spec}: {self.bytes} uint8 needed, not another codec's")
        *shape, _ = codes.shape
        codes = codes.to(self.table.device)
        codes = codes.reshape(-1, self.bytes)  # (n, bytes)
        rows = unpack(codes, self.fields) + self.first  # (n, numbers a code)
        x = F.embedding_bag(rows, self.table, mode="sum")  # (n, dh)
        return x.view(*shape, self.table.shape[1])  # (..., dh)

    def to(self, device):
        """Moves the table that decodes; encoding stays on the CPU."""
        self.table = self.table.to(device)
        self.first = self.first.to(device)
        return self

    def save(self, path):
        """Writes codec.faiss (encodes) and codec.npz (decodes) into the directory `path`. codec.npz
        comes last, for it holds the checksum of the other."""
        folder = make_directory(path)
        index = optional("faiss").serialize_index(self._index())
        arrays = dict(spec=self.spec, table=self.table.cpu().numpy(), crc=zlib.crc32(index))
        replace_file(folder / "codec.faiss", lambda file: file.write(index))
        replace_file(folder / "codec.npz", lambda file: np.savez(file, **arrays))

    @staticmethod
    def load(path):
        """Opens what `save` wrote; path: the directory or either file. Without codec.faiss or FAISS
        it only decodes. UserError without codec.npz, or if either is damaged."""
        folder = Path(path)
        if folder.suffix in (".npz", ".faiss"):
            folder = folder.parent
        tables = folder / "codec.npz"
        file = folder / "codec.faiss"
        check(tables.exists(), f"{tables}: no codec here: train one")
        try:
            with np.load(tables, allow_pickle=False) as arrays:
                checksum = int(arrays["crc"])
                table = torch.from_numpy(arrays["table"])
                codec = Codec(str(arrays["spec"]), table, file=file)
            check(table.dim() == 2 and table.dtype == torch.float32, "not a table of vectors")
            check(table.isfinite().all(), "NaN or infinity in its table")
        except Exception as error:  # zipfile, zlib and NumPy each raise their own kinds
            raise UserError(f"{tables}: not a whole codec ({error}): train it again") from error
        if file.exists():
            found = zlib.crc32(read_bytes(file, "train the codec again"))
            line = f"{file}: not what {tables.name} was made with: train the codec again"
            check(found == checksum, line)
        return codec

    def _index(self):
        if self.index is None:
            check(self.file.exists(), f"{self.file}: missing, and encoding needs it")
            self.index = optional("faiss").read_index(str(self.file))
        return self.index


def fold(index):
    """All centroids of a trained FAISS index, rotated back: (rows, dh) float32.

    FAISS decodes a code to A^T (coarse + fine), where coarse and fine are pieces laid side by side
    and piece m is a centroid. Piece m meets only its own rows of A. So the rows of our table are
    piece @ A[its rows], and the decoded vector is the sum of those that the code names.
    """
    array = optional("faiss").vector_to_array
    rotation, coarse, fine = _stages(index)
    dh = index.d
    A = np.eye(dh)
    if rotation:
        A = array(rotation.A).astype(float).reshape(-1, dh)  # (d_out, dh)
    rows = []
    for pq in (coarse, fine):
        centroids = array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        its_rows = A.reshape(pq.M, pq.dsub, dh)
        rotated = centroids @ its_rows  # (M, ksub, dh), in float64
        rows.append(rotated.reshape(-1, dh))  # (M * ksub, dh)
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _stages(index):
    """(rotation or None, coarse, fine) of an index: an OPQMatrix and two ProductQuantizers."""
    faiss = optional("faiss")
    rotation = None
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        index = faiss.downcast_index(index.index)
    coarse = faiss.downcast_index(index.q1.quantizer)
    return rotation, coarse.pq, index.pq


# FAISS sums squares in float32, whose largest number is 3e38. From 1e18 on it ends the process.
LARGEST = 1e15


def _rows(x, dh=None):
    """x (..., dh), tensor or array -> (n, dh) float32 as FAISS takes it."""
    x = torch.as_tensor(x)
    x = x.detach().float().cpu()
    width = x.shape[-1]
    line = f"codec: vectors of {dh} numbers needed, got the shape {tuple(x.shape)}"
    check(dh is None or width == dh, line)
    check(x.isfinite().all(), "codec: NaN or infinity among the vectors: check what wrote them")
    largest = float(x.abs().max()) if x.numel() else 0.0
    check(largest <= LARGEST, f"codec: a number of {largest:.0e} among the vectors, beyond 1e15")
    x = x.reshape(-1, width)  # (n, dh)
    return np.ascontiguousarray(x.numpy())
