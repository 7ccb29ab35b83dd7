"""Embedders: one Unicode form, words of every script, and vectors that are the same everywhere."""

import doctest
import unicodedata
from collections import Counter

import numpy as np
import pytest

import embed
from benchmarks import embedding
from common import UserError
from embed import HashEmbedder, embedder, normalize, words

NAMES = "Kyiv Uzhhorod Lviv Odesa Ruse Varna Plovdiv Burgas Turku Oulu Tampere Espoo Lahti".split()


def text(i):
    return f"{NAMES[i]} is a city. {NAMES[i]} has {1013 * (i + 3)} people."


def test_worked_examples():
    """A docstring whose example no longer holds."""
    result = doctest.testmod(embed)
    assert result.attempted >= 1 and result.failed == 0


def test_hash_embedder_is_the_same_everywhere():
    """Python's salted hash(), or a platform's byte order, in what an index is made of."""
    e = HashEmbedder(11).fit(["Kyiv has people", "Lviv has time", ""])
    assert e.id == "hash:11:3:3d8dfa710831"
    golden = [
        0.0804663,
        -0.3827357,
        0,
        0.8676163,
        0.0804663,
        -0.0103434,
        -0.1413367,
        -0.0195959,
        0.1413367,
        0.2022071,
        0.0804663,
    ]
    assert np.allclose(e.encode(["Kyiv, LVIV and Сновськ"])[0], golden, atol=1e-6)


def test_hash_embedder_edges(monkeypatch):
    """NaN for a text without words; vectors that depend on the batch or on a full cache."""
    fresh = HashEmbedder(67)
    e = fresh.fit(text(i) for i in range(13))
    assert fresh.id != e.id  # fitting leaves the old one, and what it embedded, as they were
    texts = ["", "?!", "Kyiv", "Lviv has", "名古屋 市", "Kyiv Kyiv Kyiv", text(3)]
    x = e.encode(texts)
    assert x.dtype == np.float32 and x.shape == (7, 67)
    assert np.allclose(np.linalg.norm(x, axis=1), [0, 0, 1, 1, 1, 1, 1], atol=1e-5)
    assert e.encode([]).shape == (0, 67)
    monkeypatch.setattr(HashEmbedder, "CACHE", 3)
    small = HashEmbedder(67, e.state)
    assert np.array_equal(np.concatenate([small.encode([t]) for t in texts]), x)


def test_hash_embedder_finds_the_city():
    """Features without weights: what all references share drowns the name."""
    e = HashEmbedder().fit(text(i) for i in range(13))
    kb = e.encode([text(i) for i in range(13)])
    questions = e.encode([f"What is the population of {name}?" for name in NAMES])
    assert ((questions @ kb.T).argmax(1) == np.arange(13)).all()


def test_unknown_embedder():
    """A misspelt name that silently becomes the default, or a refusal that does not name all that
    there are; a missing package that says nothing."""
    line = "unknown embedder 'hsah': take one of hash, hash:DIM, bge-m3, hf:NAME, self:LAYER.HEAD$"
    with pytest.raises(ValueError, match=line):
        embedder("hsah")
    try:
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install transformers"):
            embedder("bge-m3")


def test_names_of_embedders_are_checked():
    """A dimension of 0, below it, or beyond what the hash can tell apart, that is taken."""
    assert embedder("hash").dim == 512 and embedder("hash:1").dim == 1
    for name in ("hash:0", "hash:-3", "hash:", "hash:1e3", "hash:07", "hf:", "", "hash:9 "):
        with pytest.raises(UserError, match="unknown embedder"):
            embedder(name)
    with pytest.raises(UserError, match="at most 8192 dimensions"):
        embedder("hash:8193")


