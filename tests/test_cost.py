"""Every number of the paper's App. A and sec. 3.3, and the formulas against counted products."""

import doctest
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from world import World, bytes_of

import corpus
import cost
import memory
from cost import TERA
from memory import Memories
from model import Config, Memory3

PAPER = Config.preset("2.4b")

# Every size differs from every other, also d = 84 and the 8 chunks: no swapped axis can pass.
TINY = Config(
    n_layer=5,
    n_memory_layer=3,
    n_head=14,
    n_kv_head=7,
    head_dim=6,
    mlp_width=23,
    vocab_size=41,
    max_context=88,
    chunk_len=11,
    n_recall=2,
    memory_tokens=4,
    ref_len=13,
    header=(1,),
)


def printed(x, figure):
    """x rounded to as many digits as the figure shows; "2.24", "1830" (3 digits), "1.44e-4"."""
    digits = figure.split("e")[0].replace(".", "").lstrip("0")
    digits = digits.rstrip("0") if "." not in figure else digits
    return float(f"{x:.{len(digits) - 1}e}") == float(figure)


def counted(f):
    """FLOPs of the matrix products that f really runs, two per multiply-add."""
    with FlopCounterMode(display=False) as mode:
        f()
    return mode.get_total_flops()


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """The counter counts matrix products only: no fused attention, however long the text is."""
    monkeypatch.setattr(memory, "attention_path", lambda *_: ("math", "to be counted"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Memory3(TINY)


def references(n):
    return torch.randint(0, TINY.vocab_size, (n, TINY.ref_len))


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(cost)
    assert found.attempted >= 3 and not found.failed


def test_printed():
    """A helper that would call any number right."""
    assert printed(13388.4, "13400") and not printed(13388.4, "13500")
    assert printed(1.44179e-4, "1.44e-4") and not printed(1.44179e-4, "1.45e-4")
    assert printed(0.49381, "0.4938") and not printed(2.2345, "2.24")


def test_costs_of_appendix_a():
    """A lost term, a wrong factor 2 or 3, TFlops for FLOPs."""
    assert printed(cost.write_implicit(PAPER) / TERA, "2.2385")
    assert printed(cost.write_explicit(PAPER) / TERA, "0.30818")
    assert printed(cost.read_explicit(PAPER) / TERA, "1.44179e-4")
    assert printed(cost.read_rag(PAPER) / TERA, "0.62422")
    low, high = cost.advantage_interval(PAPER)
    assert printed(low, "0.4938") and printed(high, "13388")
    assert printed(low, "0.494") and printed(high, "13400")


def test_storage():
    """Decimal for binary units, key-value heads for query heads in the uncompressed size."""
    assert PAPER.n_params == 2_433_024_000
    forms = ("full", "bf16", "codes")
    full, bf16, codes = (cost.memory_bytes(PAPER, form) for form in forms)
    assert (bf16, codes) == (450_560, 39_424)
    assert cost.sparsity(PAPER) == 160 and printed(cost.sparsity(PAPER, "codes"), "1830")
    N = cost.KNOWLEDGE_BASE
    assert printed(N * bf16 / 2**40, "45.9") and printed(N * codes / 2**40, "4.02")
    assert printed(N * full / 2**50, "7.17") and printed(N * full / 2**40, "7340")


def test_remark_7_1_and_the_steps():
    """The LM head in Remark 7.1's compute, three retrievals for four chunks that read, or the
    reading counted in the compute it is compared with."""
    reading, rest = cost.reading_share(PAPER)
    assert printed(reading / TERA, "2.884e-3") and printed(rest / TERA, "1.264")
    assert printed(100 * reading / rest, "0.228")
    assert printed(cost.step_flops(PAPER, True) / cost.step_flops(PAPER, False), "1.82")


def test_table_matches_the_paper():
    """A row of the printed table beside the wrong figure."""
    rows = [r for r in cost.table(PAPER) if r[2] and r[2][0] != ">"]
    assert len(rows) == 16
    for quantity, ours, figure, _ in rows:
        assert printed(ours, figure), quantity


def test_forward_and_training_against_counted_products(model):
    """A size that is right for the paper's model only, where d = W and dh Hkv = d/5.

    What runs beyond App. A: the masked half of causal attention, as much again as the other half.
    Autograd runs two products for each of the forward's: the 3 of A.1."""
    c = TINY
    T = TINY.max_context
    tokens = torch.randint(0, c.vocab_size, (1, T))
    masked = 2 * c.n_layer * T * T * c.n_embd
    assert counted(lambda: model(tokens)) == cost.forward(c, T) + masked
    step = counted(lambda: model(tokens, tokens)[1].backward())
    assert step == cost.step_flops(c, False) + 3 * masked
    assert cost.write_implicit(c) * T / c.ref_len == pytest.approx(cost.step_flops(c, False))


def test_write_against_counted_products(model):
    """Lm MLPs for Lm - 1, the choice of tokens left out, or counted in the backward.

    What runs beyond App. A: the header (P tokens before each reference) and the masked half. What
    App. A counts and write skips: W_O and causal attention of the last memory layer."""
    c = TINY
    N = 9
    d = c.n_embd
    l = c.ref_len
    Lm = c.n_memory_layer
    P = len(c.header)
    header = 2 * (Lm * P * (2 * d * d + 2 * d * c.head_dim * c.n_kv_head))
    header += 2 * (Lm - 1) * P * 3 * d * c.mlp_width
    masked = 2 * (Lm - 1) * 2 * (P + l) ** 2 * d - 2 * (Lm - 1) * l * l * d
    last_layer = 2 * ((l + P) * d * d + l * l * d)
    encode = cost.write_explicit(c) - cost.selection(c) + header + masked - last_layer
    texts = references(N)
    assert counted(lambda: model.write(texts)) == N * (encode + cost.selection(c))
    trained = counted(lambda: model.write(texts).kv.square().sum().backward())
    assert trained == N * (3 * encode + cost.selection(c))
    later = Memory3(replace(c, memory_from=2, n_memory_layer=2))  # the same last layer but one more
    more = counted(lambda: later.write(texts)) - counted(lambda: model.write(texts))
    layer = cost.write_explicit(later.config) - cost.selection(later.config)
    layer -= cost.write_explicit(c) - cost.selection(c)
    header = 2 * P * (2 * d * d + 2 * d * c.head_dim * c.n_kv_head + 3 * d * c.mlp_width)
    masked = 2 * 2 * (P + l) ** 2 * d - 2 * l * l * d
    chosen = cost.selection(later.config) - cost.selection(c)
    assert more == N * (layer + header + masked + chosen)


def test_read_against_counted_products(model):
    """Reading that scales with the query heads, the layers or the chunk in the wrong way: exactly
    what memories add to a forward pass."""
    c = TINY
    M = 9
    tokens = torch.randint(0, c.vocab_size, (1, c.max_context))
    chunks = c.max_context // c.chunk_len
    pool = Memories(torch.randn(M, *c.memory_shape), torch.full((M,), c.memory_tokens))
    recall = torch.randint(0, M, (1, chunks, c.n_recall))
    with torch.no_grad():
        read = counted(lambda: model(tokens, memories=pool, recall=recall))
        read -= counted(lambda: model(tokens, memories=Memories.empty(c)))
    assert read == chunks * c.n_recall * cost.read_explicit(c)
    step = cost.step_flops(c, True) - cost.step_flops(c, False)
    choice = 2 * chunks * cost.selection(c)  # forward only, not thrice
    assert step == chunks * 3 * cost.write_explicit(c) - choice + 3 * read


def test_rag_against_a_plain_count():
    """The reference's own attention doubled, or the chunk's to it forgotten: the pairs of tokens
    one by one. App. A takes l^2/2 pairs for the l (l + 1)/2 of a causal mask."""
    c = TINY
    pairs = sum(1 for i in range(c.ref_len) for j in range(i + 1)) - c.ref_len / 2
    pairs += sum(1 for _ in range(c.chunk_len) for _ in range(c.ref_len))
    flops = 0
    for layer in range(c.n_layer):
        for _ in range(c.n_head):  # W_Q and W_O; then scores and values
            flops += 2 * 2 * c.ref_len * c.n_embd * c.head_dim + 2 * 2 * pairs * c.head_dim
        flops += c.n_kv_head * 2 * 2 * c.ref_len * c.n_embd * c.head_dim  # W_K and W_V
        if layer < c.n_layer - 1:  # gate, up, down
            flops += 3 * 2 * c.ref_len * c.n_embd * c.mlp_width
    assert cost.read_rag(c) == flops


def test_bytes_against_tensors():
    """A memory's size that is not its tensor's; codes of another codec than the bank's."""
    kv = torch.zeros(TINY.memory_shape, dtype=torch.bfloat16)
    assert cost.memory_bytes(TINY, "bf16") == kv.nbytes
    wide = replace(TINY, head_dim=64)  # 3 * 2 * 7 * 4 = 168 vectors a memory
    assert cost.memory_bytes(wide, "codes", 4) == 168 * (1 + 4)  # Residual2x4,PQ8x4
    assert cost.memory_bytes(wide, "codes", 1e6) == 168 * (4 + 10)  # Residual2x14,PQ8x10


def test_interval_is_where_explicit_is_cheapest():
    """The two ends exchanged, or an end where the order of formats does not change."""
    for c in (PAPER, TINY, Config.preset("toy")):
        low, high = cost.advantage_interval(c)
        for n, best in (
            (low * 0.99, "plain text"),
            (low * 1.01, "explicit memory"),
            (high * 0.99, "explicit memory"),
            (high * 1.01, "model parameters"),
        ):
            costs = cost.total_cost(c, n)
            assert min(costs, key=costs.get) == best
    never = replace(
        TINY, memory_tokens=254, mlp_width=1, n_memory_layer=5
    )  # memories larger than their texts
    low, high = cost.advantage_interval(never)
    assert low >= high


def test_plan(capsys):
    """Seconds for hours, utilisation forgotten, bytes of one reference for all."""
    flops = 312e12
    text, bf16, codes, weights = cost.plan(PAPER, 1e8, 100, flops, 0.4)
    assert [text[1], bf16[1], codes[1], weights[1]] == [256e8, 450_560e8, 39_424e8, 0]
    assert text[2] == 0 and bf16[2] == codes[2]
    assert bf16[2] * 3600 * 0.4 * flops == pytest.approx(1e8 * cost.write_explicit(PAPER))
    assert printed(bf16[3] / 1e8 / TERA, "0.3226")  # 0.30818 + 100 * 0.000144179
    for uses, best in (("0.3", "plain text"), ("7", "explicit memory"), ("2e4", "model param")):
        cost.main(["--references", "1e8", "--uses", uses, "--flops", "312e12"])
        out = capsys.readouterr().out
        assert f"cheapest by eq. (1.1): {best}" in out and "13400" in out
    cost.main(["--preset", "toy"])
    assert "paper" not in capsys.readouterr().out


def test_plan_of_training(capsys):
    """Seconds for days, the implicit stage's FLOPs in the explicit one, all GPUs' bytes on each; a
    page whose figures are no longer those of its command."""
    rows = dict(cost.cluster(PAPER, 1.1e8, 3.1e12, 1.2e11, 512, 312e12, 0.4))
    speed = 512 * 312e12 * 0.4 * 86400  # FLOPs a day
    explicit = 1.2e11 / 2048 * cost.step_flops(PAPER, True) / speed
    assert rows["days of the explicit stage"] == pytest.approx(explicit)
    assert rows["windows of a step for each GPU"] == 4
    assert rows["TB of them on each node"] * 64e12 == pytest.approx(1.1e8 * 450_560)
    one = dict(cost.cluster(PAPER, 1.1e8, 3.1e12, 1.2e11, 1, 312e12, 0.4))
    assert one["GB that each GPU receives in a pass"] == 0
    assert one["GB of weights, gradients, states on each GPU"] * 1e9 == 12 * cost.weights(PAPER)
    for name in ("write the bases, one a node", "embed and code, all nodes"):
        cores = 512 if "bases" in name else 64
        assert one[f"hours to {name}"] == pytest.approx(cores * rows[f"hours to {name}"])
    # a GPU computes its four windows; into a node come 63 of 64 parts of weights, twice, and sums
    seconds = rows["seconds that a GPU computes in a step"]
    assert seconds == pytest.approx(4 * cost.step_flops(PAPER, False) / (312e12 * 0.4))
    bits = 8 * 8 * cost.weights(PAPER) * 63 / 64
    assert rows["Gbit/s into each node, to hide behind that"] * 1e9 == pytest.approx(bits / seconds)
    assert one["Gbit/s into each node, to hide behind that"] == 0
    # a query of 1.1e8 references looks into 128 of 32,768 lists
    took = 1.2e11 / 64 * (cost.GRAPH + 1.1e8 * 128 / 32768 / cost.SCANNED) / 3600
    assert rows["hours to find the neighbours, all nodes"] * 64 * 64 == pytest.approx(took)
    # where every vector is compared, each once
    few = dict(cost.cluster(PAPER, 90_000, 3.1e12, 1.2e11, 512, 312e12, 0.4))
    took = 1.2e11 / 64 * (cost.GRAPH + 90_000 / cost.SCANNED) / 3600
    assert few["hours to find the neighbours, all nodes"] * 64 * 64 == pytest.approx(took)
    page = (Path(cost.__file__).parent / "benchmarks/scale.md").read_text()
    command = re.search(r"python cost.py (.*)", page)[1]
    cost.main(command.split())
    printed_now = capsys.readouterr().out
    shown = re.search(r"<!-- cluster -->\n```\n(.*?)\n```", page, re.S)[1]
    assert shown in printed_now and len(shown.splitlines()) == 1 + len(rows)


def test_files_of_a_base(tmp_path):
    """Files a node that the plan does not count: with codes three more."""
    place = World(tmp_path, corpus.tokenizer(str(Path(cost.__file__).parent / "data/cities")))
    assert len(bytes_of(place.bank)) == cost.BASE_FILES - 3


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--preset 7b", "argument --preset: invalid choice: '7b'"),
        ("--references 1e6 --uses 3", "together"),
        ("--references -1 --uses 3 --flops 1e12", "argument --references: -1"),
        ("--references 5 --uses nan --flops 1e12", "argument --uses: nan"),
        ("--references 5 --uses 3 --flops inf", "argument --flops: inf"),
        ("--references 5 --uses 3 --flops 1e12 --utilisation 40", "--utilisation: 40"),
        ("--plot noext", "--plot noext: give a file that ends in .png, .svg, .pdf"),
        ("--plot fig.docx", "ends in .png"),
        ("--plot nowhere/fig.png", "there is no directory nowhere"),
        ("--plot out.png/", "there is no directory|ends in .png|is a directory"),
    ],
)
def test_bad_input_is_one_line(flags, words, capsys, tmp_path, monkeypatch):
    """A traceback, an endless number, half a table before the complaint, a picture under another
    name than the one that is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.png").mkdir()
    with pytest.raises((ValueError, SystemExit)) as e:
        cost.main(flags.split())
    printed = capsys.readouterr()
    said = printed.err if isinstance(e.value, SystemExit) else str(e.value)
    assert re.search(words, said) and "\n" not in said.split("error:")[-1].strip()
    assert not printed.out


def test_plan_refuses_what_is_no_number():
    """A plan of nothing, or of more than the machine has, called from Python."""
    for given, words in [
        ((-1, 3, 1e12, 0.4), "--references -1"),
        ((5, float("nan"), 1e12, 0.4), "--uses nan"),
        ((5, 3, float("inf"), 0.4), "--flops inf"),
        ((5, 3, 1e12, 40), "at most 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            cost.plan(PAPER, *given)


def test_plot(tmp_path, monkeypatch):
    """An empty or missing picture; a traceback where matplotlib is not installed."""
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match="pip install matplotlib"):
            cost.plot(PAPER, tmp_path / "fig.png")
    pytest.importorskip("matplotlib")
    for c in (
        PAPER,
        replace(TINY, memory_tokens=254, mlp_width=1, n_memory_layer=5),
    ):  # the second has no interval
        cost.plot(c, tmp_path / "fig.png")
        assert (tmp_path / "fig.png").read_bytes()[:4] == b"\x89PNG"


def test_heads_that_keep_no_memories_cost_nothing():
    """Catches bytes and FLOPs of all heads where a quarter of them keep memories."""
    toy = Config.preset("toy")  # 4 layers of 4 heads
    quarter = Config.preset("toy", memory_heads="3.0,3.1,3.2,0.3")
    for form in ("bf16", "codes"):
        assert 4 * cost.memory_bytes(quarter, form, 1e6) == cost.memory_bytes(toy, form, 1e6)
    assert 4 * cost.read_explicit(quarter) == cost.read_explicit(toy)
    assert cost.write_explicit(quarter) == cost.write_explicit(toy)
