"""What every file needs: refusals in one line, optional packages, whole files, devices.

check(condition, line)      every refusal: one line that names the file or flag and the cure
check_fields(config)        every field of a dataclass within the range of its annotation
optional(package)           a package that only some commands need
replace_file, write_json    written beside and renamed: a kill leaves the old file
find_device(name)           "auto": CUDA where there is one
run(main)                   an entry point: a UserError is one line, a bug keeps its traceback
"""

import importlib
import json
import math
import os
import sys
from dataclasses import fields
from typing import get_args

import numpy as np
import torch


class UserError(ValueError):
    """What the user gave cannot be used: its text is one line that names it and the cure."""


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
            inside = math.isfinite(value) and low <= value <= high
            check(inside, f"{name}: give {NOUNS[kind]} from {low:,} to {high:,}")
        setattr(config, field.name, value)


# what pip calls a package where it has another name than the module
PIP_NAMES = dict(faiss="faiss-cpu")


def optional(package):
    """Imports a package that only some commands need; without it a UserError with the pip line."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise UserError(f"needed: pip install {PIP_NAMES.get(name, name)}") from None


def run(main):
    """Runs an entry point. What the user can mend is one line: UserError and Ctrl-C.

    Everything else is a bug, and keeps its traceback.
    """
    command = os.path.basename(sys.argv[0])
    try:
        main()
    except UserError as error:
        sys.exit(f"{command}: {error}")
    except KeyboardInterrupt as stop:  # a command that saves before it ends says here how to go on
        sys.exit(f"{command}: stopped {stop}".rstrip())


def replace_file(path, write, tmp=None):
    """Writes a file beside its place with write(file), then renames it: never a half file."""
    tmp = tmp or f"{path}.tmp"
    with open(tmp, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_json(path, obj):
    text = json.dumps(obj, indent=1) + "\n"
    replace_file(path, lambda f: f.write(text.encode()))


def find_device(name):
    """ "auto": CUDA where there is one. UserError for a name that PyTorch does not know."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