# Texts that Unicode calls canonically equal
EQUAL = [
    ("\u00c7orlu", "C\u0327orlu"),  # a letter and its accent
    ("\u212bngstr\u00f6m", "A\u030angstro\u0308m"),  # the sign for the unit, and the letter
    ("\ud55c\uad6d\uc5b4", unicodedata.normalize("NFD", "\ud55c\uad6d\uc5b4")),  # Hangul
    ("a\u0323\u0308b", "a\u0308\u0323b"),  # two marks in either order
    ("\u0928\u093c", "\u0929"),  # Devanagari with a nukta
    ("\uf900", "\u8c48"),  # a compatibility ideograph
    ("\u304c\u304e", "\u304b\u3099\u304d\u3099"),  # kana with voicing marks
    ("\u1fb3", "\u03b1\u0345"),  # iota below, which case folding moves
]


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_texts_are_equal(one, other):
    """A question typed on one machine that does not find what was written on another."""
    assert one != other and normalize(one) == normalize(other)
    assert words(one) == words(other) and words(one)
    e = HashEmbedder(61).fit([one, "Orlu has people"])
    assert e.id == HashEmbedder(61).fit([other, "Orlu has people"]).id
    assert np.array_equal(e.encode([f"x {one} y"]), e.encode([f"x {other} y"]))
    assert words(one.upper()) == words(other.upper())


def test_marks_belong_to_their_letter():
    """Words that are cut at a combining mark, which no composed letter takes in."""
    assert words("H\u0331olon, \u092d\u093e\u0930\u0924 \u0647\u064e\u0644") == [
        "h\u0331olon".replace("h\u0331", "\u1e96"),
        "\u092d\u093e\u0930\u0924",
        "\u0647\u064e\u0644",
    ]
    assert words("r\u0323\u0304s\u0331q\u0307") == ["\u1e5ds\u0331q\u0307"]  # no letter for all
    assert words("\u0301 \u0301x") == ["x"]  # a mark without its letter is no word
    # soft hyphen, joiners, a byte order mark and an emoji's selector are not seen
    assert words("Bu\u00addapest \ufeffmi\u200dr\u200c 1\ufe0f") == ["budapest", "mir", "1"]
    found = HashEmbedder().fit(["Orlu has people", "\u00c7orlu has people"])
    question = unicodedata.normalize("NFD", "What is the population of \u00c7orlu?")
    scores = found.encode([question]) @ found.encode(["Orlu has people", "\u00c7orlu people"]).T
    assert scores[0, 1] > scores[0, 0]


CHINESE = (
    "北京 上海 广州 深圳 天津 重庆 成都 武汉 西安 南京 杭州 苏州 青岛 大连 厦门 宁波 "
    "长沙 郑州 沈阳 哈尔滨 济南 昆明 福州 合肥 南昌 贵阳 太原 石家庄 长春 海口 兰州 "
    "西宁 银川 拉萨 乌鲁木齐 呼和浩特 南宁 温州 无锡 佛山 东莞 珠海 桂林 洛阳 开封 "
    "扬州 绍兴 泉州 烟台 威海 三亚"
)
JAPANESE = (
    "東京 大阪 京都 名古屋 横浜 神戸 札幌 福岡 仙台 広島 長崎 鹿児島 熊本 大分 宮崎 "
    "那覇 松山 高松 徳島 高知 岡山 山口 鳥取 松江 奈良 大津 和歌山 金沢 福井 富山 新潟 "
    "長野 甲府 静岡 岐阜 津 千葉 さいたま 宇都宮 水戸 前橋 福島 山形 秋田 盛岡 青森 "
    "函館 旭川 釧路 つくば いわき"
)
THAI = (
    "กรุงเทพ เชียงใหม่ เชียงราย ภูเก็ต ขอนแก่น อุดรธานี นครราชสีมา อุบลราชธานี หาดใหญ่ "
    "สงขลา สุราษฎร์ธานี นครศรีธรรมราช กระบี่ ตรัง พังงา ระนอง ชุมพร ประจวบคีรีขันธ์ "
    "เพชรบุรี ราชบุรี กาญจนบุรี สุพรรณบุรี อยุธยา ลพบุรี สระบุรี สิงห์บุรี ชัยนาท "
    "นครสวรรค์ พิษณุโลก สุโขทัย ตาก กำแพงเพชร พิจิตร เพชรบูรณ์ แพร่ น่าน พะเยา ลำปาง "
    "ลำพูน แม่ฮ่องสอน เลย หนองคาย สกลนคร นครพนม มุกดาหาร ร้อยเอ็ด มหาสารคาม กาฬสินธุ์ "
    "ยโสธร ศรีสะเกษ บุรีรัมย์"
)


