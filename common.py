"""What every file needs: refusals in one line, optional packages, whole files, devices.

check(condition, line)      every refusal: one line that names the file or flag and the cure
optional(package)           a package that only some commands need
replace_file, write_json    written beside and renamed: a kill leaves the old file
find_device(name)           "auto": CUDA where there is one
run(main)                   an entry point: a UserError is one line, a bug keeps its traceback
"""

import importlib
import json
import os
import sys

import torch


class UserError(ValueError):
    """What the user gave cannot be used: its text is one line that names it and the cure."""


def check(condition, line):
    """Raises UserError(line) unless the condition holds."""
    if not condition:
        raise UserError(line)


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
    except KeyboardInterrupt:
        sys.exit(f"{command}: stopped")


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
