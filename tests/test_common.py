"""Refusals in one line, the readers of our files, whole files, entry points."""

import argparse
import doctest
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import common
from common import UserError, read_array, read_json, read_rows, read_text
from model import Config

ROOT = Path(common.__file__).parent
CURE = "run python prepare.py"


def refused(line, call, *args):
    """The call's UserError: one line, with these words and the cure."""
    with pytest.raises(UserError, match=line) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def script(tmp_path, body, *args, **env):
    """Runs a script of ours as a command of its own."""
    path = tmp_path / "command.py"
    head = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n"
    path.write_text(head + textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, str(path), *args],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONIOENCODING="", OMP_NUM_THREADS="1") | env,
    )


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(common)
    assert found.attempted >= 1 and not found.failed


# ---------------------------------------------------------------------------------------------
# Reading

SCHEMA = dict(n=int, share=float, name=str, rows=list, best=(float, type(None)))
GOOD = dict(n=3, share=0.5, name="Ça", rows=[], best=None, more="may be")


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(GOOD).encode(),
        json.dumps(GOOD, ensure_ascii=False).encode(),
        json.dumps(GOOD, ensure_ascii=False).encode("utf-8-sig"),  # what Windows' editor saves
        json.dumps(GOOD, indent=1).replace("\n", "\r\n").encode(),
        json.dumps(GOOD | dict(share=1, best=2)).encode(),
    ],
)
def test_json_is_read_however_it_was_saved(tmp_path, data):
    """A byte order mark, CRLF, or an int for a float: "Expecting value: line 1"."""
    (tmp_path / "meta.json").write_bytes(data)
    row = read_json(tmp_path / "meta.json", SCHEMA, CURE)
    assert row["name"] == "Ça" and row["n"] == 3 and row["more"] == "may be"


