"""What every file needs: errors in one line, our own files, optional packages, devices.

check(condition, line)      every refusal: one line that names the file or flag and the cure
check_fields(config)        every field of a dataclass within the range of its annotation
read_text, read_json,
read_rows, read_array       the readers of all our text, JSON, JSON-lines and NumPy files
replace_file, write_json    written beside and renamed: a kill leaves the old file
write_sealed, read_sealed   the same with a checksum, for JSON of which every number counts
checksum(path)              the CRC-32 of a file
lock(path)                  one process at a time in a directory
optional(package)           a package that only some commands need
find_device(name)           "auto": CUDA where there is one
shard, number(int, 1)       types of argparse: a share "2/3"; a number with its range
torchrun_share()            the share of a process that torchrun has started
visible(text)               a text that a terminal cannot obey
command(*words)             a command line that the user can paste
run(main)                   an entry point: a UserError is one line, a bug keeps its traceback

A reader's `cure` is what the user can do about a file that is missing or damaged, as the end of a
sentence: "run python data/cities/prepare.py".
"""

import argparse
import fcntl
import importlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import torch


class UserError(ValueError):
    """Something that the user gave cannot be used. Its text, one line, names that and the cure."""

    everywhere = False  # whether all processes that torchrun started have raised it


def check(condition, line):
    """Raises UserError(line) unless the condition holds."""
    if not condition:
        raise UserError(line)


# what a field of each type is called in an error
NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
NOUNS[tuple] = "a tuple"


def check_fields(config, flag=""):
    """Checks every field of a dataclass against its annotation, which stands beside the default.

        steps: Annotated[int, 1, 10**9] = 1000        lowest and highest value, both allowed
        dtype: Annotated[str, "auto", "float32"] = "auto"        every value there is
        data: str = "data/cities"        any value of this type

    NumPy's numbers become Python's (a checkpoint holds no others), and an int becomes a float where
    a float is meant. flag: what stands before the name in the error, such as "--".
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            value = value.item()
        kind, *allowed = get_args(field.type) or [field.type]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is str and isinstance(value, os.PathLike):
            value = str(value)
        name = f"{flag}{field.name} {value}"
        check(type(value) is kind, f"{name}: give {NOUNS[kind]}")
        if kind is str and allowed:
            check(value in allowed, f"{name}: give one of {', '.join(allowed)}")
        elif allowed:
            low, high = allowed
            inside = low <= value <= high  # nan is in no range
            check(inside, f"{name}: give {NOUNS[kind]} from {low:,} to {high:,}")
        setattr(config, field.name, value)


# -- Optional packages ------------------------------------------------------------------------

# what pip calls a package where that is not the module's name
PIP_NAMES = dict(faiss="faiss-cpu")


def optional(package):
    """Imports a package that only some commands need; without it a UserError with the pip line."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise UserError(f"needed: pip install {PIP_NAMES.get(name, name)}") from None


# -- Entry points -----------------------------------------------------------------------------


def command(*words):
    """A command line of ours as a cure gives it: a path with a blank in it stays one word.

    >>> command("write.py", "--out", "my texts/bank")
    "python write.py --out 'my texts/bank'"
    """
    return shlex.join(["python", *map(str, words)])


