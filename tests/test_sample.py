"""sample.py: its flags, and what it refuses before it writes."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from world import World, bytes_of, copy_of, prompt_of, text_of

import corpus
import generate as generation
import kb
import sample
from bank import MemoryBank
from common import UserError
from generate import generate


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(ROOT / "data/cities")


@pytest.fixture(scope="module")
def built(tmp_path_factory, tok):
    return World(tmp_path_factory.mktemp("built") / "world", tok)


@pytest.fixture
def world(built, tmp_path):
    """A copy that a test may spoil."""
    return copy_of(built, tmp_path / "world")


# ---------------------------------------------------------------------------------------------
# The command line


def test_main(world, capsys):
    """A flag that is accepted and dropped."""
    said = {}
    for memory in ("off", "random", "bank"):
        more = ["--explain"] if memory != "off" else []
        said[memory] = sample.main(world.args(*more, memory=memory))
        out = capsys.readouterr().out
        assert "How many people live in Belholm?" in out and "non-embedding weights" in out
        assert f"\n -> {said[memory].strip()}" in out
        assert ("recalled by" in out) == (memory != "off")
        if memory == "bank":
            assert "Belholm has" in re.sub("[₀-₉]", "", out)
    assert len({*said.values()}) == 3
    assert sample.main(world.args()) == said["bank"]
    assert sample.main(world.args("--plain")) not in said.values()
    warm = world.args("--temperature", "3", "--top_k", "50", "--top_p", "0.99")
    hot = [sample.main([*warm, "--seed", s]) for s in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2] and said["bank"] not in hot
    assert sample.main(world.args("--temperature", "3", "--top_k", "1")) == said["bank"]
    # a stop token ends the answer, and no "." is asked for with --stop ""
    tokens = world.tok.encoding.encode_ordinary(said["bank"])
    short = sample.main(world.args(stop=world.tok.encoding.decode(tokens[:1])))
    assert said["bank"].startswith(short) and len(short) <= len(said["bank"])


def test_main_rag(world, capsys):
    """References put into the context and, besides, recalled; or the wrong ones."""
    said = sample.main(world.args("--rag"))
    out = capsys.readouterr().out
    shown = re.findall(r"in context: score (-?[\d.]+)  (.*)", out)
    assert len(shown) == 3 and shown[0][1] == text_of(1)
    retriever, bank = world.open()
    ids = retriever.search(["How many people live in Belholm?"], 3)[0][0]
    prompt = " ".join(text_of(i) for i in ids) + " How many people live in Belholm?"
    tokens, _ = generate(world.model, prompt_of(world, prompt), 9, plain=True)
    assert world.tok.decode(tokens[0, -9:]) == said


def test_main_remember(world, capsys):
    """What was remembered a moment ago is not in this answer."""
    asked = dict(prompt="What is the population of Zubrowka City?")
    without = sample.main(world.args(**asked))
    told = "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."
    capsys.readouterr()
    first = sample.main(world.args("--remember", told, "--explain", **asked))
    out = capsys.readouterr().out
    assert "remembered as reference 17" in out and "reference 17\n" in out
    assert told in re.sub("[₀-₉]", "", out) and first != without
    assert sample.main(world.args("--remember", told, **asked)) == first
    assert "remembered as reference 17" in capsys.readouterr().out
    assert sample.main(world.args(**asked)) == first  # and it stays


def test_bad_input_is_one_line(world, tmp_path, monkeypatch):
    """A traceback for a typing error, or a bank of another model read as if it were this one's."""
    world.save(tmp_path / "other.pt", seed=2)
    world.save(tmp_path / "wide.pt", seed=1, n_recall=23)
    world.save(tmp_path / "foreign.pt", seed=1, tokenizer="gpt2:12345678")
    (tmp_path / "broken.pt").write_bytes(world.checkpoint.read_bytes()[:999])
    before = bytes_of(world.data.parent)
    empty = tmp_path / "empty"
    shutil.copytree(world.data, empty)
    (empty / "kb.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for args, line in [
        (world.args(prompt="Belholm " * 190), "max_context = 190: shorten the prompt"),
        (world.args(tokens=600), "ask for at most 1.. .--tokens"),
        (world.args(prompt=" "), "--prompt is empty"),
        (world.args("--remember", "Bazq", prompt="Belholm " * 190), "shorten the prompt"),
        (world.args("--remember", "Bazq", tokens=600), "--tokens"),
        (world.args("--remember", "Bazq", stop="one two"), "it must be one"),
        (world.args(stop="three tokens."), "--stop 'three tokens.' is . tokens; it must be one"),
        (world.args("--rag", memory="random"), "--memory random goes with neither"),
        (world.args("--remember", ""), "--remember '': there is no word"),
        (world.args("--remember", " \n"), "there is no word"),
        (world.args(checkpoint="nowhere.pt"), "nowhere.pt: no checkpoint there"),
        (world.args(checkpoint="broken.pt"), "broken.pt: not a checkpoint"),
        (world.args(checkpoint="foreign.pt"), "trained with tokenizer gpt2:12345678"),
        (world.args(checkpoint="other.pt"), "kb.bank"),
        (world.args(bank="nowhere.bank"), "nowhere.bank: no knowledge base here; first"),
        (world.args(data=str(tmp_path / "nodata")), "nodata/meta.json is missing"),
        (world.args("--cold_start", "--references", "nokb", bank="x"), "nokb.bin is missing"),
        (world.args("--cold_start", data=empty, bank="x"), "kb.bin is empty"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=line) as e:
            sample.main(args)
        assert "\n" not in str(e.value), line
    assert bytes_of(world.data.parent) == before
    # the command ends with the line, not with a traceback
    monkeypatch.setattr(sys, "argv", ["sample.py", *world.args(checkpoint="nowhere.pt")])
    with pytest.raises(SystemExit, match="^sample.py: nowhere.pt: no checkpoint there"):
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    wrong = [["--promt", "x"], [], world.args("--memory", "all")]
    for flag, values in dict(
        tokens=(0, -3, "x", 1.5),
        temperature=(-0.1, "nan", "inf"),
        top_k=(-1,),
        top_p=(0, 1.1, "nan"),
        n_recall=(-1,),
        seed=(-1, "x", 2**64),
    ).items():
        wrong += [world.args(f"--{flag}={value}") for value in values]
    for argv in wrong:
        with pytest.raises(SystemExit) as e:
            sample.main(argv)
        assert e.value.code == 2


def test_a_cold_start_is_a_command(world, tmp_path, capsys):
    """A bank that only write.py can begin; an answer of its own from memories made in passing."""
    warm = sample.main(world.args())
    bank = tmp_path / "cold.bank"
    assert sample.main(world.args("--cold_start", bank=bank)) == warm
    printed = capsys.readouterr().out
    assert "cold start" in printed and "4 of them encoded" in printed
    assert sample.main(world.args(bank=bank)) == warm  # now they are there
    assert "0 of them encoded" in capsys.readouterr().out


def test_an_empty_base_knows_nothing(world, tmp_path, capsys):
    """An answer without a memory that does not say so; a base that is searched twice, or instead of
    the one that was named."""
    flags = ["--checkpoint", str(world.checkpoint), "--device", "cpu"]
    kb.main(["new", "--kb", str(tmp_path / "new"), "--data", str(world.data), *flags])
    sample.main(world.args(bank=tmp_path / "new"))
    assert "knows nothing about this" in capsys.readouterr().out
    with pytest.raises(UserError, match="--bank and --kb: give one of them"):
        sample.main(world.args("--kb", str(world.bank)))
    twice = world.args("--kb", str(world.bank), "--kb", f"{world.bank}/")
    at = twice.index("--bank")
    with pytest.raises(UserError, match="give each base once"):
        sample.main(twice[:at] + twice[at + 2 :])


def run_in(world, *args, **environment):
    """The command as a user starts it. -> its return code, stdout and stderr as bytes."""
    env = dict(os.environ, **environment)
    command = [sys.executable, "sample.py", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")


def test_a_terminal_that_cannot_show_it(world):
    """A prompt that stdout cannot show, which loses the confirmation of a fact that was written."""
    told = ["--remember", "\u6771\u4eac\u90fd has 4242 people.", "--explain"]
    code, out, err = run_in(world, *world.args(*told, prompt="\u6771\u4eac\u90fd?"), **ASCII)
    assert code == 0, err.decode()
    assert b"remembered as reference 17" in out and b"tokens in" in out
    # bytes that are no UTF-8 at all
    args = [str(x).encode() for x in world.args()]
    at = args.index(b"--prompt") + 1
    args[at] = b"How many people \xff\xfe?"
    code, out, err = run_in(world, *args)
    assert code == 0 and b"tokens in" in out, err.decode()


def test_escape_sequences_do_not_reach_the_terminal(world, capsys):
    """A reference or a prompt that clears the screen, or turns the text around."""
    evil = "Zub\x1b[2J\x9b31m \u202e has 4242 people."
    args = world.args("--remember", evil, "--explain", prompt=f"How many people in {evil}")
    sample.main(args)
    out = capsys.readouterr().out
    assert evil[:3] in out and "reference 17" in out
    sample.main(world.args("--rag", prompt=evil, tokens=3))
    out += capsys.readouterr().out
    assert not set("\x1b\x9b\u202e\r\b\x07") & set(out)


def test_more_memories_than_references(world, tmp_path):
    """k > N: a knowledge base that is too small to be asked."""
    world.save(tmp_path / "wide.pt", seed=1, n_recall=23)
    model = generation.load_checkpoint(tmp_path / "wide.pt")[0]
    refs = corpus.References.open(f"{world.data}/kb")
    MemoryBank.create(tmp_path / "wide.bank", model, refs).write()
    sample.main(world.args(checkpoint=tmp_path / "wide.pt", bank=tmp_path / "wide.bank"))
