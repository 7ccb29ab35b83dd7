"""Tokens on disk: the tokenizer of data/cities, tiktoken's by name, token files, references."""

import base64
import doctest
import json
import random
import re
import shutil
import unicodedata
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


def test_the_shipped_model_has_its_tokenizer():
    """The only checkpoint that a new user has cannot be gone on with: MODEL=checkpoints/toy."""
    shipped = (ROOT / "checkpoints/toy/tokenizer.json").read_bytes()
    assert shipped == (ROOT / "data/cities/tokenizer.json").read_bytes()


def test_every_byte_is_a_token(tok):
    """A byte that no rank covers: tiktoken then dies in Rust, in the middle of somebody's text."""
    for byte in range(256):
        assert tok.encoding.encode_single_token(bytes([byte])) < tok.bos
    for at in range(0, 0x2500, 0x100):
        text = " " + "".join(map(chr, range(at, at + 0x100)))
        assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFC", text)


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
    assert tok.decode(ids) == " " + unicodedata.normalize("NFC", text) and tok.bos not in ids
    assert min(ids) >= 0 and max(ids) < tok.n_vocab


def test_round_trip_of_random_text(tok):
    """Pieces that the pattern drops between its alternatives."""
    rng = random.Random(3)
    for _ in range(200):
        kinds = [(32, 127), (0xA0, 0xD7FF), (0x10000, 0x1F9FF)]
        ranges = rng.choices(kinds, k=rng.randrange(1, 41))
        text = " " + "".join(chr(rng.randrange(*r)) for r in ranges)
        assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFC", text)


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
        with pytest.raises(UserError, match="meta.json is missing: run python data/text") as e:
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
    t = corpus.tokenizer("gpt2")
    assert t.encode("ab c") == [256, 32, 99] and t.decode([257, 256]) == "ab"
    assert (t.bos, t.n_vocab, t.header[0]) == (257, 258, 257)
    assert t.id != corpus.tokenizer(ROOT / "data/cities").id


@pytest.fixture
def small(tok):
    """small(**changes) -> a tokenizer of 258 ids, by default with the pattern of data/cities."""

    def make(pattern=tok.encoding._pat_str, prefix_space=True, ranks=None, special=None):
        ranks = ranks or {bytes([i]): i for i in range(256)} | {b" C": 256}
        special = special or {"<s>": 257}
        encoding = tiktoken.Encoding(
            "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        return corpus.Tokenizer(encoding, 257, "small", prefix_space)

    return make


def test_an_identity_covers_all_that_makes_tokens(small):
    """The same ranks with another pattern, without the space in front, with other special tokens,
    or in another order: other tokens under the same id."""
    letters = {bytes([i]): i for i in range(256)}
    others = [
        small(prefix_space=False),
        small(pattern=r"\S+|\s+"),
        small(special={"<s>": 257, "<pad>": 258}),
        small(special={"<S>": 257}),
        small(ranks=letters | {b" D": 256}),
        small(ranks=letters | {b"a": 98, b"b": 97, b" C": 256}),
        small(ranks=letters),  # a gap: id 256 is no token
    ]
    ids = {t.id for t in others}
    assert len(ids) == len(others) and small().id not in ids
    assert small().id == small().id and small().id.startswith("small:")


def test_decode_of_ids_that_are_no_token(small):
    """cl100k_base and o200k_base have ids that no text becomes: a KeyError of tiktoken."""
    letters = {bytes([i]): i for i in range(256)}
    t = small(ranks=letters, special={"<s>": 257, "<end>": 263})
    assert t.no_token == {256, 258, 259, 260, 261, 262} and t.n_vocab == 264
    assert t.decode([256, 65, 260, 66, 262, 257, 264, -1]) == "AB"
    assert t.decode(range(258, 263)) == "" and t.decode(np.array([72, 256])) == "H"


@pytest.mark.parametrize(
    "nfc, nfd",
    [
        ("\u00c7orlu", "C\u0327orlu"),
        ("Vi\u1ec7t Nam", "Vie\u0323\u0302t Nam"),
        ("\uc11c\uc6b8", "\u1109\u1165\u110b\u116e\u11af"),  # Seoul in Hangul
        ("\u00c5ngstr\u00f6m", "\u212bngstro\u0308m"),  # the sign of the unit is the letter
    ],
)
def test_equal_texts_are_equal_tokens(tok, small, nfc, nfd):
    """A name typed on another keyboard is another name: its city is not found."""
    assert nfc != nfd
    for t in (tok, small(prefix_space=False)):
        assert t.encode(nfc) == t.encode(nfd)
        assert t.decode(t.encode(nfd)).strip() == nfc


def test_a_folder_does_not_hide_an_encoding(small, tmp_path, monkeypatch):
    """mkdir gpt2: the tokenizer of every data set that says "gpt2" is then another, or missing."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small(prefix_space=False).encoding)
    monkeypatch.setattr(tiktoken.Encoding, "eot_token", 257)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "data/cities/tokenizer.json", folder)
        assert corpus.tokenizer(name).id.startswith(f"{name}:")
        for path in (f"./{name}", f"{name}/", folder):
            assert corpus.tokenizer(path).id.startswith("cities:")
        # a data set that names it in its manifest, from beside such a folder
        data = tmp_path / f"of_{name}"
        data.mkdir()
        common.write_json(data / "meta.json", dict(n_vocab=258, tokenizer=name))
        assert corpus.tokenizer(data).id.startswith(f"{name}:")


def test_a_data_set_can_be_moved(tmp_path, monkeypatch):
    """A manifest that names a directory as it was seen from where prepare.py ran: found from
    nowhere else, or another's tokenizer found in its place."""
    first, other = tmp_path / "a/first", tmp_path / "a/other"
    for folder in (first, other):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "data/cities/tokenizer.json", first)
    common.write_json(first / "meta.json", dict(n_vocab=4096, tokenizer="."))
    common.write_json(other / "meta.json", dict(n_vocab=4096, tokenizer="../first"))
    References.create(first / "kb", [[3, 4], [5]], 4096)
    corpus.write_tokens(first / "val.bin", [1, 2, 3], 4096)
    (tmp_path / "a").rename(tmp_path / "b")
    for place in ("/", tmp_path, tmp_path / "b", tmp_path / "b/first"):
        monkeypatch.chdir(place)
        data = tmp_path / "b/first"
        for path in (data, str(data), f"{data}/", Path(data).relative_to(place)):
            assert corpus.tokenizer(path).id == corpus.tokenizer(ROOT / "data/cities").id
            assert corpus.open_tokens(path, "val").tolist() == [1, 2, 3]
            assert rows_of(References.open(Path(path) / "kb")) == [[3, 4], [5]]
        assert corpus.tokenizer(tmp_path / "b/other").id.startswith("cities:")