@pytest.mark.parametrize(
    "data, line",
    [
        (b"", "is empty"),
        (b"  \n", "no JSON"),
        (b"{", "no JSON"),
        (b'{"n": 3,}', "no JSON"),
        (b"[]", "it holds a list, not an object"),
        (b"null", "it holds null, not an object"),
        (b'"n"', "it holds a string, not an object"),
        (b"{}", "it has no 'n'"),
        (b'{"n": 3, "share": 1}', "it has no 'name'"),
        (b'{"n": "3"}', "'n' is a string, not an integer"),
        (b'{"n": 3.5}', "'n' is a number, not an integer"),
        (b'{"n": true}', "'n' is true or false, not an integer"),
        (b'{"n": 3, "share": true}', "'share' is true or false, not a number"),
        (b'{"n": 3, "share": null}', "'share' is null, not a number"),
        (b'{"n": 3, "share": 1, "name": ["x"]}', "'name' is a list, not a string"),
        (b'{"n": 3, "name": "\xc3"}', "line 1 is not UTF-8"),
        (b'{"n": 3,\n "name":\n "\xe9t\xe9"}', "line 3 is not UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
        (b"\x00" * 40, "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"1" * 10_000, "no JSON|it holds"),
        (b"\x80\x04\x95", "not UTF-8"),  # a pickle
    ],
)
def test_damaged_json_is_one_line(tmp_path, data, line):
    """A KeyError, a RecursionError, or a refusal that names no file."""
    path = tmp_path / "meta.json"
    path.write_bytes(data)
    said = refused(line, read_json, path, SCHEMA, CURE)
    assert str(path) in said and said.endswith(CURE)


def test_what_cannot_be_read(tmp_path):
    """A directory or a missing file where a file is meant: a traceback of open()."""
    for path in (tmp_path / "none.json", tmp_path / "no/such.json"):
        said = refused("is missing", read_json, path, SCHEMA, CURE)
        assert str(path) in said and said.endswith(CURE)
    assert str(tmp_path) in refused("Is a directory", read_text, tmp_path, CURE)


def test_rows_name_their_line(tmp_path):
    """ "Expecting value: line 1" for a fault in line 4,000; a blank last line that is a fault."""
    path = tmp_path / "questions.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"q": "a"}\r\n\r\n{"q": "b"}\n\n  \n')
    assert read_rows(path, dict(q=str), CURE) == [dict(q="a"), dict(q="b")]
    path.write_text('{"q": "a\u2028b"}\n')  # a line separator of Unicode ends no line of JSON
    assert read_rows(path, dict(q=str), CURE) == [dict(q="a\u2028b")]
    for data, line in [
        (b'{"q": "a"}\n\n{"q": 7}\n', "line 3: 'q' is an integer, not a string"),
        (b'{"q": "a"}\n[]\n', "line 2: it holds a list"),
        (b'{"q": "a"}\n{"q": "b"', "line 2: no JSON"),
        (b'{"q": "a"}\n{"q": "\xff"}', "line 2 is not UTF-8"),
        (b"\n\n", "is empty"),
        (b"", "is empty"),
    ]:
        path.write_bytes(data)
        said = refused(line, read_rows, path, dict(q=str), CURE)
        assert str(path) in said and said.endswith(CURE)


def test_arrays(tmp_path):
    """An empty .npy, another shape, or a pickle: an EOFError, wrong numbers, foreign code run."""
    path = tmp_path / "state.npy"
    good = np.arange(21, dtype="<u4").reshape(3, 7)
    np.save(path, good)
    for shape in ((3, 7), (None, 7), (None, None)):
        assert (read_array(path, "<u4", shape, CURE) == good).all()
    for dtype, shape in (("<u4", (7, 3)), ("<u4", (21,)), ("<i8", (3, 7)), ("<u4", ())):
        refused("not an array of", read_array, path, dtype, shape, CURE)
    data = path.read_bytes()
    path.write_bytes(b"")
    refused("is empty", read_array, path, "<u4", (3, 7), CURE)
    for bad in (data[:3], data[:40], data[:-5], b"\x93NUMPY\x01\x00\x03\x00{(\n", b"no array"):
        path.write_bytes(bad)
        said = refused("is damaged", read_array, path, "<u4", (3, 7), CURE)
        assert str(path) in said and said.endswith(CURE)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    refused("is damaged", read_array, path, "<u4", (3, 7), CURE)
    np.savez(tmp_path / "z", a=good)
    refused("is damaged", read_array, tmp_path / "z.npz", "<u4", (3, 7), CURE)
    refused("is missing", read_array, tmp_path / "none.npy", "<u4", (3, 7), CURE)
    refused("cannot be read .Is a directory", read_array, tmp_path, "<u4", (3, 7), CURE)


# ---------------------------------------------------------------------------------------------
# Writing


def test_json_comes_back(tmp_path):
    """Letters as escapes, or half of a surrogate pair that no file takes."""
    path = tmp_path / "a.json"
    row = dict(n=3, name="Çorlu 東京", share=0.1, rows=[1, None, True])
    common.write_json(path, row)
    assert read_json(path, dict(n=int), CURE) == row and "Çorlu" in path.read_text("utf-8")
    common.write_json(path, dict(name="\ud800x"))
    assert read_json(path, dict(name=str), CURE)["name"] == "\ud800x"


def test_a_flipped_bit_of_a_sealed_file_is_never_read(tmp_path):
    """A threshold of 9.2 that becomes 1.2, a list of ids with another one in it: JSON still."""
    path = tmp_path / "a.json"
    given = dict(least=9.25, ids=[3, 17], name="Ça", known={"is": 4})
    common.write_sealed(path, given)
    assert common.read_sealed(path, {}, CURE) == given
    data = path.read_bytes()
    n_refused = 0
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                read = common.read_sealed(path, {}, CURE)
            except UserError as refused:
                n_refused += 1
                assert "a.json is damaged" in str(refused) and CURE in str(refused)
            else:  # in the word "seal" itself, or white space
                assert {key: read[key] for key in given} == given
    assert n_refused > 6 * len(data)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    """A traceback at the end of hours; the old file lost; a .tmp left."""
    folder = tmp_path / "taken"
    folder.mkdir()
    refused("taken cannot be written: ", common.write_json, folder, {})
    refused("cannot be written: No such file", common.write_json, tmp_path / "no/a.json", {})
    (tmp_path / "file").write_bytes(b"x")
    refused("cannot be written: Not a dir", common.write_json, tmp_path / "file/a.json", {})
    refused("cannot be made a directory", common.make_directory, tmp_path / "file")
    refused("cannot be made a directory", common.make_directory, tmp_path / "file/a")
    (tmp_path / "here/lock").mkdir(parents=True)
    with pytest.raises(UserError, match="here cannot be written to .*: copy it to where"):
        with common.lock(tmp_path / "here"):
            pass
    made = common.make_directory(tmp_path / "a/b")
    assert made.is_dir() and common.make_directory(made) == made
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "file").read_bytes() == b"x"


def test_numbers_have_their_range():
    """A traceback for a number that no float holds; nan or infinity where a number is meant."""
    count = common.number(int, 1)
    assert count("7") == 7 and common.number(float, -2)("-1.5") == -1.5
    assert count("1" + "0" * 400) == 10**400
    for kind, text in ((int, "0"), (int, "-" + "9" * 400), (float, "nan"), (float, "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match="it goes from"):
            common.number(kind, 1)(text)
    with pytest.raises(UserError, match="n_layer 10*: give a whole number from 1 to"):
        Config(n_layer=10**400)


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    """A traceback on the shared disks that know no flock, or silence."""

    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(common.fcntl, "flock", flock)
    with common.lock(tmp_path):
        pass
    assert "this disk has no locks (Operation not supported)" in capsys.readouterr().err


def test_waiting_for_a_directory_is_said_and_ends(tmp_path, capsys):
    """A command that hangs for ever, and says nothing, behind a process that is stopped."""
    with common.lock(tmp_path):
        refused_after = time.monotonic()
        with pytest.raises(UserError, match="working there for 1.5 s: end it, or try later"):
            with common.lock(tmp_path, 1.5):
                pass
        assert 1.4 < time.monotonic() - refused_after < 60
        assert capsys.readouterr().err.endswith("working there; waiting for up to 1.5 s\n")
    with common.lock(tmp_path, 0):
        assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """No space left, in the middle of a write: half a file under the right name, or a traceback."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    body = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as if the disk were full
        common.run(lambda: common.replace_file(sys.argv[1], lambda file: file.write(b"x" * 9999)))
    """
    ran = script(tmp_path, body, str(path))
    assert (
        ran.returncode == 1
        and ran.stderr == f"command.py: {path} cannot be written: File too large\n"
    )
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------
# Entry points


def test_only_what_the_user_can_mend_is_one_line(monkeypatch):
    """A student's own bug as "too many values to unpack", without file or line."""
    monkeypatch.setattr(sys, "argv", ["some/command.py"])

    def said(main):
        with pytest.raises(SystemExit) as e:
            common.run(main)
        return e.value.code

    def stopped():
        raise KeyboardInterrupt

    def bug():
        _a, _b = 1, 2, 3

    def unchecked():
        open("/no/such")

    assert said(lambda: common.check(False, "give --x")) == "command.py: give --x"
    assert said(stopped) == "command.py: stopped"
    line = "command.py: needed: pip install no_such_package"
    assert said(lambda: common.optional("no_such_package.part")) == line
    assert "faiss-cpu" in said(lambda: common.optional("faiss.no_such"))
    with pytest.raises(ValueError, match="too many values"):  # its traceback says where
        common.run(bug)
    with pytest.raises(FileNotFoundError):
        common.run(unchecked)


def test_a_terminal_that_cannot_show_a_letter(tmp_path):
    """LC_ALL=C: the answer is there, and the command dies of printing it."""
    body = "common.run(lambda: print('\\u00c7orlu \\u6771', '1'))"
    ran = script(tmp_path, body, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (ran.returncode, ran.stdout) == (0, "\\xc7orlu \\u6771 1\n")
    ran = script(tmp_path, body, PYTHONUTF8="1")
    assert (ran.returncode, ran.stdout) == (0, "Çorlu 東 1\n")


def test_a_reader_that_has_read_enough(tmp_path):
    """The traceback of a broken pipe after `| head`."""
    path = tmp_path / "command.py"
    body = "common.run(lambda: [print('line', i) for i in range(99_999)])"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n{body}\n")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} | head -2"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("line 0\nline 1\n", "")


def test_nothing_steers_the_terminal():
    """A reference that clears the screen, or retitles the window, when it is shown."""
    text = "a\x1b]0;title\x07b\x9b2Jc\r\x7f\x00\u2028d\te\nÇ"
    shown = common.visible(text)
    assert shown == "a\\x1b]0;title\\x07b\\x9b2Jc\\x0d\\x7f\\x00\u2028d\te\nÇ"
