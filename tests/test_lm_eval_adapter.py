"""The adapter to lm-evaluation-harness: text cut anywhere scores as the whole, and no request ends
the whole evaluation. Without the harness a stand-in has its interface."""

import importlib
import importlib.metadata
import json
import math
import sys
import types

import pytest
import torch
from conftest import ROOT
from world import PLACES, World, text_of

import corpus
from experiments import choices
from generate import likelihood
from memory import Memories
from retrieval import Filtered

QUESTION = "What is the population of Belholm?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tok = corpus.tokenizer(ROOT / "data/cities")
    return World(tmp_path_factory.mktemp("harness") / "world", tok)


def installed():
    try:
        return bool(importlib.metadata.version("lm_eval"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def adapter():
    """The module, with the harness or with what of it the adapter calls."""
    if installed():
        yield importlib.import_module("experiments.lm_eval_adapter")
        return
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {})
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda kind: kind
    yield importlib.import_module("experiments.lm_eval_adapter")
    for name in (*names, "experiments.lm_eval_adapter"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(adapter, world):
    flags = dict(checkpoint=str(world.checkpoint), data=str(world.data), device="cpu")
    return adapter.Memory3LM(bank=str(world.bank), **flags)


@pytest.fixture(scope="module")
def bare(adapter, world):
    return adapter.Memory3LM(checkpoint=str(world.checkpoint), data=str(world.data), device="cpu")


def request(*args, doc=None):
    return types.SimpleNamespace(args=args, doc=doc)


def test_a_text_cut_anywhere_scores_as_the_whole(bare, world):
    """Context and continuation encoded apart: a space at the wrong side of the cut, or a cut within
    a word, asks for tokens that no text has."""
    context = f"{QUESTION} Belholm has"
    answer = " 4052 people."
    (whole,) = bare.loglikelihood([request(context, answer)])
    before = [world.tok.bos, *world.tok.encode(context)]
    pair = (before, world.tok.encode(context + answer)[len(before) - 1 :])
    with_header = Memories.empty(bare.model.config)
    assert whole == pytest.approx(likelihood(bare.model, [pair], with_header)[0])
    text = context + answer
    (moved,) = bare.loglikelihood([request(context + " ", answer[1:])])
    assert moved == pytest.approx(whole)
    spaced = bare.loglikelihood([request(context + "  ", answer[1:])])
    assert spaced == bare.loglikelihood([request(context, " " + answer)])
    # the tokens are those of the whole text; the first that says something of the continuation,
    # and all after it, are scored
    tokens = world.tok.encode(text)
    lead = len(world.tok.decode(tokens)) - len(text)  # a space that the tokenizer puts in front
    ends = [len(world.tok.decode(tokens[:n])) - lead for n in range(1, len(tokens) + 1)]
    for cut in range(len(text) + 1):
        before, after = adapter_split(bare, text[:cut], text[cut:])
        assert before + after == tokens
        inside = sum(
            end <= len(text[:cut].rstrip()) for end in ends
        )  # tokens that are the context's alone
        assert len(before) <= inside and (len(before) == inside or text[cut - 1] not in " .?")
        if cut % 7 == 0:
            pair = ([world.tok.bos, *before], after)
            want = likelihood(bare.model, [pair], with_header)[0]
            assert bare.loglikelihood([request(text[:cut], text[cut:])])[0] == pytest.approx(want)


def adapter_split(lm, context, continuation):
    return sys.modules[type(lm).__module__].split_tokens(lm.tokenizer, context, continuation)


def test_odd_requests_do_not_end_the_evaluation(bare, model, world):
    """A continuation as long as the context, whose negative slice keeps everything; nothing at all;
    a context beyond the window."""
    cfg = bare.model.config
    words = text_of(5) * 40
    assert len(world.tok.encode(words)) > 3 * cfg.max_context
    for lm in (bare, model):
        for context, continuation in [
            ("", words),
            (QUESTION, words),
            (words, " 4052"),
            (words, words),
            ("", "4052"),
            (QUESTION, ""),
            ("", ""),
            ("???", "\n"),
            (" ", " "),
        ]:
            logp, greedy = lm.loglikelihood([request(context, continuation)])[0]
            assert math.isfinite(logp) and isinstance(greedy, bool)
            assert (logp < 0) == (continuation.strip() != "" or continuation == "\n" or logp < 0)
        assert lm.loglikelihood([request(QUESTION, "")]) == [(0.0, True)]
        rolled = lm.loglikelihood_rolling([request(words), request(""), request("\n")])
        assert rolled[0] < -100 and rolled[1] == 0 and math.isfinite(rolled[2])
    # exactly as long as fits: the last token is predicted and not read
    tokens = world.tok.encode(words)[: cfg.max_context]
    text = world.tok.decode(tokens)
    assert world.tok.encode(text) == tokens
    (got,) = bare.loglikelihood([request("", text)])
    pair = ([world.tok.bos], tokens)
    assert got == pytest.approx(likelihood(bare.model, [pair], Memories.empty(cfg))[0])


def test_generate_until(adapter, bare, model, world, monkeypatch):
    """The next text glued to the answer; until empty, missing or None; no tokens asked for; an
    option that is ignored."""
    ask = f"{QUESTION} "
    full = bare.generate_until([request(ask, dict(until=[], max_gen_toks=7))])[0]
    assert len(world.tok.encode(full)) >= 1
    for until in (None, "", [""], [], [None], ["never said"]):
        how = dict(until=until, max_gen_toks=7)
        assert bare.generate_until([request(ask, how)]) == [full], until
    assert bare.generate_until([request(ask, dict(max_gen_toks=7))]) == [full]
    cut = full[len(full) // 2]
    how = dict(until=["never said", cut], max_gen_toks=7, do_sample=False, temperature=0.0)
    assert bare.generate_until([request(ask, how)]) == [full.split(cut)[0]]
    assert bare.generate_until([request(ask, dict(until=cut, max_gen_toks=0))]) == [""]
    said = torch.tensor([[*world.tok.encode("Kyiv"), world.tok.bos, 305, 307]])

    def say_two_texts(model, tokens, *rest, **how):
        return torch.cat([tokens, said], 1), None

    monkeypatch.setattr(adapter, "generate", say_two_texts)
    assert bare.generate_until([request(ask, how)]) == [world.tok.decode(world.tok.encode("Kyiv"))]
    monkeypatch.undo()
    for prompt in ("", text_of(3) * 40, "\n"):
        for lm in (bare, model):
            (said,) = lm.generate_until([request(prompt, dict(until=["."], max_gen_toks=10**6))])
            assert "." not in said
    for how, words in [
        (dict(do_sample=True), "do_sample"),
        (dict(temperature=0.7), "temperature"),
        (dict(num_beams=4), "num_beams"),
        (dict(top_p=0.5), "top_p"),
        (dict(max_gen_toks=-1), "max_gen_toks -1"),
        (dict(max_gen_toks="x"), "max_gen_toks x: an integer from 0"),
        (dict(max_gen_toks=True), "max_gen_toks True: an integer from 0"),
        (dict(until=5), "until 5: a text, or a list of texts"),
        (dict(until=[".", 5]), "a text, or a list of texts"),
    ]:
        with pytest.raises(ValueError, match=words):
            bare.generate_until([request(ask, dict(until=["."])), request(ask, how)])


def test_memories_are_recalled_by_the_question(adapter, model, world, monkeypatch):
    """Solved examples that crowd the question out of the query, or a question of another item."""
    asked = []
    search = model.retriever.search
    monkeypatch.setattr(model.retriever, "search", lambda q, k: asked.append(q) or search(q, k))
    shots = f"Which country is {PLACES[4]}holm in? Yes.\n" * 3
    for doc, by in [
        (dict(question=QUESTION), QUESTION),
        (dict(query=QUESTION, label=3), QUESTION),
        (dict(question=f"  {QUESTION}\n"), QUESTION),
        (dict(question="Of another item?"), None),  # it does not stand in the context
        (dict(question=7), None),
        (dict(), None),
        (None, None),
        ("text", None),
    ]:
        asked.clear()
        model.loglikelihood([request(shots + QUESTION, " 4052", doc=doc)])
        query = world.tok.encode(by) if by else world.tok.encode(shots + QUESTION)[-16:]
        assert asked == [[query]], doc
    assert adapter.question_of(dict(question=QUESTION), shots) is None
    # an Instance of another kind, without a doc
    model.loglikelihood([types.SimpleNamespace(args=(QUESTION, " 4052"))])


def test_lm_evaluation_harness(world, tmp_path):
    """An adapter that the harness cannot call: a task of local files, with the accuracy of ours."""
    if not installed():
        pytest.skip("no lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from experiments.lm_eval_adapter import Memory3LM

    rows = []
    for i in range(9):
        name = PLACES[i] + "holm"
        said = [f"{name} has {1013 * (i + 3 + k)} people." for k in range(2 + i % 3)]
        right = said.pop(0)
        said.insert(i % (len(said) + 1), right)
        question = f"What is the population of {name}?"
        rows.append(dict(question=question, choices=said, answer=said.index(right)))
    file = tmp_path / "local.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "places.yaml").write_text(
        f"task: places\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {file}\n  cache_dir: {tmp_path}/cache\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc_norm\n"
    )
    flags = dict(checkpoint=str(world.checkpoint), data=str(world.data), device="cpu")
    retriever, bank = world.open()
    finder = Filtered(retriever, bank.references)
    ours = choices.answer(world.model, world.tok, choices.load(file), [], finder, bank)
    for more, condition in (({}, "none"), (dict(bank=str(world.bank)), "recalled")):
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        lm = Memory3LM(**flags, **more)
        result = simple_evaluate(lm, tasks=["places"], task_manager=tasks, bootstrap_iters=0)
        theirs = result["results"]["places"]["acc_norm,none"]
        assert theirs == pytest.approx(sum(ours[condition]) / 9)