def run(main):
    """Runs an entry point. What the user can mend is one line: UserError and Ctrl-C.

    Everything else is a bug, and keeps its traceback.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return run_quietly(main)
    name = os.path.basename(sys.argv[0])
    if hasattr(sys.stdout, "reconfigure"):
        # a terminal that cannot show a letter (LC_ALL=C) gets its code, and the command goes on
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as stop:  # a command that saves before it ends says here how to go on
        sys.exit(f"{name}: stopped {stop}".rstrip())
    except BrokenPipeError:  # whoever read its output has read enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_quietly(main):
    """Runs an entry point in a process that torchrun started and that is not the first: that one
    alone speaks.

    Its refusals are said only if the first has none. For if that ends, torchrun ends the others;
    so this one waits, each process a second longer than the one before it.
    """
    name = os.path.basename(sys.argv[0])
    seconds = 5 + int(os.environ.get("LOCAL_RANK", 0))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            main()
    except UserError as error:
        time.sleep(seconds)
        sys.exit(1 if error.everywhere else f"{name}: {error} (process {os.environ['RANK']})")
    except KeyboardInterrupt:  # of all processes alike
        time.sleep(seconds)
        sys.exit(1)
    except SystemExit:  # argparse, which all have asked the same
        time.sleep(seconds)
        raise


def visible(text):
    r"""The text without characters that control a terminal: they become their escapes.

    References come from anywhere; an escape sequence in one could clear the screen or worse.
    >>> print(visible("Kyiv\x1b[2J has\n2797553"))
    Kyiv\x1b[2J has
    2797553
    """
    shown = []
    for character in text:
        code = ord(character)
        steers = code < 32 or 127 <= code < 160
        if steers and character not in "\n\t":
            shown.append(f"\\x{code:02x}")
        elif 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:  # these turn the text around
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(character)
    return "".join(shown)


# -- Reading ----------------------------------------------------------------------------------


def read_bytes(path, cure):
    """The bytes of one of our files. UserError if it is missing, empty or may not be read."""
    path = Path(path)
    check(path.exists(), f"{path} is missing: {cure}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {cure}") from None
    check(data, f"{path} is empty: {cure}")
    return data


def read_text(path, cure):
    """The text of one of our files: UTF-8 whatever the locale, with or without a byte order mark,
    lines ending in LF or CRLF. UserError if it is missing, empty or anything else."""
    return decode(read_bytes(path, cure), path, cure)


def decode(data, path, cure):
    """The text of the bytes of `path`, as of read_text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise UserError(f"{path} is damaged: line {line} is not UTF-8: {cure}") from None
    return text.replace("\r\n", "\n")


def read_json(path, schema, cure):
    """A JSON file of ours that holds an object, as a dict.

    schema: {key: type, or tuple of types}; each key must be there, more may be. A float may be
    written as an int, an int never as true. UserError names the file, the key, and the cure.
    """
    text = read_text(path, cure)
    row = _parse_json(text, f"{path} is damaged", cure)
    return _fit_schema(row, schema, f"{path} is damaged", cure)


def read_rows(path, schema, cure):
    """One of our JSON-lines files as a list of dicts. Blank lines do not count, and a file without
    any row is refused. UserError names the line."""
    return [row for _, row in numbered_rows(path, schema, cure)]


def numbered_rows(path, schema, cure):
    """Like read_rows, with the line number of each row: [(line, row)]."""
    rows = []
    for line, text in enumerate(read_text(path, cure).split("\n"), start=1):
        if text.strip():
            where = f"{path} is damaged: line {line}"
            row = _parse_json(text, where, cure)
            rows.append((line, _fit_schema(row, schema, where, cure)))
    check(rows, f"{path} is empty: {cure}")
    return rows


def _parse_json(text, where, cure):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        why = str(error).splitlines()[0]
        raise UserError(f"{where}: no JSON ({why}): {cure}") from None


def _fit_schema(row, schema, where, cure):
    """The row, if it is an object with the keys and types of the schema."""
    check(isinstance(row, dict), f"{where}: it holds {_called(type(row))}, not an object: {cure}")
    for key, kinds in schema.items():
        check(key in row, f"{where}: it has no {key!r}: {cure}")
        if not isinstance(kinds, tuple):
            kinds = (kinds,)
        value = row[key]
        valid = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if isinstance(value, bool):  # to Python a bool is an int
            valid = bool in kinds
        requested = " or ".join(_called(kind) for kind in kinds)
        check(valid, f"{where}: {key!r} is {_called(type(value))}, not {requested}: {cure}")
    return row


def _called(kind):
    """What JSON calls a Python type."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    names |= {bool: "true or false", int: "an integer", float: "a number"}
    return names[kind]


def checksum(path, size=None):
    """The CRC-32 of a file, or of its first `size` bytes, read a block at a time."""
    size = os.path.getsize(path) if size is None else size
    crc = 0
    with open(path, "rb") as file:
        for start in range(0, size, 1 << 24):
            crc = zlib.crc32(file.read(min(1 << 24, size - start)), crc)
    return crc


def read_array(path, dtype, shape, cure):
    """An .npy file of ours, read without pickle.

    shape: one entry a dimension, None where any size will do; so (None, 512) is any number of
    rows. UserError if the file is missing, damaged, or of another type or shape.
    """
    data = read_bytes(path, cure)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python: its parser's errors, too
        why = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"{path} is damaged ({why}): {cure}") from None
    is_array = isinstance(array, np.ndarray)  # else a zip file, which np.load opens too
    valid = is_array and array.dtype == np.dtype(dtype) and array.ndim == len(shape)
    if valid:
        for size, requested in zip(array.shape, shape, strict=True):
            valid = valid and requested in (None, size)
    check(valid, f"{path} is damaged: not an array of {np.dtype(dtype)} {shape}: {cure}")
    return array


# -- Writing ----------------------------------------------------------------------------------


def replace_file(path, write):
    """Writes a file beside its place with write(file), then renames it: no file is ever half there.

    UserError if the place cannot be written to; the old file, if any, is then as it was.
    """
    tmp = f"{path}.tmp"  # one name, so that what a kill leaves is overwritten the next time
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        _remove(tmp)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    except BaseException:  # Ctrl-C, too
        _remove(tmp)
        raise


def _remove(path):
    try:
        os.remove(path)
    except OSError:
        pass  # it was never made


def write_json(path, obj):
    """Writes an object as JSON (UTF-8, one line a key), beside and renamed."""
    text = json.dumps(obj, indent=1, ensure_ascii=False) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair is no UTF-8
    replace_file(path, lambda file: file.write(data))


def write_sealed(path, obj):
    """write_json with a checksum over the object, which `read_sealed` checks: JSON with one bit
    changed is often JSON still."""
    write_json(path, dict(obj, seal=_seal(obj)))


def read_sealed(path, schema, cure):
    """read_json of what write_sealed wrote, without the checksum. UserError also if that does not
    fit."""
    row = read_json(path, schema, cure)
    seal = row.pop("seal", None)  # None: written before there were seals
    check(seal in (None, _seal(row)), f"{path} is damaged (its checksum does not fit): {cure}")
    return row


def _seal(obj):
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def make_directory(path):
    """Makes a directory and those above it; nothing happens if it is there. Returns its Path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made a directory: {error.strerror}") from None
    return Path(path)


@contextmanager
def lock(path, wait=math.inf):
    """Holds the lock of a directory, one process at a time; a process that dies gives it back.
    Waiting is said. UserError where the directory cannot be written to, or after `wait` seconds."""
    make_directory(path)
    try:
        file = open(Path(path, "lock"), "w")
    except OSError as error:
        line = f"{path} cannot be written to ({error.strerror})"
        raise UserError(f"{line}: copy it to where you may write") from None
    with file:
        began = time.monotonic()
        said = False
        while not _locked(file):
            waited = time.monotonic() - began
            line = f"{path}: another process has been working there for {wait} s"
            check(waited < wait, f"{line}: end it, or try later")
            if waited > 1 and not said:
                limit = "" if wait == math.inf else f" for up to {wait} s"
                line = f"{path}: another process is working there; waiting{limit}"
                print(line, file=sys.stderr, flush=True)
                said = True
            time.sleep(0.05)
        yield


def _locked(file):
    """Tries to get the lock of an open file; says whether it has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        line = f"{file.name}: this disk has no locks ({error.strerror})"
        print(f"{line}; let no other process work there", file=sys.stderr)
    return True


# -- The command line -------------------------------------------------------------------------


def shard(text):
    """A type for argparse: share i of n that as many processes take on.

    >>> shard("2/3")
    (2, 3)
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: give i/n with 1 <= i <= n, as 1/4")
    return int(match[1]), int(match[2])


def torchrun_share():
    """(i, n): this process is the i-th of n that torchrun has started; None without others."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ["RANK"]) + 1, size) if size > 1 else None


def number(kind, low=-math.inf, high=math.inf):
    """A type for argparse: an int or float from low to high. The refusal names the flag and both.

    >>> number(int, 1)("7")
    7
    """

    def convert(text):
        value = kind(text)
        if not (low <= value <= high and abs(value) < math.inf):  # nan is in no range
            most = "" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text}: it goes from {low}{most}")
        return value

    convert.__name__ = kind.__name__  # what argparse calls a text that is no number at all
    return convert


# -- Devices ----------------------------------------------------------------------------------


def find_device(name):
    """ "auto": CUDA where there is one. UserError for a name that PyTorch does not know."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