def test_a_data_set_keeps_the_tokenizer_it_was_made_with(tmp_path, small, monkeypatch):
    """Another tokenizer.json copied over it: all its tokens are other words, without a word."""
    shutil.copy(ROOT / "data/cities/tokenizer.json", tmp_path)
    used = corpus.tokenizer(tmp_path).id
    common.write_json(tmp_path / "meta.json", dict(n_vocab=4096, tokenizer=".", tokenizer_id=used))
    assert corpus.tokenizer(tmp_path).id == used
    small().save(tmp_path / "tokenizer.json")
    line = f"its tokenizer is small:.*, but the data set was made with {used}: bring that back"
    with pytest.raises(UserError, match=line) as e:
        corpus.tokenizer(tmp_path)
    assert one_line(e)
    # another data set that names it
    made = dict(n_vocab=4096, tokenizer="..", tokenizer_id=used)
    (tmp_path / "inner").mkdir()
    common.write_json(tmp_path / "inner/meta.json", made)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="inner: its tokenizer is small:.*, but the data set was"):
        corpus.tokenizer(tmp_path / "inner")
    # a Path is a directory, whatever it is called
    shutil.copytree(tmp_path / "inner", tmp_path / "gpt2")
    small().save(tmp_path / "gpt2/tokenizer.json")
    (tmp_path / "gpt2/meta.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert corpus.tokenizer(Path("./gpt2")).id.startswith("small:")


def test_a_saved_tokenizer_is_the_same(small, tmp_path):
    """A gap between the ids closed by saving; a special token lost; another BOS."""
    letters = {bytes([i]): i for i in range(255, -1, -1)}
    for t in (small(), small(ranks=letters, special={"<s>": 257, "</s>": 300})):
        t.save(tmp_path / "tokenizer.json")
        again = corpus.tokenizer(tmp_path)
        assert (again.id, again.bos, again.n_vocab) == (t.id, t.bos, t.n_vocab)
        assert again.no_token == t.no_token and again.header == t.header
        assert again.encode("Ça va, Cork?") == t.encode("Ça va, Cork?")


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(ranks=None), "'ranks' is null, not a list"),
        (dict(ranks=[]), "there is no token in it"),
        (dict(ranks=["!"]), "rank 0 is no base64"),
        (dict(ranks=[7]), "rank 0 is no base64"),
        (dict(pattern="("), "tiktoken cannot use its pattern"),
        (dict(pattern="x*"), "its pattern matches the empty text"),
        (dict(ranks=["", "eA=="]), "a token of no bytes"),
        (dict(pattern=7), "'pattern' is an integer"),
        (dict(prefix_space="no"), "'prefix_space' is a string, not true or"),
        (dict(special={"<s>": 3}), "two of its tokens have one id"),
        (dict(special={"<s>": "x"}), "its special tokens"),
        (dict(special={"<b>": 999}), "its special tokens"),
        (dict(special=[]), "its special tokens"),
        (dict(special={"<s>": 10**12}), "a token with the id 1000000000000"),
        (dict(special={"<s>": -3}), "its special tokens"),
        (dict(cuts=["("]), "tiktoken cannot use its pattern"),
        (dict(cuts="x"), "is damaged: cuts"),
        (dict(added=["x"]), "is damaged: added"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, change, line):
    """A panic of tiktoken, which no `except Exception` catches; a KeyError; a TypeError."""
    ranks = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    good = dict(name="x", pattern=r"\S+|\s+", prefix_space=True, ranks=ranks)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(good))
    assert corpus.tokenizer(tmp_path).n_vocab == 257
    path.write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=line) as e:
        corpus.tokenizer(tmp_path)
    assert one_line(e) and str(path) in str(e.value)