@pytest.mark.parametrize(
    "names, fact, question",
    [
        (CHINESE, "{}是一座城市，有{}万居民。", "请问{}的人口是多少？"),
        (JAPANESE, "{}は日本の都市です。人口は{}万人です。", "{}には何人が住んでいますか？"),
        (THAI, "{}เป็นเมืองในประเทศไทย มีประชากร{}คน", "ประชากรของ{}มีกี่คน"),
    ],
)
def test_scripts_without_spaces(names, fact, question):
    """A sentence that is one word, so that it finds nothing but itself."""
    names = names.split()
    facts = [fact.format(name, 103 * (i + 3)) for i, name in enumerate(names)]
    e = HashEmbedder().fit(facts)
    scores = e.encode([question.format(name) for name in names]) @ e.encode(facts).T  # (51, 51)
    better = (scores > np.diag(scores)[:, None]).sum(1)
    assert len(names) == 51 and (better < 5).all() and (better == 0).mean() > 0.9


def test_scripts_that_meet():
    """A Latin word that is lost beside Chinese letters, or taken apart like them."""
    assert words("iPhone手机2台") == "iphone 2 手 机 手 机 手机 台 台".split()
    assert words("กี่") == ["กี่", "กี่"]  # one letter with its two marks
    assert words("は") == []


def test_frequencies_are_counted_in_parts(monkeypatch):
    """Counts that are lost or doubled when the counter is emptied on the way."""
    texts = [text(i % 13) + f" {i} {i * 7}" for i in range(61)]
    whole = HashEmbedder(31).fit(texts)
    monkeypatch.setattr(HashEmbedder, "CACHE", 11)
    assert HashEmbedder(31).fit(iter(texts)).id == whole.id
    monkeypatch.setattr(HashEmbedder, "BATCH", 3)
    assert np.array_equal(HashEmbedder(31, whole.state).encode(texts), whole.encode(texts))


def test_replaced_weights_are_another_embedder(tmp_path):
    """An index of other vectors than those of its queries, since only the path was compared."""
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "\u00e7"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(
        vocab_file=str(tmp_path / "vocab.txt"), strip_accents=False
    )
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5
    )
    model = transformers.BertModel(config)
    path = tmp_path / "encoder"
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    first = embedder(f"hf:{path}")
    assert first.id == embedder(f"hf:{path}").id and first.dim == 6
    x = first.encode(["a \u00e7", "a c\u0327", "b"])
    assert np.array_equal(x[0], x[1]) and not np.allclose(x[0], x[2])
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    model.encoder.layer[0].output.dense.weight.data[2, 3] += 0.25
    model.save_pretrained(path)
    second = embedder(f"hf:{path}")
    assert second.id != first.id
    vocabulary[5:7] = "b", "a"  # the same weights, but other tokens
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(path)
    assert embedder(f"hf:{path}").id not in (first.id, second.id)
    with pytest.raises(UserError, match="nowhere cannot be loaded"):
        embedder(f"hf:{tmp_path}/nowhere")


def test_speed_of_embedding(monkeypatch):
    """A rate of other texts than it says, or of none; words cut at other places."""
    assert embedding.cut(["a"] * 163) == [" ".join("a" * 80), " ".join("a" * 80), "a a a"]
    texts = embedding.zipf(1600, 50)
    assert [len(text.split()) for text in texts] == [80] * 20
    counts = sorted(Counter(" ".join(texts).split()).values())
    assert counts[-1] > 5 * counts[len(counts) // 2]
    monkeypatch.setattr(embedding, "prose", lambda: texts)
    n, words_each, seconds, worked = embedding.measure("prose")
    assert (n, words_each) == (20, 80) and 0 < worked and 0 < seconds


@pytest.mark.slow
def test_rates_of_two_processes(capsys):
    """A second process whose texts do not count, or that one waits for."""
    embedding.main(["--kinds", "prose", "--processes", "1", "2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[3] for row in rows] == ["1", "2"] and rows[0][1] == rows[1][1]
    assert all(float(row[4].replace(",", "")) > 100 for row in rows)
