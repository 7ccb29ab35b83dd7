"""Tokens on disk: the tokenizer of data/cities, tiktoken's by name, token files, references."""

import doctest
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import common
import corpus
from common import UserError
from corpus import References

ROOT = Path(corpus.__file__).parent


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(ROOT / "data/cities")


def one_line(error):
    return "\n" not in str(error.value)


def test_docstrings(monkeypatch):
    """A worked example that its function no longer gives."""
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(corpus)
    assert found.attempted >= 2 and not found.failed


# ---------------------------------------------------------------------------------------------
# The tokenizer


def test_every_byte_is_a_token(tok):
    """A byte that no rank covers: tiktoken then dies in Rust, in the middle of somebody's text."""
    for byte in range(256):
        assert tok.encoding.encode_single_token(bytes([byte])) < tok.bos
    for at in range(0, 0x2500, 0x100):
        text = " " + "".join(map(chr, range(at, at + 0x100)))
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "東京 は 日本 の 首都",
        "Київ — столиця",
        "አዲስ አበባ",
        "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
        "٤٢٤٢ ½ Ⅻ",
        "\U0001f9ed \U0001f469\u200d\U0001f467\ufe0f",
        "a\tb\r\n\n  c",
        "x\x00y\x7f",
        "e\u0301 \u200d\ufeff",
        "<s>Reference:",
        "<|endoftext|>",
    ],
)
def test_round_trip_of_any_script(tok, text):
    """A script that the ranks never saw comes back otherwise, or not at all; "<s>" in somebody's
    text becomes the BOS."""
    ids = tok.encode(text)
    assert tok.decode(ids) == " " + text and tok.bos not in ids
    assert min(ids) >= 0 and max(ids) < tok.n_vocab


def test_round_trip_of_random_text(tok):
    """Pieces that the pattern drops between its alternatives."""
    rng = random.Random(3)
    for _ in range(200):
        kinds = [(32, 127), (0xA0, 0xD7FF), (0x10000, 0x1F9FF)]
        ranges = rng.choices(kinds, k=rng.randrange(1, 41))
        text = " " + "".join(chr(rng.randrange(*r)) for r in ranges)
        assert tok.decode(tok.encode(text)) == text


def test_a_name_is_the_same_tokens_wherever_it_stands(tok):
    """A name at the start of a text in other tokens than inside: it could not be looked up."""
    names = ["Kyiv", "Zubrowka City", "Aţ Ţaraf", "6th of October City", "Ivano-Frankivsk", "東京"]
    for name in names:
        ids = tok.encode(name)
        for form in ("{}", " {}", "{} has 7 people.", "Where does {} lie?", "At {}, {}", "in {}\n"):
            text = form.format(*[name] * form.count("{}"))
            e = tok.encode(text)
            found = sum(e[i : i + len(ids)] == ids for i in range(len(e)))
            assert found == form.count("{}"), text
    # and texts put together are the tokens put together
    a, b = "What is the population of Kyiv?", "Kyiv has 2797553 people."
    assert tok.encode(a) + tok.encode(b) == tok.encode(f"{a} {b}")


def test_numbers_are_groups_of_at_most_two_digits(tok):
    """A number that is one rare token; groups that depend on what stands before the number."""
    rng = random.Random(5)
    numbers = [*range(101), *(rng.randrange(10**n) for n in range(1, 10) for _ in range(40))]
    for number in map(str, numbers):
        ids = tok.encode(number)
        pieces = [tok.encoding.decode([i]).strip() for i in ids]
        assert pieces == re.findall(r"\d{1,2}", number)
        for form in ("It has {} people.", "{}", "at {} N"):
            e = tok.encode(form.format(number))
            assert any(e[i : i + len(ids)] == ids for i in range(len(e)))
    for token in range(tok.bos):  # no rank holds three digits, whatever is around them
        assert not re.search(rb"\d\D*\d\D*\d", tok.encoding.decode_single_token_bytes(token))


def test_header_begins_with_bos(tok):
    """A header without its BOS, or with a BOS that is also somebody's text."""
    assert tok.header[0] == tok.bos == tok.n_vocab - 1
    assert tok.encoding.decode(tok.header[1:]) == "Reference:" and len(tok.header) > 1
    assert tok.decode([tok.bos, *tok.encode("Lviv"), -1, -1]) == " Lviv"
    assert tok.decode([tok.n_vocab, 10**6, -7]) == "" == tok.decode([])
    assert tok.encode("") == []
    assert tok.decode(torch.tensor(tok.encode("Lviv"))) == " Lviv"
    assert tok.id.startswith("cities:") and tok.id == corpus.tokenizer(f"{ROOT}/data/cities").id


