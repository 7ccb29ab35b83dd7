"""kb.py from the command line, several bases at once, and knowing that it does not know."""

import io
import json
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from world import PLACES, World, text_of

import common
import corpus
import generate as generation
import inside
import kb
import retrieval
import sample
import write
from bank import MemoryBank, Texts
from common import UserError
from generate import Several, generate
from retrieval import Live, Only, Relevance

ROOT = Path(corpus.__file__).parent
TOY = ["--checkpoint", str(ROOT / "checkpoints/toy"), "--device", "cpu"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tok = corpus.tokenizer(ROOT / "data/cities")
    return World(tmp_path_factory.mktemp("kb") / "world", tok)


@pytest.fixture
def world(built, tmp_path):
    mine = object.__new__(World)
    mine.__dict__.update(vars(built))
    shutil.copytree(built.bank, tmp_path / "kb.bank")
    mine.bank = tmp_path / "kb.bank"
    return mine


def run(world, command, *args, path=None):
    flags = ["--kb", path or world.bank]
    if command in ("new", "add", "replace", "merge"):
        flags += ["--checkpoint", world.checkpoint, "--device", "cpu"]
    if command == "new":
        flags += ["--data", world.data]
    kb.main([command, *map(str, flags), *map(str, args)])


def test_cut_and_fit(built):
    """Paragraphs run together, lines miscounted, a long text cut off or without its last words."""
    text = "\n\nOne. Two.\nThree.\n\n \t\nFour\n\n\n"
    assert list(kb.cut(text, "paragraph", "f")) == [
        ("One. Two.\nThree.", dict(file="f", line=3)),
        ("Four", dict(file="f", line=7)),
    ]
    lines = [(words, source["line"]) for words, source in kb.cut(text, "line", "f")]
    assert lines == [("One. Two.", 3), ("Three.", 4), ("Four", 7)]
    assert list(kb.cut(text, "document", "f"))[0][0] == text.strip()
    long = " ".join(text_of(i) for i in range(4)) + " No end"
    pieces = corpus.fit(long, built.tok, 29)
    assert all(1 <= len(piece) <= 29 for piece in pieces) and len(pieces) > 2
    assert "".join(built.tok.decode(piece) for piece in pieces).strip() == long
    words = built.tok.decode(pieces[0]).strip()
    assert words.endswith(".")  # whole sentences
    assert corpus.fit("a" * 300, built.tok, 29)[-1]
    assert corpus.fit("", built.tok, 29) == []


@pytest.mark.parametrize("spaces", [True, False])
def test_what_is_cut_is_kept(built, spaces):
    """Letters cut in two, in scripts without spaces; line ends and blanks between sentences lost;
    other tokens than those of the same text told otherwise."""
    tok = built.tok
    if not spaces:  # as GPT-2's
        made = common.read_json(ROOT / "data/cities/tokenizer.json", {}, "")
        common.write_json(built.data.parent / "bare.json", made | dict(prefix_space=False))
        tok = corpus.open_tokenizer(built.data.parent / "bare.json")
    short = "Kyiv is big. It has 4 people.\nIt is old."
    assert corpus.fit(f" {short}\n", tok, 64) == [tok.encode(short)]
    for text in ("北京是首都，人口很多很多很多。" * 30, "很多" * 300, "Ünlü " * 90, short * 9):
        pieces = corpus.fit(text, tok, 29)
        assert all(1 <= len(piece) <= 29 for piece in pieces) and len(pieces) > 2
        said = [tok.decode(piece) for piece in pieces]
        assert "\ufffd" not in "".join(said)
        assert "".join("".join(said).split()) == "".join(text.split())


def test_a_source_is_kept_as_it_is_given(world, tmp_path, capsys):
    """A name, an id or a time of the user's own that is replaced; half a letter as a traceback; a
    filter that finds what has no such key."""
    rows = [dict(text="Qux has 7 people.", id="Q42", time="1999", file="mine", note="\ud83d")]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    run(world, "add", tmp_path / "a.jsonl")
    run(world, "export", "--out", tmp_path / "out.jsonl", "--filter", "id=Q42")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row == rows[0] | dict(line=1, reference=17)
    capsys.readouterr()
    run(world, "list", "--filter", "nosuch=None")
    assert capsys.readouterr().out.startswith("0 references")


def test_a_text_that_goes_while_it_is_copied(world, tmp_path, monkeypatch):
    """An export or a merge that ends in the middle, or has an empty text, when another process
    deletes one."""
    live = Texts.live

    def then_deleted(texts):
        ids = live(texts)
        MemoryBank.open(texts.path).delete([4])
        return ids

    monkeypatch.setattr(Texts, "live", then_deleted)
    run(world, "export", "--out", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == [i for i in range(17) if i != 4]
    other = tmp_path / "other.kb"
    run(world, "new", path=other)
    run(world, "merge", world.bank, path=other)
    monkeypatch.undo()
    assert len(Texts(other)) == 16


def test_a_base_from_nothing(world, tmp_path, capsys):
    """An empty base that cannot be opened or asked; texts without their sources; a copy added."""
    path = tmp_path / "mine.kb"
    run(world, "new", path=path)
    with pytest.raises(UserError, match="is there already"):
        run(world, "new", path=path)
    run(world, "search", "Where is Abaholm?", path=path)
    assert "knows nothing about this" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("Zub City has 42 people.\n\nFoo City is in Barland.\n")
    rows = [dict(text="Qux City has 7 people.", lang="de"), dict(text="Zub City has 42 people.")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(world, "add", tmp_path / "a.txt", tmp_path / "b.jsonl", path=path)
    assert "3 added, 1 known before" in capsys.readouterr().out
    run(world, "list", path=path)
    out = capsys.readouterr().out
    assert f"file {tmp_path}/a.txt, line 3" in out and "lang de" in out and "3 references" in out
    run(world, "list", "--filter", "lang=de", path=path)
    assert "1 references" in capsys.readouterr().out
    run(world, "export", "--out", tmp_path / "out.jsonl", path=path)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows][2] == "Qux City has 7 people." and rows[2]["lang"] == "de"
    bank = MemoryBank.open(path, world.model)
    assert bank.verify() == [] and len(Live.open(bank.references)) == 3
    flags = world.args("--explain", prompt="How many people in Qux City?")
    flags[flags.index("--bank")] = "--kb"
    flags[flags.index("--kb") + 1] = str(path)
    sample.main(flags)
    assert "lang de" in capsys.readouterr().out


def test_what_is_given_is_checked(world, tmp_path, monkeypatch):
    """A blank text in place of a known one; lines miscounted after a blank one; standard input in
    the letters of the locale; an export that is half there, or a traceback."""
    with pytest.raises(UserError, match="the text ' ...': there is no word in it"):
        run(world, "replace", 3, " ...")
    assert world.tok.decode(MemoryBank.open(world.bank).references[3]).strip() == text_of(3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('\n{"text": "a"}\n\n\n{"text": "b"}\n')
    assert [source["line"] for _, source in kb.read_file(str(rows), "line")] == [2, 5]
    given = io.TextIOWrapper(io.BytesIO("\ufeffÇorlu".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", given)
    assert list(kb.read_file("-", "line")) == [("Çorlu", dict(file="standard input", line=1))]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xe7"), encoding="ascii"))
    with pytest.raises(UserError, match="standard input is damaged: line 2 is not UTF-8"):
        list(kb.read_file("-", "line"))
    with pytest.raises(UserError, match="none/out.jsonl cannot be written"):
        run(world, "export", "--out", tmp_path / "none" / "out.jsonl")
    with pytest.raises(UserError, match="rows.jsonl/kb cannot be made a directory"):
        run(world, "new", path=rows / "kb")


def test_a_new_text_near_an_old_one_is_named(world, tmp_path, capsys):
    """Two texts that contradict each other, and nobody says so; a printed command that fails, or in
    which a shell would replace a part of the text."""
    other = text_of(3).replace("6078", "$6079")
    assert other != text_of(3)
    (tmp_path / "c.txt").write_text(f"{other}\n\nNothing like it at all\n")
    run(world, "add", tmp_path / "c.txt")
    out = capsys.readouterr().out
    assert "17 is near 3 (similarity 0.8" in out and "18 is near" not in out
    command = out.split("takes its place: python kb.py ")[1].split(" && ")[0]
    assert command.startswith("replace --kb") and f"'{other}'" in command
    run(world, "replace", 3, other)
    said = capsys.readouterr().out
    command = said.split("17 is the same text; to have it once: python kb.py ")[1]
    kb.main(shlex.split(command))
    run(world, "search", "Dunholm", "--k", 1)
    out = capsys.readouterr().out
    assert other in out and Texts(world.bank).live().tolist() == [*range(17), 18]


def test_forget_like_and_compact(world, capsys):
    """A fact that is still there, in whatever file; others forgotten with it."""
    with pytest.raises(UserError, match="nothing is as similar as 0.99"):
        run(world, "forget-like", "Belholm", "--near", 0.99)
    with pytest.raises(UserError, match="add --yes"):
        run(world, "forget-like", text_of(1), "--near", 0.9)
    before = world.open()[0].retriever
    vector = before.index.reconstruct(1).tobytes()
    counts = before.embedder.state.tobytes()
    words = (world.bank / "index/embedder.npy").read_bytes()
    assert vector in (world.bank / "index/index.faiss").read_bytes() and counts in words
    run(world, "forget-like", text_of(1), "--near", 0.9, "--yes")
    run(world, "compact")
    out = capsys.readouterr().out
    assert "forgotten: 1 " in out and "bytes before" in out
    tokens = np.array(world.tok.encode(text_of(1)), "<u2").tobytes()
    for file in world.bank.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert tokens not in data and vector not in data and counts not in data, file
    retriever, bank = world.open()
    ids, _ = retriever.search([text_of(1)], 17)
    assert 1 not in ids and (ids >= 0).sum() > 9
    assert retriever.retriever.hidden == {1}  # nothing of it stands in the new index
    assert bank.add([world.tok.encode(text_of(1))]) == [17]  # told again
    assert retriever.search([text_of(1)], 1)[0].tolist() == [[17]]


def test_keys_are_those_of_the_very_tokens(world):
    """A text that begins inside a word, encoded anew with a space in front: keys that no memory
    has."""
    flags = ("--checkpoint", world.checkpoint, "--device", "cpu")
    run(world, "index", "--embedder", "self:1.1", *flags)
    whole = world.tok.encode(text_of(3))
    piece = next(
        whole[i:] for i in range(9) if world.tok.encode(world.tok.decode(whole[i:])) != whole[i:]
    )
    bank = MemoryBank.open(world.bank, world.model)
    (added,) = bank.add([piece])
    keys = Live.open(bank.references, world.model).retriever
    first, n = keys.rows[added]
    made = keys.index.reconstruct_n(first, n)
    kept = inside.stored_keys(bank.recall([added]), keys.i, keys.head)[0]
    assert n == len(kept) and (made * kept).sum(1).min() > 0.999


def test_a_base_that_is_searched_from_inside(world, tmp_path, capsys):
    """Commands without the model that searches (Remark 3.1); an index of keys that `compact` turns
    into one of words; what an unfinished index of words had learnt, left beside the keys."""
    flags = ("--checkpoint", world.checkpoint, "--device", "cpu")
    shutil.copytree(world.bank / "index", world.bank / "index.new")  # a kill left it
    run(world, "index", "--embedder", "self:1.1", *flags)
    assert "keys of the memories" in capsys.readouterr().out
    assert not (world.bank / "index" / "embedder.npy").exists()
    run(world, "search", text_of(3), *flags)
    assert "similarity" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("Zub City has 42 people.")
    run(world, "add", tmp_path / "a.txt")
    run(world, "verify", *flags)
    assert "index: 18 references, self:1.1" in capsys.readouterr().out
    keys = Live.open(Texts(world.bank), world.model).retriever
    row = keys.index.reconstruct(keys.rows[17][0]).tobytes()
    assert row in (world.bank / "index" / "index.faiss").read_bytes()
    run(world, "delete", 17)
    run(world, "compact", *flags)
    for file in (world.bank / "index").iterdir():
        assert row not in file.read_bytes(), file
    rows = [dict(question=f"Where is {name}holm?", reference=i) for i, name in enumerate(PLACES)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(world, "calibrate", "--questions", tmp_path / "q.jsonl", *flags)
    assert Live.open(Texts(world.bank), world.model).relevance
    with pytest.raises(UserError, match="give --checkpoint"):
        Live.open(Texts(world.bank))


def chosen(world):
    """The embedder and the factory of a base's index."""
    meta = json.loads((world.bank / "index/meta.json").read_text())
    return meta["embedder"], meta["factory"]


def test_what_was_chosen_by_hand_stays(world, monkeypatch, capsys):
    """An index whose --embedder or --factory becomes the usual one when it is made anew: by
    `compact`, by `save` once most is new, by `index` after damage, or by the printed cure."""
    run(world, "index", "--embedder", "hash:97", "--factory", "SQ8")
    assert chosen(world) == ("hash:97", "SQ8")
    run(world, "compact")
    assert chosen(world) == ("hash:97", "SQ8")
    monkeypatch.setattr(retrieval, "FEW", 5)
    retriever, bank = world.open()
    bank.add([world.tok.encode(f"Town {n} has {n * n} people.") for n in range(20)])
    assert retriever.save() is not retriever
    assert chosen(world) == ("hash:97", "SQ8")
    (world.bank / "index/index.faiss").write_bytes(b"damaged")
    with pytest.raises(UserError) as refused:
        world.open()
    cure = str(refused.value).split("python kb.py ")[1]
    kb.main(cure.split())
    assert chosen(world) == ("hash:97", "SQ8")
    assert world.open()[0].search(["Town 7"], 1)[0].tolist() == [[24]]
    run(world, "index", "--factory", "Flat")
    assert chosen(world) == ("hash:97", "Flat")
    run(world, "index", "--embedder", "hash")  # another embedder, and a kind by size
    assert chosen(world) == ("hash:512", "Flat")
    (world.bank / "index/meta.json").write_text("{")
    with pytest.raises(UserError, match="kb.py index --kb .* --embedder hash$") as refused:
        run(world, "index")
    kb.main(str(refused.value).split("python kb.py ")[1].split())
    assert world.open()[0].search(["Town 7"], 1)[0].tolist() == [[24]]


class Killed(BaseException):
    """A SIGKILL: nothing is caught, nothing is cleaned up."""


def killed_at(monkeypatch, when, function):
    """Runs function(); it dies at its rename or removal of a directory number `when`."""
    steps = []

    def mortal(real):
        def step(*args, **options):
            steps.append(real)
            if len(steps) == when:
                raise Killed
            return real(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", mortal(Path.rename))
        patch.setattr(shutil, "rmtree", mortal(shutil.rmtree))
        try:
            function()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("embedder", ["hash:97", "self:1.1"])
def test_a_kill_while_an_index_takes_its_place(world, embedder, monkeypatch, tmp_path, capsys):
    """A kill between the renames of the old index and the new one: the base then gets the usual
    index instead of the one that was chosen, for good, or cannot be opened."""
    where = ("--checkpoint", world.checkpoint, "--device", "cpu")
    rows = [dict(question=f"Where is {name}holm?", reference=i) for i, name in enumerate(PLACES)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(world, "calibrate", "--questions", tmp_path / "q.jsonl")
    run(world, "index", "--embedder", embedder, *where)
    killed = 0
    for when in range(1, 20):
        model = world.model if embedder.startswith("self") else None
        if not killed_at(monkeypatch, when, lambda model=model: run(world, "compact", *where)):
            break
        killed += 1
        if not (world.bank / "index").exists():  # on a medium that can only be read, too
            texts = Texts(world.bank)
            texts.writable = False
            assert Live.open(texts, model).meta["embedder"] == embedder
        run(world, "search", text_of(3), *where)
        live = Live.open(Texts(world.bank), model)
        assert live.meta["embedder"] == embedder and live.relevance
        assert chosen(world)[0] == embedder if model is None else "factory" not in live.meta
        assert not killed_at(monkeypatch, 99, lambda: run(world, "compact", *where))
    assert killed > 3
    assert "there is no index yet" not in capsys.readouterr().out


def test_a_base_whose_making_was_cut_short(world, monkeypatch, tmp_path):
    """A base that `new` refuses as being there already, and that opens with the usual index
    instead of the one that was asked for."""
    for cut in ("_prepare", "join"):
        path = tmp_path / cut
        flags = ("--embedder", "hash:97", "--checkpoint", world.checkpoint)
        with monkeypatch.context() as patch:
            place = retrieval if cut == "join" else sys.modules["index"]
            patch.setattr(place, cut, lambda *args: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                run(world, "new", *flags[:2], path=path)
        if cut == "join":
            copy = shutil.copytree(path, tmp_path / "copy")
            assert Live.open(Texts(copy)).meta["embedder"] == "hash:97"
        run(world, "new", *flags[:2], path=path)
        assert Live.open(Texts(path)).meta["embedder"] == "hash:97"
        with pytest.raises(UserError, match="is there already"):
            run(world, "new", path=path)


def test_a_kill_while_keys_are_saved(world, monkeypatch):
    """An index of keys that is half old and half new, and must be made anew by hand; a save that
    takes back what another process has saved."""
    run(world, "index", "--embedder", "self:1.1", "--checkpoint", world.checkpoint)
    live = Live.open(Texts(world.bank), world.model)
    late = Live.open(Texts(world.bank), world.model)
    bank = MemoryBank.open(world.bank, world.model)
    new = bank.append(world.tok.encode("Zub City has 42 people."))

    def die(*args, **options):
        raise Killed

    for name in ("replace_file", "write_sealed"):
        with monkeypatch.context() as patch:
            patch.setattr(retrieval.inside, name, die)
            with pytest.raises(Killed):
                Live.open(Texts(world.bank), world.model).save()
        again = Live.open(Texts(world.bank), world.model)
        assert new in again.retriever.rows
    live.save()
    saved = (world.bank / "index/meta.json").read_bytes()
    late.save()
    assert (world.bank / "index/meta.json").read_bytes() == saved


def test_many_that_find_no_index_make_one(world, capsys):
    """Several processes that make the same index at once: one of them finds its parts gone."""
    shutil.rmtree(world.bank / "index")

    def first_of(text):
        live = Live.open(Texts(world.bank))
        return int(live.search([text], 1)[0][0, 0])

    with ThreadPoolExecutor(5) as pool:  # a lock of a file holds off threads, too
        found = list(pool.map(first_of, [text_of(i) for i in range(10)]))
    assert found == list(range(10))
    assert capsys.readouterr().out.count("there is no index yet") == 1


def test_an_index_that_is_replaced_while_it_is_read(world, monkeypatch):
    """ "damaged or half renewed" for a reader that is there just when another process puts a new
    index in its place."""
    real = retrieval.open_index
    times = []

    def slow(*args):
        times.append(1)
        if len(times) == 1:
            Live.build(Texts(world.bank), "hash:97", progress=False)
        return real(*args)

    monkeypatch.setattr(retrieval, "open_index", slow)
    assert world.open()[0].embedder.dim == 97 and len(times) == 3


@pytest.mark.slow
def test_the_toy_no_longer_knows_a_forgotten_fact(tmp_path, capsys):
    """A deleted fact that the model still gives: from a memory, or the index."""
    path = tmp_path / "mine.kb"

    def ask(*flags):
        base = ["--kb", str(path), *TOY, "--tokens", "12"]
        sample.main([*base, "--prompt", "How many people live in Zubrowka City?", *flags])
        return capsys.readouterr().out.split(" -> ")[1]

    kb.main(["new", "--kb", str(path), "--data", str(ROOT / "data/cities"), *TOY])
    rows = [dict(text=f"Town {name}holm has {i * i + 7} people.") for i, name in enumerate(PLACES)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kb.main(["add", "--kb", str(path), str(tmp_path / "a.jsonl"), *TOY])
    assert "4242" not in ask()
    assert "4242" in ask("--remember", "Zubrowka City has 4242 people.")
    assert "4242" in ask()
    kb.main(["delete", "--kb", str(path), "17"])
    assert "4242" not in ask()
    kb.main(["compact", "--kb", str(path)])
    assert "4242" not in ask()


def test_the_commands_say_what_is_wrong(world, tmp_path, capsys, monkeypatch):
    """A traceback; an escape sequence that reaches the terminal."""
    for args, line in [
        (["show", 99], "17 references, from 0, and no 99"),
        (["delete", 99], "17 references, from 0, and no 99"),
        (["replace", 2, "word " * 99], "references long"),
        (["list", "--filter", "lang"], "give key=value"),
        (["add", tmp_path / "none.txt"], "none.txt is missing"),
        (["calibrate", "--questions", tmp_path / "none.jsonl"], "none.jsonl is missing"),
    ]:
        with pytest.raises(UserError, match=line):
            run(world, *args)
    (tmp_path / "q.jsonl").write_text('{"question": "Where?", "reference": 17}')
    with pytest.raises(UserError, match="q.jsonl names reference 17, and .* has 17, from 0"):
        run(world, "calibrate", "--questions", tmp_path / "q.jsonl")
    rows = [dict(question="Where?", reference=3)] * 3 + [dict(question="Where is Oslo?")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="no reference answers, or at least 2"):
        run(world, "calibrate", "--questions", tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="texts.sqlite is missing"):
        run(world, "list", path=tmp_path / "nowhere")
    (tmp_path / "evil.txt").write_text("Evil \x1b[2J City has 3 people.")
    run(world, "add", tmp_path / "evil.txt")
    run(world, "show", 17)
    out = capsys.readouterr().out
    assert "\\x1b[2J City" in out and "\x1b" not in out
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "evil.txt"))
    run(world, "add")
    assert "0 added, 1 known before" in capsys.readouterr().out


def test_verify_and_stats(world, capsys):
    """Damage that nobody names, or a cure that does not help."""
    with open(world.bank / "memories.bin", "r+b") as file:
        file.seek(100)
        file.write(b"xyz")
    run(world, "verify")
    out = capsys.readouterr().out
    made = f"python write.py --checkpoint checkpoints/toy --out {world.bank} writes"
    assert f"memories: 1 missing or damaged; {made}" in out and "17 whole" in out
    bank = MemoryBank.open(world.bank, world.model)
    bank.write(progress=False)
    bank.quantize("Residual1x1,PQ4x1")
    with open(world.bank / "codes/codes.bin", "r+b") as file:
        file.truncate(100)
    run(world, "verify", "--checkpoint", world.checkpoint, "--device", "cpu")
    out = capsys.readouterr().out
    cure = re.search(r"codes: 1\d missing or damaged; python write.py (.*) writes", out)[1]
    write.main(write.command_line([*shlex.split(cure), "--device", "cpu"]))
    assert MemoryBank.open(world.bank, codes=True).verify() == []
    run(world, "stats")
    out = capsys.readouterr().out
    assert "17 references, 0 deleted" in out and world.model.fingerprint() in out
    run(world, "index", "--embedder", "hash:97")
    assert "hash:97" in capsys.readouterr().out
    assert world.open()[0].embedder.dim == 97


# ---------------------------------------------------------------------------------------------
# Several bases


@pytest.fixture
def two(world, tmp_path):
    """The world's base, and one of 3 other texts."""
    rows = ["Zub City has 42 people.", "Foo City is in Barland.", "Abaholm City has 9 people."]
    texts = [world.tok.encode(row) for row in rows]
    refs = corpus.References.create(world.data / "second", texts, world.tok.n_vocab)
    bank = MemoryBank.create(tmp_path / "second.kb", world.model, refs)
    Live.build(bank.references, progress=False)
    first = world.open()
    return Several([first[0], Live.open(bank.references)], [first[1], bank])


def test_several_bases(world, two):
    """Scores of two bases that do not compare; the memory of a row of the other base."""
    ids, scores = two.search(["Where is Foo City?", text_of(2)], 4)
    assert ids[0, 0] == Several.STEP + 1 and ids[1, 0] == 2
    assert (np.diff(scores, axis=1) <= 0).all() and scores[1, 0] == pytest.approx(1, abs=1e-4)
    pool = two.recall([2, Several.STEP + 1, 5, Several.STEP])
    for m, i in enumerate([2, Several.STEP + 1, 5, Several.STEP]):
        base, row = divmod(i, Several.STEP)
        want = two.banks[base].recall([row])
        assert torch.equal(pool.kv[m], want.kv[0]) and pool.count[m] == want.count[0]
        assert two[i].tolist() == two.banks[base].references[row].tolist()
    assert two.origin(Several.STEP + 2).endswith("second.kb, file second, row 2")
    prompt = torch.tensor([[world.tok.bos, *world.tok.encode("Where is Foo City?")]])
    out, trace = generate(world.model, prompt, 5, two, two)
    assert Several.STEP + 1 in trace.recalls[0]["ids"]
    assert out.shape == (1, prompt.shape[1] + 5)
    two.banks[1].delete([1])
    assert two.live().tolist() == [*range(17), Several.STEP, Several.STEP + 2]


def test_several_bases_on_the_command_line(world, two, capsys):
    """An answer that does not say from which base it comes."""
    flags = world.args("--explain", prompt="How many people live in Zub City?")
    at = flags.index("--bank")
    flags[at : at + 2] = ["--kb", str(world.bank), "--kb", str(two.banks[1].path)]
    sample.main(flags)
    out = capsys.readouterr().out
    assert f"from {two.banks[1].path}, file second, row 0" in out
    assert f"from {world.bank}, file kb, row" in out


def test_bases_of_other_embedders_are_refused(two):
    """Cosines of different embedders put into one order."""
    other = Live.build(two.banks[1].references, "hash:97", progress=False)
    with pytest.raises(UserError, match="hash:512 and hash:97, do not compare"):
        Several([two.sources[0], other], two.banks)


def test_a_filter_on_the_source(world):
    """A filter that only hides what was found, so that fewer come than there are."""
    retriever, bank = world.open()
    for i in (3, 11, 16):
        bank.replace(i, bank.references[i], dict(lang="de"))
    only = Only(retriever, dict(lang="de"))
    ids, scores = only.search([text_of(3) + text_of(16) + text_of(11), text_of(11)], 4)
    assert sorted(ids[0].tolist()) == [-1, 3, 11, 16] and ids[1, 0] == 11
    assert (ids[:, 3] == -1).all() and (np.diff(scores, axis=1) <= 0).all()
    assert (Only(retriever, dict(lang="xx")).search(["Abaholm"], 2)[0] == -1).all()
    assert len(only) == 17


# ---------------------------------------------------------------------------------------------
# Knowing that it does not know


def questions(names):
    wordings = ["How many people live in {}?", "Which country is {} in?"]
    return [wording.format(name) for name in names for wording in wordings]


def test_it_knows_that_it_does_not_know(world, tmp_path, capsys):
    """Five arbitrary memories for a question that nothing here is about."""
    known = [f"{place}holm" for place in PLACES]
    unknown = [f"{place}holz" for place in PLACES] + ["Zub", "Foo City", "Belgrad", "Nisburg"]
    rows = []
    for i, name in enumerate(known):
        rows += [dict(question=q, reference=i) for q in questions([name])]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(world, "calibrate", "--questions", path)
    assert "1.000 of the unanswerable are recognised" in capsys.readouterr().out
    # words of many new texts are not rare any more
    (tmp_path / "new.txt").write_text("\n".join(f"The mayor of {x} is {x}o." for x in "ABCDE"))
    run(world, "add", "--by", "line", tmp_path / "new.txt")
    assert (
        Relevance.open(world.bank).n_texts == 22 and Relevance.open(world.bank).known["mayor"] == 5
    )
    run(world, "delete", *range(17, 22))
    run(world, "compact")
    capsys.readouterr()
    retriever, _ = world.open()
    assert (retriever.search(questions(known), 3)[0][:, 0] >= 0).mean() >= 0.95
    assert (retriever.search(questions(unknown), 3)[0] == -1).all()
    sample.main(world.args(prompt="How many people live in Zubrowka?"))
    assert "knows nothing about this: answered without a memory" in capsys.readouterr().out
    sample.main(world.args(prompt="How many people live in Belholm?"))
    assert "knows nothing" not in capsys.readouterr().out
    # it stays with the base, also when the index is made anew, and damage is not believed
    run(world, "index")
    assert (world.open()[0].search(questions(unknown), 3)[0] == -1).all()
    file = world.bank / Relevance.FILE
    file.write_text(file.read_text().replace('"least"', '"lest"'))
    with pytest.raises(UserError, match=f"{Relevance.FILE} is damaged"):
        world.open()


def test_a_question_in_other_words_is_still_known(world, tmp_path, capsys):
    """A base that knows only questions in the words of those that it was calibrated on: it then
    refuses nine of ten others that it could answer."""
    known = [f"{place}holm" for place in PLACES]
    learnt = tmp_path / "learnt.jsonl"
    rows = [
        dict(question=f"How many people live in {n}?", reference=i) for i, n in enumerate(known)
    ]
    learnt.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = ["Pray, whose subjects are the folk of {}?", "i seek {}'s head count", "{}: its land?"]
    asked = []
    for i, name in enumerate(known):
        asked += [dict(question=words.format(name), reference=i) for words in other]
        asked += [dict(question=words.format(f"{name[:3]}burg")) for words in other]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    run(world, "calibrate", "--questions", learnt, "--test", path)
    out = capsys.readouterr().out
    assert "1.000 of 51 answerable find something; without the references" in out
    assert "them 1.000 are recognised" in out and "1.000 of 51 unanswerable are recog" in out


def test_a_common_word_is_no_name(world):
    """A place called Wonder for whoever wonders; a name in small letters that is not found."""
    live, bank = world.open()
    bank.add([world.tok.encode(f"{name} has 42 people.") for name in ("Wonder", "Zub Lake")])
    rows = [(f"How many people live in {name}holm?", i) for i, name in enumerate(PLACES)]
    live.calibrate(rows)
    for question, found in [
        ("I wonder how many people live in Gobholm", False),
        ("I wonder how many people live in Belholm", True),
        ("is wonder large", True),
        ("How large is Wonder?", True),
        ("how large is belholm", True),
    ]:
        assert (live.search([question], 3)[0][0, 0] >= 0) == found, question


def test_what_is_forgotten_is_not_counted_either(world, tmp_path):
    """A word of deleted texts that stands on in the calibration after `compact`."""
    bank = world.open()[1]
    ids = bank.add([world.tok.encode(f"Zubrowka {n} has 42 people.") for n in range(3)])
    live = world.open()[0]
    live.calibrate([(f"Where is {name}holm?", i) for i, name in enumerate(PLACES)])
    file = world.bank / Relevance.FILE
    assert "zubrowka" in file.read_text()
    least = live.relevance.least
    bank.delete(ids)
    run(world, "compact")
    assert "zubrowka" not in file.read_text() and world.open()[0].relevance.least == least


def test_the_index_follows_every_process(world):
    """A fact that only the process that wrote it finds; a deleted one that others still find."""
    a, bank = world.open()
    b, _ = world.open()
    i = bank.append(world.tok.encode("Zub City has 42 people."))
    for live in (a, b):
        assert live.search(["Zub City"], 1)[0].tolist() == [[i]]
    bank.delete(i)
    bank.replace(4, world.tok.encode("Gug City has 43 people."))
    for live in (a, b):
        assert i not in live.search(["Zub City"], 17)[0]
        assert live.search(["Gug City"], 1)[0].tolist() == [[4]] and len(live) == 17
    assert a.save() is a
    again = world.open()[0]
    assert again.search(["Gug City"], 1)[0].tolist() == [[4]]
    b.save()  # out of date: not kept, and not wrong
    assert world.open()[0].search(["Gug City"], 1)[0].tolist() == [[4]]


def test_the_index_of_other_texts_is_refused(world, two):
    """Ids that name other texts: a directory put together from two bases."""
    shutil.rmtree(world.bank / "index")
    shutil.copytree(two.banks[1].path / "index", world.bank / "index")
    with pytest.raises(UserError, match="of other texts than those beside it.*kb.py index --kb"):
        world.open()
    shutil.rmtree(world.bank / "index")
    retriever, _ = world.open()  # made anew
    assert retriever.search([text_of(7)], 1)[0].tolist() == [[7]]


def test_the_index_is_made_anew_once_most_is_new(world, monkeypatch):
    """An embedder that learnt from nothing, in a base that has long been filled."""
    monkeypatch.setattr(retrieval, "FEW", 5)
    retriever, bank = world.open()
    before = retriever.embedder.id
    bank.add([world.tok.encode(f"Town {n} has {n * n} people.") for n in range(20)])
    fresh = retriever.save()
    assert fresh is not retriever and fresh.embedder.id != before
    assert fresh.search(["Town 7"], 1)[0].tolist() == [[24]]


def test_wanted():
    """A value with "=" cut off."""
    assert generation.wanted(["a=b=c", "d="]) == dict(a="b=c", d="")


def test_what_compact_leaves_of_a_calibration(world):
    """A threshold for more texts than are left, below which nothing is found any more; a forgotten
    name among the words of the questions, or in what a kill left."""
    bank = world.open()[1]
    live = Live.open(bank.references)
    names = [f"{a}{b}" for a in ("Aba", "Osu", "Eki") for b in ("holm", "dorf", "wick", "ford")]
    texts = [f"{name} is a town and has people." for name in names]
    ids = bank.add([live.tokenizer.encode(text) for text in texts])
    asked = []
    for i, name in zip(ids, names, strict=True):
        asked += [(f"Where is {name}?", i), (f"How old is {name}?", i)]
    live.calibrate(asked)
    assert (live.search(["Where is Osudorf?"], 1)[0] == ids[5]).all()
    bank.delete([i for i in ids if i not in (ids[5], ids[7])])
    file = world.bank / "relevance.json"
    left = file.with_name("relevance.json.tmp")
    left.write_text("Abaholm")
    kb.main(["compact", "--kb", str(world.bank)])
    assert (Live.open(bank.references).search(["Where is Osudorf?"], 1)[0] == ids[5]).all()
    assert "abaholm" not in file.read_text().casefold() and not left.exists()


def test_what_is_similar_is_said_of_a_calibrated_base(world):
    """A notice of near texts that the threshold for questions silences; a filter that evades it."""
    bank = world.open()[1]
    live = Live.open(bank.references)
    texts = ["The capital of Abaholm is Osu.", "The capital of Ekiford is Wick."]
    sources = [dict(src="one"), dict(src="two")]
    ids = bank.add([live.tokenizer.encode(text) for text in texts], sources)
    asked = [("What is the capital of Abaholm?", ids[0]), ("Capital of Ekiford?", ids[1])]
    live.calibrate(asked, keep=0)  # the strictest
    assert live.nearest(["a capital"], 1)[0][0] in ids
    assert (live.search(["a capital"], 1)[0] == -1).all()
    only = Only(live, dict(src="two"))
    assert (only.search(["What is the capital of Abaholm?"], 1)[0] == -1).all()
    assert (only.search(["What is the capital of Ekiford?"], 1)[0] == ids[1]).all()


def test_replacing_keeps_the_source(world, capsys):
    """A reference that has lost its file and line, though only its text is another; a contradiction
    settled as `add` prints it, with the source of the text that is gone."""
    bank = world.open()[1]
    tok = Live.open(bank.references).tokenizer
    text = [tok.encode(f"Abaholm has {n} people.") for n in (7, 8)]
    old, new = bank.add(text, [dict(file="a.txt"), dict(file="b.txt")])
    run(world, "replace", old, "Abaholm has 9 people.")
    assert bank.references.source(old)["file"] == "a.txt"
    run(world, "replace", "--source", new, old, "Abaholm has 8 inhabitants.")
    assert bank.references.source(old)["file"] == "b.txt"
    with pytest.raises(UserError, match="9999"):
        run(world, "replace", 9999, "Abaholm has 9 people.")


def test_an_export_does_not_overwrite_the_base(world):
    """The truth or all memories replaced by lines of JSON; a filter of which half is dropped."""
    before = (world.bank / "texts.sqlite").read_bytes()
    for name in ("texts.sqlite", "memories.bin", "new.jsonl"):
        with pytest.raises(UserError, match="lies in the knowledge base"):
            run(world, "export", "--out", world.bank / name)
    assert (world.bank / "texts.sqlite").read_bytes() == before
    with pytest.raises(UserError, match="each key once"):
        generation.wanted(["lang=de", "lang=fr"])
