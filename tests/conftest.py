"""What the tests share: the repository's root on the path, one tiny model, and kernels.cu compiled
for the CPU.

All sizes of the tiny model are distinct and most are odd, so that a swapped axis cannot pass.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Sizes are tiny: threads would only wait for each other. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
import model as model_module  # noqa: E402

# of a model that writes, in the tests of what is done with its memories
SHAPE = dict(
    n_layer=3,
    n_memory_layer=2,
    n_head=6,
    n_kv_head=3,
    head_dim=10,
    mlp_width=22,
)

TINY = dict(
    n_layer=4,
    n_memory_layer=3,
    n_head=6,
    n_kv_head=2,
    head_dim=10,
    mlp_width=34,
    vocab_size=97,
    max_context=90,
    chunk_len=7,
    n_recall=4,
    memory_tokens=5,
    ref_len=13,
    header=(96, 94, 93),
)


@pytest.fixture
def config():
    return model_module.Config(**TINY)


@pytest.fixture
def build():
    """build(**changes) -> a seeded tiny model, in float64 so that equality means equality."""

    def make(dtype=torch.float64, seed=3, scale=7.0, **changes):
        torch.manual_seed(seed)
        model = model_module.Memory3(model_module.Config(**{**TINY, **changes})).to(dtype)
        with torch.no_grad():  # initial weights attend almost evenly, initial norms are all 1
            for p in model.parameters():
                p.mul_(scale) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        return model

    return make


@pytest.fixture
def references():
    """references(lengths, width) -> (N, width) random tokens below 90, padded with -1."""

    def make(lengths, width=None, seed=5):
        g = torch.Generator().manual_seed(seed)
        rows = torch.full((len(lengths), width or max(lengths)), -1)
        for row, n in zip(rows, lengths, strict=True):
            row[:n] = torch.randint(0, 90, (n,), generator=g)
        return rows

    return make


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(source) -> the library of the source, or of kernels.cu, for the CPU: cuda_on_cpu.h
    plays the GPU, and misaligned loads and wrong indices are errors. Each is compiled once."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels for the CPU with")
    folder, header = tmp_path_factory.mktemp("kernels"), ROOT / "tests/cuda_on_cpu.h"
    flags = "-x c++ -O1 -fno-strict-aliasing -shared -fPIC -fsanitize=alignment,bounds"
    flags += f" -fsanitize-undefined-trap-on-error -include {header}"

    def make(source=ROOT / "kernels.cu"):
        library = folder / f"{source.stem}.so"
        if not library.exists():
            subprocess.run(["g++", *flags.split(), source, "-o", library], check=True)
        return library

    return make


@pytest.fixture
def emulator(compiled, monkeypatch):
    """kernels.cu behind the operators on the CPU, for one test: its library."""
    monkeypatch.delenv("MEMORY3_KERNELS", raising=False)
    for name in ("libraries", "reasons"):
        monkeypatch.setattr(kernels, name, dict(getattr(kernels, name)))
    kernels.load(compiled())
    yield kernels.libraries["cpu"]
    kernels.libraries["cpu"].emulator_reverse(0)