def test_a_missing_tokenizer_is_one_line(tmp_path):
    """A traceback, or a search on the network, for a wrong --data."""
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt9': .*gpt2") as e:
        corpus.tokenizer("gpt9")
    assert one_line(e)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="tokenizer.json is missing: run python") as e:
            corpus.tokenizer(path)
        assert one_line(e) and str(path) in str(e.value)
    # a manifest that names its own directory, where the tokenizer has been lost
    common.write_json(tmp_path / "meta.json", dict(tokenizer=str(tmp_path), n_vocab=9))
    with pytest.raises(UserError, match="tokenizer.json is missing") as e:
        corpus.tokenizer(tmp_path)
    # a data set that uses another's
    common.write_json(tmp_path / "meta.json", dict(tokenizer=f"{ROOT}/data/cities", n_vocab=9))
    assert corpus.tokenizer(tmp_path).id.startswith("cities:")


def test_tiktokens_own_without_network(tmp_path, monkeypatch):
    """tokenizer("gpt2") on a machine without network: tiktoken's page of a connection error."""

    def offline(path):
        raise ConnectionError("HTTPSConnectionPool(...)\nMax retries exceeded")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", offline)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(UserError, match="'gpt2' could not be fetched .ConnectionError") as e:
        corpus.tokenizer("gpt2")
    assert one_line(e)


def test_tiktokens_own(monkeypatch):
    """A space put before texts that were never trained so; a BOS that is no special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    small = tiktoken.Encoding(
        "small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    t = corpus.tokenizer("small")
    assert t.encode("ab c") == [256, 32, 99] and t.decode([257, 256]) == "ab"
    assert (t.bos, t.n_vocab, t.header[0]) == (257, 258, 257)
    assert t.id != corpus.tokenizer(ROOT / "data/cities").id


# ---------------------------------------------------------------------------------------------
# Token files


def test_manifest_and_token_files(tmp_path):
    """Tokens read in another width than they were written; errors that do not say what to run."""
    with pytest.raises(UserError, match="meta.json is missing: run python .*prepare.py"):
        corpus.manifest(tmp_path)
    for n_vocab, width in ((65536, 2), (65537, 4)):
        common.write_json(tmp_path / "meta.json", dict(n_vocab=n_vocab))
        assert corpus.manifest(tmp_path) == dict(n_vocab=n_vocab)
        written = [n_vocab - 1, 0, 7, 255, 256]
        corpus.write_tokens(tmp_path / "val.bin", written, n_vocab)
        assert (tmp_path / "val.bin").stat().st_size == 5 * width
        tokens = corpus.open_tokens(tmp_path, "val")
        assert tokens.tolist() == written
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1
    with pytest.raises(UserError, match="train.bin is missing: .* --train"):
        corpus.open_tokens(tmp_path, "train")
    with pytest.raises(UserError, match="heldout.bin is missing: .*prepare.py$"):
        corpus.open_tokens(tmp_path, "heldout")
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="val.bin"):
        corpus.open_tokens(tmp_path, "val")
    (tmp_path / "meta.json").write_text('{"n_vocab": 9,')
    with pytest.raises(ValueError, match="meta.json"):
        corpus.manifest(tmp_path)


def test_a_file_is_whole_or_not_there(tmp_path):
    """A kill in the middle of a write leaves half a file under the right name."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def killed(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.replace_file(path, killed)
    assert path.read_bytes() == b"old"
    common.replace_file(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.glob("a.bin")] == ["a.bin"]


# ---------------------------------------------------------------------------------------------
# References

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 300], [8, 8]]


@pytest.fixture
def refs(tmp_path):
    common.write_json(tmp_path / "meta.json", dict(n_vocab=307))
    return References.create(tmp_path / "kb", ROWS, 307)


def rows_of(refs):
    return [refs[i].tolist() for i in range(len(refs))]


def test_references_come_back(refs, tmp_path):
    """Rows shifted by one; a manifest ignored; another hash for the same references."""
    assert len(refs) == 4 and rows_of(refs) == ROWS and refs[2].dtype == np.int64
    again = References.open(f"{tmp_path}/kb")
    assert rows_of(again) == ROWS and again.hash == refs.hash
    # the same tokens cut elsewhere, and other tokens cut alike, are other references
    for other in ([[5, 6], [7, 8], *ROWS[2:]], [[5, 6, 6], *ROWS[1:]]):
        assert References.create(tmp_path / "other", other, 307).hash != refs.hash


