"""experiments/speculate.py: which tokens query early, and what counts as found."""

import doctest
import json

import numpy as np
import pytest
from test_text import C, T, world  # noqa: F401  (a fixture)

from experiments import speculate
from retrieval import Retriever


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(speculate)
    assert found.attempted == 2 and not found.failed


def test_found_early_counts_what_the_complete_chunk_finds():
    """What the early query found alone counted as found, "none" taken for a memory, a chunk that
    finds nothing at all counted."""
    final = np.array([[3, 1, -1], [5, 6, 7], [-1, -1, -1], [2, 4, 8]])
    early = np.array([[1, 3, 9], [7, 0, 5], [-1, -1, -1], [-1, -1, -1]])
    assert speculate.found_early(early, final) == (pytest.approx((1 + 2 / 3 + 0) / 3), 1 / 3)


def test_main(world, tmp_path, capsys):  # noqa: F811
    """Queries of another chunk, or of the tokens that are still to come."""
    flags = ["--data", world.data, "--split", "said", "--chunk_len", C, "--n_recall", 3]
    flags += ["--ahead", 5, 1, 16, "--fill", "", "--json", tmp_path / "out.json"]
    result = speculate.main([str(x) for x in flags])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    tokens = np.fromfile(world.data / "said.bin", np.uint16)
    n_chunks = len(tokens) // C
    assert result["chunks"] == n_chunks - 1 and n_chunks > 2 * T // C
    retriever = Retriever.open(f"{world.data}/kb.index")
    for row in result["rows"]:
        shares = []
        for chunk in range(1, n_chunks):
            end = (chunk + 1) * C
            ids = retriever.search([tokens[end - C : end].tolist()], 3)[0][0]
            early = tokens[end - C - row["ahead"] : end - row["ahead"]].tolist()
            shares.append(len(set(ids) & set(retriever.search([early], 3)[0][0])) / 3)
        assert row["found"] == pytest.approx(np.mean(shares))
    assert [row["ahead"] for row in result["rows"]] == [1, 5, 16]
    assert "| 16 |" in capsys.readouterr().out
    # what fills chunks up says nothing: with it or without it, the same is found
    fill = retriever.tokenizer.encode("\n")
    assert len(fill) == 1 and fill[0] not in tokens
    filled = np.insert(tokens, np.arange(C - 3, len(tokens), C - 3), fill[0])
    filled.tofile(world.data / "said.bin")
    shown = [str(x) for x in flags]
    shown[shown.index("--fill") + 1] = "\n"
    assert speculate.main(shown)["rows"] == result["rows"]
    for wrong in (["--ahead", "17"], ["--split", "unsaid"], ["--references", "none"]):
        with pytest.raises(ValueError):
            speculate.main([*map(str, flags), *wrong])
