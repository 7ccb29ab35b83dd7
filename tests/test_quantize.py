"""The codec: its decoder against FAISS's, its files, its refusals. Sizes are distinct and odd."""

import doctest
import sys

import faiss
import numpy as np
import pytest
import torch

import quantize
from common import UserError
from quantize import Codec, default_spec, fold, layout

PAPER = "OPQ20_80,Residual2x14,PQ8x10"


def vectors(n, dh, seed=0):
    """Like keys and values: a few groups, each with its mean, scale and correlated directions."""
    r = np.random.default_rng(seed)
    x = np.empty((n, dh), np.float32)
    for g in range(3):
        mix = np.diag(np.arange(1, dh + 1.0) ** -0.5) @ np.linalg.qr(r.normal(size=(dh, dh)))[0]
        part = r.normal(size=(len(x[g::3]), dh)) @ mix + 0.3 * r.normal(size=dh)
        x[g::3] = (1 + g) * part
    return torch.from_numpy(x)


@pytest.fixture(scope="module")
def codec():
    return Codec.train(vectors(1300, 24), "OPQ6_24,Residual2x7,PQ3x5")


@pytest.fixture(scope="module")
def paper_index():
    """The paper's index with random numbers for centroids: training it takes 639k vectors."""
    r = np.random.default_rng(1)
    index = faiss.index_factory(80, PAPER)
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    inner = faiss.downcast_index(index.index)
    coarse = faiss.downcast_index(inner.q1.quantizer)
    for pq, scale in ((coarse.pq, 1.0), (inner.pq, 0.3)):
        numbers = scale * r.normal(size=pq.M * pq.ksub * pq.dsub)
        faiss.copy_array_to_vector(numbers.astype(np.float32), pq.centroids)
    A = np.linalg.qr(r.normal(size=(80, 80)))[0].astype(np.float32)
    faiss.copy_array_to_vector(A.ravel(), rotation.A)
    rotation.is_orthonormal = True
    index.is_trained = rotation.is_trained = inner.is_trained = coarse.is_trained = True
    return index


def relative(x, y):
    return float((torch.as_tensor(x) - torch.as_tensor(y)).norm() / torch.as_tensor(y).norm())


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(quantize)
    assert found.attempted >= 4 and not found.failed


@pytest.mark.parametrize(
    "dh, spec",
    [
        (32, "Residual2x7,PQ8x7"),  # numbers that cross bytes, two bytes and a bit
        (48, "OPQ12_48,Residual2x8,PQ8x8"),  # whole bytes
        (16, "OPQ4,Residual2x5,PQ4x6"),  # OPQ without a width
        (66, "Residual3x4,PQ11x3"),  # three coarse parts, 33 bits in 5 bytes
        (80, "OPQ20_60,Residual2x6,PQ5x9"),  # a rotation that also drops 20 directions
        (128, "OPQ32_128,Residual2x6,PQ16x4"),
    ],
)
def test_decode_is_sa_decode(dh, spec):
    """A bit read at the wrong place, a byte alignment forgotten, A instead of A^T."""
    codec = Codec.train(vectors(701, dh), spec)
    x = vectors(53, dh, seed=2)
    codes = codec.encode(x)
    assert codes.shape == (53, codec.index.sa_code_size()) and codec.bytes == codes.shape[1]
    want = codec.index.sa_decode(codes.numpy())
    got = codec.decode(codes)
    assert got.dtype == torch.float32 and relative(got, want) < 1e-6
    assert relative(got, x) < relative(torch.zeros_like(x), x)


def test_the_papers_codec(paper_index):
    """14-bit numbers cut at two bytes; 14 bytes a vector, 39,424 a memory (App. B, sec. 3.3)."""
    codec = Codec(PAPER, fold(paper_index), paper_index)
    assert codec.bytes == paper_index.sa_code_size() == 14
    assert codec.table.shape == (2 * 2**14 + 8 * 2**10, 80) and len(codec.fields) == 10
    x = torch.randn(97, 80, generator=torch.Generator().manual_seed(3))
    codes = codec.encode(x)
    rows = quantize.unpack(codes, codec.fields)
    assert (rows.amax(0) > 0.8 * torch.tensor([2**14] * 2 + [2**10] * 8)).all()  # high bits too
    got, want = codec.decode(codes), paper_index.sa_decode(codes.numpy())
    assert relative(got, want) < 1e-6 and np.abs(got.numpy() - want).max() < 1e-5
    memory_shape = (22, 2, 8, 8, 80)
    assert np.prod(memory_shape) * 2 == 450_560
    memory = codes[torch.arange(np.prod(memory_shape[:-1])) % 97].view(22, 2, 8, 8, 14)
    assert memory.nbytes == 39_424 and codec.decode(memory).shape == memory_shape