def test_batch_pads_on_the_right(refs):
    """Padding with a real token, or on the left: `write` takes -1, at the end."""
    b = refs.batch([3, 0, 1, 0])
    assert b.dtype == torch.int64
    assert b.tolist() == [[8, 8, -1], [5, 6, 7], [8, -1, -1], [5, 6, 7]]
    wide = refs.batch(np.array([1, 2]), width=7)
    assert wide.tolist() == [[8, *[-1] * 6], [9, 10, 11, 12, 300, -1, -1]]


def test_append_and_replace_live(refs, tmp_path):
    """What is changed here and not on disk, or there and not here; a row grown over the next."""
    before = refs.hash
    assert refs.append([13, 14, 15]) == 4
    assert refs.replace(1, np.array([20, 21, 22, 23])) == 1
    want = [ROWS[0], [20, 21, 22, 23], ROWS[2], ROWS[3], [13, 14, 15]]
    again = References.open(tmp_path / "kb")
    assert rows_of(refs) == want == rows_of(again) and refs.hash == again.hash != before
    refs.replace(1, [8])
    assert rows_of(References.open(tmp_path / "kb")) == [*ROWS, [13, 14, 15]]


def test_a_kill_while_appending_changes_nothing(refs, tmp_path):
    """New tokens and old offsets on disk: rows that are longer than they were, or an error."""
    offsets = (tmp_path / "kb.idx").read_bytes()
    refs.append([13, 14, 15])
    (tmp_path / "kb.idx").write_bytes(offsets)  # as if killed between the two files
    again = References.open(tmp_path / "kb")
    assert rows_of(again) == ROWS
    assert again.append([16]) == 4 and rows_of(References.open(tmp_path / "kb")) == [*ROWS, [16]]


@pytest.mark.parametrize("i", [-1, 4, 10**9])
def test_out_of_range(refs, i):
    """References[-1] as the last one: -1 means none everywhere else."""
    with pytest.raises(IndexError, match=f"reference {i}; .*kb has 4"):
        refs[i]
    with pytest.raises(IndexError):
        refs.batch([0, i])
    if i != 4:  # there it appends
        with pytest.raises(IndexError, match=f"reference {i}; .*kb has 4"):
            refs.replace(i, [1])
        assert rows_of(refs) == ROWS


def test_empty_references_are_refused(refs, tmp_path):
    """A reference of no token: nothing to encode, and a division by zero in eq. (3.3)."""
    for write in (lambda: refs.append([]), lambda: refs.replace(0, [])):
        with pytest.raises(ValueError, match="empty"):
            write()
    with pytest.raises(ValueError, match="reference 2 is empty"):
        References.create(tmp_path / "x", [[1], [2], []], 307)
    with pytest.raises(ValueError, match="no references to write"):
        References.create(tmp_path / "x", [], 307)
    assert rows_of(References.open(tmp_path / "kb")) == ROWS and not list(tmp_path.glob("x*"))


def test_bad_reference_files(refs, tmp_path):
    """An empty, missing or cut-off file read as a shorter knowledge base."""
    tokens, index = tmp_path / "kb.bin", tmp_path / "kb.idx"
    good, offsets = tokens.read_bytes(), index.read_bytes()
    for path, bad, line in [
        (tokens, b"", "kb.bin is empty"),
        (tokens, good[:-2], "does not fit"),
        (index, b"", "does not fit"),
        (index, offsets[:8], "does not fit"),
        (index, offsets[:-3], "does not fit"),
        (index, offsets[8:] + offsets[:8], "does not fit"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=line) as e:
            References.open(tmp_path / "kb")
        assert one_line(e) and str(tmp_path) in str(e.value)
        tokens.write_bytes(good)
        index.write_bytes(offsets)
    index.unlink()
    with pytest.raises(UserError, match="kb.idx is missing: run python .*prepare.py$"):
        References.open(tmp_path / "kb")
    with pytest.raises(UserError, match="train_refs.bin is missing: .* --train$"):
        References.open(tmp_path / "train_refs")
    index.write_bytes(offsets)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json is missing"):
        References.open(tmp_path / "kb")