# ---------------------------------------------------------------------------------------------
# Other people's vocabularies

TEXTS = [
    "The Amt River is 1,234 km long; it's in Zubrowka (since 1932).",
    "  two  spaces, tabs\t and\n\nlines \r\n at 12 34  567 ",
    "\u5317\u4eac\u662f\u9996\u90fd\u3002 \u041a\u0438\u0457\u0432 \U0001f600",
    "na\u00efve \u00bd\u2167 \u0663\u0664",
    "don't we'll they've I'm you'd 5'10 x=3.14e-5 <s> </s> [1]",
    " 7 8", "a  7", "\n\n9\n", "   ", "", "\x00\x1f",
]  # fmt: skip


def byte_bpe(path, kind, alphabet=True, n=400, special=("<|endoftext|>", "<|im_start|>"), added=()):
    """A tokenizer.json that Hugging Face's library has trained on TEXTS, and the library's own."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    whole = pre.ByteLevel(add_prefix_space=False)
    digits = pre.Sequence([pre.Digits(individual_digits=True), whole])
    pattern = tokenizers.Regex(r" ?\d{1,2}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\d]+|\s+")
    split = pre.Split(pattern, "isolated")
    in_bytes = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre.Sequence([split, in_bytes])
    # as DeepSeek has it: one after the other, and the last leaves some letters to nobody
    numbers = pre.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    han = pre.Split(tokenizers.Regex(r"[一-龥]+"), "isolated")
    rest = pre.Split(tokenizers.Regex(r"[!-/][A-Za-z]+| ?[\p{L}\p{M}]+|\s+(?!\S)|\s+"), "isolated")
    several = pre.Sequence([numbers, han, rest, in_bytes])
    runs = pre.Sequence([pre.Digits(individual_digits=False), whole])
    marks = pre.Sequence([pre.Punctuation("contiguous"), pre.Split("y", "isolated"), whole])
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    kinds = dict(whole=whole, digits=digits, split=split, several=several, runs=runs, marks=marks)
    t.pre_tokenizer = kinds[kind]
    t.decoder = tokenizers.decoders.ByteLevel()
    letters = set(pre.ByteLevel.alphabet())
    if not alphabet:  # without 0xA5, which TEXTS do not have, and the bytes that UTF-8 has not
        letters -= {chr(0xA5), *map(chr, range(0xF5, 0x100))}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n,
        initial_alphabet=sorted(letters),
        special_tokens=list(special),
        show_progress=False,
    )
    t.train_from_iterator(TEXTS * 3, trainer)
    if added:
        t.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in added])
    t.save(str(path))
    return t


@pytest.mark.parametrize("kind", ["whole", "digits", "split", "several", "runs", "marks"])
@pytest.mark.parametrize("alphabet, added", [(True, ()), (False, ()), (True, ("  ", "   ", "it"))])
def test_hugging_faces_tokens_are_ours(tmp_path, kind, alphabet, added):
    """A space before a digit in another piece; ids shifted by the special tokens; a byte that the
    vocabulary lacks, on which tiktoken dies and Hugging Face drops the letter's byte; runs of
    spaces that are one token; text that no pattern matches lost."""
    theirs = byte_bpe(tmp_path / "tokenizer.json", kind, alphabet, added=added)
    ours = corpus.tokenizer(tmp_path)
    assert (ours.bos, ours.n_vocab) == (0, theirs.get_vocab_size()) and not ours.prefix_space
    rng = random.Random(7)
    pieces = sorted({t[i : i + n] for t in TEXTS for n in (1, 2, 5) for i in range(len(t))})
    texts = TEXTS + ["".join(rng.choices(pieces, k=9)) for _ in range(300)]
    for text in texts:
        text = unicodedata.normalize("NFC", text)
        want = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == want, repr(text)
        if alphabet:
            assert ours.decode(want) == text
    for text in ("\u00e5", "x \u00e5y", "\u00e5\u00e5"):  # 0xC3 0xA5
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    ours.save(tmp_path / "saved.json")
    again = corpus.open_tokenizer(tmp_path / "saved.json")
    assert again.id == ours.id and again.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    assert corpus.from_huggingface(tmp_path / "tokenizer.json", bos="<|im_start|>").bos == 1


def falcon(n):
    """Steps that cut texts when they are bytes already; and one that drops what it finds."""
    whole = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
    dropping = dict(type="Split", pattern=dict(String="a"), behavior="Removed", invert=False)
    steps = [[dropping, whole], [whole, dict(type="Digits", individual_digits=False)]]
    return dict(type="Sequence", pretokenizers=steps[n - 1])


SPACES = dict(id=390, content="  ", special=False, lstrip=True)


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(normalizer=dict(type="Lowercase")), "it changes texts first"),
        (dict(model=dict(type="WordPiece", vocab={})), "not a BPE"),
        (dict(model=dict(type="BPE", vocab={"a": 7}, merges=[])), "no token for 255 bytes"),
        (dict(pre_tokenizer=dict(type="Metaspace")), "not byte-level"),
        (dict(pre_tokenizer=None), "not byte-level"),
        (dict(pre_tokenizer=falcon(2)), "cuts texts by ByteLevel, Digits in a way unknown"),
        (dict(pre_tokenizer=falcon(1)), "cuts texts by Split, ByteLevel in a way unknown"),
        (dict(added_tokens=[SPACES]), "its token '  ' has lstrip, unknown here"),
        (dict(added_tokens=[]), "none of its special tokens is the BOS"),
        (dict(model=7), "not a BPE"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(tmp_path, change, line):
    """A tokenizer of another kind read as if it were byte-level: other tokens, no word said."""
    path = tmp_path / "tokenizer.json"
    byte_bpe(path, "whole")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=line) as e:
        corpus.from_huggingface(path)
    assert one_line(e) and str(path) in str(e.value)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_any_damage_to_a_tokenizer_is_one_line(tmp_path, kind):
    """A value of another type anywhere in the file: KeyError, TypeError, a panic of tiktoken that
    no `except Exception` catches."""
    path = tmp_path / "tokenizer.json"
    byte_bpe(path, "split", n=300)
    if kind == "ours":
        corpus.open_tokenizer(path).save(path)
    good = path.read_text()
    rng = random.Random(4)
    odd = [None, [], {}, 7, -1, 10**12, "", "x", True, 1.5, [None], {"a": None}, "a b c", ["a"]]
    refused = 0
    for _ in range(250):
        made = json.loads(good)
        place = made
        while True:  # down to somewhere, often far down
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = rng.choice(list(keys))
            inside = place[key]
            if not isinstance(inside, dict | list) or not inside or rng.random() < 0.2:
                break
            place = inside
        place[key] = rng.choice(odd)
        path.write_text(json.dumps(made))
        try:
            corpus.open_tokenizer(path).encode("Any text 12")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 50


def test_merged_vocabularies(tok, tmp_path):
    """A token twice; a byte uncovered; the first vocabulary's ids moved; a token of the second
    that no text becomes."""
    byte_bpe(tmp_path / "tokenizer.json", "split", n=460)
    other = corpus.tokenizer(tmp_path)
    both = corpus.merge_tokenizers(tok, other, "both")
    firsts, seconds = tok.encoding._mergeable_ranks, other.encoding._mergeable_ranks
    assert both.n_vocab == len({*firsts, *seconds}) + 1 and both.bos == both.n_vocab - 1
    assert both.n_vocab < tok.n_vocab + other.n_vocab
    for token, i in firsts.items():
        assert both.encoding.encode_single_token(token) == i
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)
        assert both.decode(both.encode(text)).removeprefix(" ") == text.removeprefix(" ")
        assert both.bos not in both.encode(text)
    for byte in range(256):
        assert both.encoding.encode_single_token(bytes([byte])) < both.bos


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
    (tmp_path / "prepare.py").write_text("")
    with pytest.raises(UserError, match="train.bin is missing: run python .*prepare.py --train$"):
        corpus.open_tokens(tmp_path, "train")
    with pytest.raises(UserError, match="heldout.bin is missing: .*prepare.py$"):
        corpus.open_tokens(tmp_path, "heldout")
    (tmp_path / "val.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="val.bin"):
        corpus.open_tokens(tmp_path, "val")
    (tmp_path / "meta.json").write_text('{"n_vocab": 9,')
    with pytest.raises(ValueError, match="meta.json"):
        corpus.manifest(tmp_path)


@pytest.mark.parametrize(
    "tokens, line",
    [
        ([1, 70000, -1], "id -1"),
        ([1, 300], "id 300; ids are 0 to 299"),
        (np.array([7, 70000]), "id 70000"),
        (np.array([7, -1], np.int16), "id -1"),
        (np.array([2**63], np.uint64), "id 9223372036854775808"),
        ([1.0, 2.0], "token ids are integers, not float64"),
        ([True], "token ids are integers, not bool"),
    ],
)
def test_ids_are_checked_before_they_are_written(tmp_path, tokens, line):
    """[1, 70000, -1] stored as [1, 4464, 65535]."""
    with pytest.raises(UserError, match=line) as e:
        corpus.write_tokens(tmp_path / "val.bin", tokens, 300)
    assert one_line(e) and "val.bin" in str(e.value)
    with pytest.raises(UserError, match=line):
        References.create(tmp_path / "kb", [[5], tokens], 300)
    assert not list(tmp_path.iterdir())


def test_token_files_are_checked_when_they_are_opened(tmp_path):
    """A split cut in half, an odd byte, an id beyond the vocabulary: an IndexError deep inside
    training, hours later, or nothing at all."""
    common.write_json(tmp_path / "meta.json", dict(n_vocab=300, splits=dict(val=6)))
    path = tmp_path / "val.bin"
    corpus.write_tokens(path, [1, 2, 3, 4, 5, 299], 300)
    assert corpus.open_tokens(tmp_path, "val").tolist() == [1, 2, 3, 4, 5, 299]
    good = path.read_bytes()
    for bad, line in [
        (good[:6], "val.bin has 3 tokens, meta.json 6"),
        (good * 2, "val.bin has 12 tokens, meta.json 6"),
        (good[:-1], "val.bin is cut off: 11 bytes"),
        (good[:-2] + b"\x2c\x01", "val.bin: id 300 of a vocabulary of 300"),
        (b"\xff" * 12, "val.bin: id 65535 of a vocabulary of 300"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=line) as e:
            corpus.open_tokens(tmp_path, "val")
        assert one_line(e) and str(tmp_path) in str(e.value)
    for n_vocab in (0, -3, 1 << 32, "300", None, True, 3.5):
        (tmp_path / "meta.json").write_text(json.dumps(dict(n_vocab=n_vocab)))
        with pytest.raises(UserError, match="meta.json is damaged: .*n_vocab"):
            corpus.open_tokens(tmp_path, "val")


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
        (tokens, good[:-1], "kb.bin is cut off"),
        (tokens, good[:-2] + b"\x33\x01", "kb.bin: id 307 of a vocabulary of 307"),
        (index, (offsets[:8] + b"\xff" * 7 + b"\x7f") * 2 + offsets[16:], "does not fit"),
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
    with pytest.raises(UserError, match="kb.idx is missing: run python data/text/prepare.py"):
        References.open(tmp_path / "kb")
    common.write_json(tmp_path / "meta.json", dict(n_vocab=307, command="python made.py --x 1"))
    with pytest.raises(UserError, match="kb.idx is missing: run python made.py --x 1$"):
        References.open(tmp_path / "kb")
    (tmp_path / "prepare.py").write_text("")
    with pytest.raises(UserError, match="train_refs.bin is missing: run .*prepare.py --train$"):
        References.open(tmp_path / "train_refs")
    index.write_bytes(offsets)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json is missing"):
        References.open(tmp_path / "kb")