@pytest.mark.parametrize("dh", [16, 32, 48, 64, 80, 128])
def test_default_spec(dh):
    """A default that FAISS cannot build for a head size, or that wants more than there is."""
    for n in (701, 10_007, 40_009, 700_001):
        spec = default_spec(dh, n)
        assert faiss.index_factory(dh, spec).sa_code_size() == layout(spec)[1]
        assert n >= 39 * max(1 << bits for _, bits in layout(spec)[0])
    assert layout(spec)[1] <= 2 * dh / 4  # at least four times less than bf16


@pytest.mark.parametrize("dh", [2, 6, 10, 14, 34, 66, 74, 100, 256])
def test_default_spec_of_odd_heads(dh):
    """A count of pieces, or of OPQ's, that does not divide the head: FAISS refuses to build it."""
    for n in (701, 40_009, 700_001):
        spec = default_spec(dh, n)
        assert faiss.index_factory(dh, spec).sa_code_size() == layout(spec)[1]
    x = vectors(311, dh)
    assert Codec.train(x).decode(Codec.train(x).encode(x)).shape == x.shape


def test_quality_of_the_default():
    """A default that loses the vectors, groups of small ones above all."""
    x = vectors(13_001, 32)
    codec = Codec.train(x)
    assert codec.spec == "Residual2x8,PQ8x8" and codec.bytes == 10
    again = codec.decode(codec.encode(x))
    for g in range(3):
        assert relative(again[g::3], x[g::3]) < 0.3


def test_leading_dimensions_and_types(codec):
    """Axes swapped by the flattening; bf16 tensors, which numpy does not know; nothing at all."""
    x = vectors(3 * 5 * 7, 24, seed=4).view(3, 5, 7, 24)
    codes = codec.encode(x)
    assert codes.shape == (3, 5, 7, codec.bytes) and codes.dtype == torch.uint8
    assert torch.equal(codes[2, 3, 1], codec.encode(x[2, 3, 1]))
    assert torch.equal(codec.decode(codes)[2, 3, 1], codec.decode(codes[2, 3, 1]))
    assert torch.equal(codec.encode(x.transpose(0, 2)), codes.transpose(0, 2))
    assert torch.equal(codec.encode(x.numpy()), codes)
    assert torch.equal(codec.encode(x.bfloat16()), codec.encode(x.bfloat16().float()))
    assert codec.decode(codec.encode(x[:0])).shape == (0, 5, 7, 24)
    assert codec.to("cpu") is codec


def test_training_is_quiet(capfd):
    """FAISS's lines about few training vectors, one per iteration, over our progress bar."""
    Codec.train(vectors(307, 24), "OPQ6_24,Residual2x7,PQ3x5")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "n, spec, line",
    [
        (1001, PAPER, "1001 vectors to train on, it needs 16384"),
        (201, "OPQ20_80,Residual2x5,PQ8x5", "it needs 256"),
        (11, None, "it needs 16"),
        (701, "PQ8", "give a string like"),
        (701, "Residual2x17,PQ8x8", "at most 16 bits"),
        (701, "Residual2x5,PQ7x5", "not for vectors of 80 numbers"),
        (701, "OPQ0,Residual2x5,PQ8x5", "give a string like"),
        (701, "OPQ8_0,Residual2x5,PQ8x5", "give a string like"),  # ended the process
        (701, "OPQ7,Residual2x5,PQ8x5", "not for vectors of 80 numbers"),
    ],
)
def test_refuses_to_train(n, spec, line):
    """A page of C++ instead of one line."""
    with pytest.raises(ValueError, match=line) as e:
        Codec.train(vectors(n, 80), spec)
    assert "\n" not in str(e.value)


def test_refuses_bad_input(codec):
    """NaN encoded as some centroid; codes of another codec read as ours."""
    x = vectors(5, 24)
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(x / 0 * 0)
    with pytest.raises(ValueError, match="vectors of 24 numbers"):
        codec.encode(x[:, :23])
    with pytest.raises(ValueError, match="another codec"):
        codec.decode(codec.encode(x)[:, :3])
    with pytest.raises(ValueError, match="uint8"):
        codec.decode(codec.encode(x).long())


@pytest.mark.parametrize("spec", ["Residual2x5,PQ3x5", "OPQ6_24,Residual2x5,PQ3x5"])
@pytest.mark.parametrize("scale", [1e16, 1e18, 3e38, -1e20])
def test_enormous_numbers_are_refused(codec, spec, scale):
    """A bug upstream makes keys of 1e18: FAISS ends the interpreter, and with it hours of work."""
    x = vectors(307, 24)
    x[5, 3] = scale
    with pytest.raises(UserError, match="among the vectors, beyond 1e15"):
        Codec.train(x, spec)
    with pytest.raises(UserError, match="among the vectors, beyond 1e15"):
        codec.encode(x[:7])
    with pytest.raises(UserError, match="among the vectors, beyond 1e15"):
        codec.encode(x[:7].bfloat16())


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, 1e14])
def test_numbers_at_the_edges(scale):
    """Vectors that are all alike, denormal, or just within what is allowed: NaN in the table."""
    x = vectors(307, 24) * scale
    codec = Codec.train(x, "Residual2x5,PQ3x5")
    again = codec.decode(codec.encode(x))
    assert codec.table.isfinite().all() and again.isfinite().all()
    if scale > 1e-18:  # below, squares vanish in float32
        assert relative(again, x) < 0.6


def test_save_and_load(codec, tmp_path):
    """Half of the state kept; a loaded codec that decodes but encodes otherwise."""
    x = vectors(31, 24, seed=5)
    codec.save(tmp_path / "bank")
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == ["codec.faiss", "codec.npz"]
    for path in ("bank", "bank/codec.faiss", "bank/codec.npz"):
        again = Codec.load(tmp_path / path)
        assert (again.spec, again.bytes) == (codec.spec, codec.bytes)
        assert torch.equal(again.encode(x), codec.encode(x))
        assert torch.equal(again.decode(codec.encode(x)), codec.decode(codec.encode(x)))
    again.save(tmp_path / "bank")  # over itself
    assert torch.equal(Codec.load(tmp_path / "bank").encode(x), codec.encode(x))


def test_decodes_without_faiss(codec, tmp_path, monkeypatch):
    """The end-side device of sec. 3.3 holds only the decoder: no FAISS, perhaps no codec.faiss."""
    codes = codec.encode(vectors(31, 24))
    want = codec.decode(codes)
    codec.save(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    again = Codec.load(tmp_path)
    assert torch.equal(again.decode(codes), want)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        again.encode(want)
    (tmp_path / "codec.faiss").unlink()
    again = Codec.load(tmp_path)
    assert torch.equal(again.decode(codes), want)
    with pytest.raises(UserError, match="codec.faiss: missing"):
        again.encode(want)


def test_bad_files(codec, tmp_path):
    """A cut-off, corrupted or foreign file read silently."""
    with pytest.raises(UserError, match="codec.npz: no codec here"):
        Codec.load(tmp_path / "nowhere")
    codec.save(tmp_path)
    tables, index = tmp_path / "codec.npz", tmp_path / "codec.faiss"
    good = tables.read_bytes()
    (tmp_path / "good.npz").write_bytes(good)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for bad in (b"", good[: len(good) // 2], bytes(flipped), b"no zip at all"):
        tables.write_bytes(bad)
        with pytest.raises(ValueError, match="codec.npz: not a whole codec"):
            Codec.load(tmp_path)
    for change in (dict(crc="x"), dict(spec="PQ8"), dict(table=np.zeros(3)), dict(spec="")):
        with np.load(tmp_path / "good.npz") as z:
            np.savez(tables, **(dict(z) | change))
        with pytest.raises(ValueError, match="codec.npz: not a whole codec"):
            Codec.load(tmp_path)
    arrays = dict(spec=codec.spec, crc=0, table=codec.table.numpy() * np.nan)
    np.savez(tables, **arrays)
    with pytest.raises(ValueError, match="codec.npz: not a whole codec .NaN"):
        Codec.load(tmp_path)
    tables.write_bytes(good)
    Codec.load(tmp_path)
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(ValueError, match="codec.faiss: not what codec.npz was made with"):
        Codec.load(tmp_path)
    with pytest.raises(ValueError, match="320 centroids needed"):
        Codec("Residual2x7,PQ2x5", codec.table[:319])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decodes_on_the_gpu(codec):
    """Tables on one device and offsets on the other; the GPU's sum another than the CPU's."""
    codes = codec.encode(vectors(31, 24))
    there = Codec(codec.spec, codec.table.clone()).to("cuda").decode(codes)
    assert there.is_cuda and relative(there.cpu(), codec.decode(codes)) < 1e-6
