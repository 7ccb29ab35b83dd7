"""The view into memory: shares of attention, kept tokens, what a reference is worth, the page."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from world import Bank, World, bytes_of, prompt_of, some_tokens, text_of

import corpus
import generate as generation
import sample
from generate import generate, pool_of
from memory import Memories
from model import apply_rope, rope_table
from retrieval import Given, Random
from views.explain import attention_shares, explain, marked, page, pieces, view, worth

ROOT = Path(corpus.__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(ROOT / "data/cities")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tok):
    return World(tmp_path_factory.mktemp("views") / "world", tok)


@pytest.fixture
def bank(build, references):
    with torch.no_grad():
        return Bank(build().write(references([1 + (5 * i) % 13 for i in range(19)], 13)))


@pytest.mark.parametrize("memory_from, heads", [(0, "all"), (1, "all"), (0, "0.1,1.0,2.0,2.1")])
def test_attention_shares(build, bank, memory_from, heads):
    """Shares of the first layers where others have the memories, of heads that keep none, or of
    another network than the one that answers: every layer is recomputed here by a loop over tokens,
    from the hidden states of model.forward itself."""
    model = build(memory_from=memory_from, memory_heads=heads)
    tokens = some_tokens(2, 17)
    c = model.config
    T = 17
    P = 3
    table = torch.tensor(
        [
            [[3, 0, 8, -1], [5, -1, 1, 2], [4, 18, 6, 7]],
            [[-1, -1, -1, -1], [9, 10, 11, 12], [3, 3, -1, 0]],
        ]
    )
    states = []
    hooks = [
        block.norm1.register_forward_hook(lambda m, i, o: states.append(o.detach()))
        for block in model.blocks
    ]
    model(tokens, memories=bank.memories, recall=table)
    for hook in hooks:
        hook.remove()
    shares = attention_shares(model, tokens, bank.memories, table)
    assert shares.shape == (3, 2, 6, T, 4)
    where = torch.tensor([*range(P), *(P + 13 + t for t in range(T))])
    cos, sin = rope_table(where, c)
    kv = bank.memories.kv
    count = bank.memories.count
    want = torch.zeros_like(shares)
    for l in range(3):
        q, k, _ = (
            x.detach() for x in model.blocks[l + memory_from].attn.project(states[l + memory_from])
        )
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        for b in range(2):
            for h in range(6):
                for t in range(T):
                    mine = q[b, h, P + t] / math.sqrt(c.head_dim)
                    own = (k[b, h // 3, : P + t + 1] @ mine).exp().sum()
                    each = torch.zeros(4, dtype=torch.float64)
                    for r, i in enumerate(table[b, t // 7].tolist()):
                        if i >= 0 and (heads == "all" or f"{l}.{h // 3}" in heads):
                            each[r] = (kv[i, l, 0, h // 3, : count[i]] @ mine).exp().sum()
                    want[l, b, h, t] = each / (own + each.sum())  # with the rest they sum to 1
    torch.testing.assert_close(shares, want, atol=1e-9, rtol=0)
    read = table[:, torch.arange(T) // 7] >= 0  # (B, T, R)
    if heads == "all":
        assert torch.equal((shares > 0).all(2).all(0), read)
    assert (shares.sum(-1) < 1).all()
    nothing = attention_shares(model, tokens, Memories.empty(c), torch.full_like(table, -1))
    assert torch.equal(nothing, torch.zeros_like(nothing)) and nothing.shape == shares.shape


def test_marked(tok):
    """Counts at the wrong token; characters of several tokens torn into question marks."""
    reference = np.array(tok.encode("Oulu has 20 people."))
    texts = [tok.decode([t]) for t in reference]
    assert texts[-3:] == [" 20", " people", "."]
    n = len(reference)
    kept = np.bincount([0, n - 3, n - 3, n - 3, n - 3], minlength=n)
    assert (
        marked(tok, reference, kept)
        == "".join(texts[:-3]).strip().replace(texts[0].strip(), texts[0].strip() + "₁", 1)
        + " 20₄ people."
    )
    assert marked(tok, reference[-1:], [12]) == ".₁₂"
    ids = np.array(tok.encode("東京 has 7"))
    assert len(ids) > 5 and marked(tok, ids, np.zeros(len(ids), int)) == "東京 has 7"


def test_explain(world):
    """Shares of another sequence, chunks that claim the memories of the next one."""
    retriever, bank = world.open()
    # one full chunk: the chunk after it inherits its memories
    tokens = torch.cat([prompt_of(world, text_of(i))[:, :16] for i in (4, 5)])
    out, trace = generate(world.model, tokens, 20, retriever, bank)
    lines = explain(world.model, world.tok, bank.references, out, trace, bank)
    text = "\n".join(lines)
    starts = [i for i, line in enumerate(lines) if line.startswith("chunk ")]
    assert len(starts) == 3 and [r["chunk"] for r in trace.recalls] == [0, 2]
    assert "recalled by" in lines[1] and "Eldholm" in lines[1] and "Fenholm" not in lines[1]
    assert "still reads" in lines[starts[1] + 1] and "recalled by" in lines[starts[2] + 1]
    shown = [int(i) for i in re.findall(r"reference (\d+)", text)]
    assert shown == trace.table(3)[0].ravel().tolist()
    pool, table = pool_of(bank, trace.table(3), world.model)
    shares = attention_shares(world.model, out, pool, table)
    want = shares[:, 0, :, :16].mean((0, 1, 2))  # of chunk 0, each memory
    said = [float(s) for s in re.findall(r"attention ([\d.]+)%", text)][:3]
    assert said == pytest.approx((100 * want).tolist(), abs=0.06)
    scores = [float(s) for s in re.findall(r"score (-?[\d.]+)", text)]
    assert scores[:3] == pytest.approx(trace.recalls[0]["scores"][0].tolist(), abs=0.006)
    kept = re.sub("[₀-₉]", "", lines[3]).strip()
    assert kept == text_of(shown[0]) and re.search("[₀-₉]", lines[3])


class Replay:
    """Recalls prescribed ids, query after query."""

    def __init__(self, rows):
        self.rows = list(rows)

    def search(self, queries, k):
        now = self.rows[: len(queries)]
        self.rows = self.rows[len(queries) :]
        return np.array(now), np.zeros((len(queries), k))


def test_worth(build, bank):
    """Another memory left out than the one that is named, all chunks of it at once, or a
    probability read one token too early: each is generated again without it."""
    model = build()
    tokens = some_tokens(1, 17)
    forced = some_tokens(1, 15, seed=4)
    rows = [[3, 0, 8, 4], [5, -1, 1, 2], [4, 18, 6, 7], [9, 3, 11, -1], [2, 2, 14, 16]]
    out, trace = generate(model, tokens, 15, Replay(rows), bank, forced=forced)
    assert trace.table(5)[0].tolist() == rows
    pool, table = pool_of(bank, trace.table(5), model)
    gains, whole, nothing = worth(model, out, 17, pool, table)
    assert gains.shape == (5, 4, 15)
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, trace.logprobs[0], **close)
    none = generate(model, tokens, 15, Replay([[-1] * 4] * 5), bank, forced=forced)[1]
    torch.testing.assert_close(nothing, none.logprobs[0], **close)
    for chunk in range(5):
        for slot in range(4):
            without = [list(row) for row in rows]
            without[chunk][slot] = -1
            again = generate(model, tokens, 15, Replay(without), bank, forced=forced)[1]
            want = trace.logprobs[0] - again.logprobs[0]
            torch.testing.assert_close(gains[chunk, slot], want, **close)
            assert (gains[chunk, slot].abs().max() > 1e-3) == (rows[chunk][slot] >= 0)


def test_pieces(tok):
    """Question marks for the halves of a letter, or a letter that goes missing."""
    ids = tok.encode("In 東京, Kraków")
    texts = pieces(tok, ids)
    assert len(texts) == len(ids) and "".join(texts) == " In 東京, Kraków"
    assert "" in texts and "東" in "".join(texts[:-1])
    at = texts.index("京")
    cut = pieces(tok, ids[:at])  # ends within a letter
    assert "".join(cut) == " In 東" and cut[-1] == ""
    torn = pieces(tok, [*ids[:at], *tok.encode("So")])  # a letter that never ends
    assert "".join(torn) == " In 東 So"
    assert pieces(tok, [tok.bos, tok.n_vocab + 5, ids[0]]) == ["<s>", "", texts[0]]


@pytest.fixture(scope="module")
def seen(world):
    """What view() takes: 46 tokens of two sequences in three chunks; one recall finds only two."""
    retriever, memories = world.open()
    tokens = torch.cat([prompt_of(world, text_of(i))[:, :16] for i in (4, 5)])
    rows = [[3, -1, 8], [1, 5, 9], [-1, 7, 7], [0, 2, 4]]
    out, trace = generate(world.model, tokens, 30, Replay(rows), memories)
    assert [r["chunk"] for r in trace.recalls] == [0, 2]
    return world.model, world.tok, memories.references, out, trace, memories


def test_view(seen):
    """Shares of a neighbour's tokens, or of slot 1 where slot 1 was empty; rests that would not
    fill up to 1; counts of other heads; a worth that is another chunk's."""
    model, tok, references, out, trace, memories = seen
    c = model.config
    shown = json.loads(json.dumps(view(*seen)))
    assert (shown["layers"], shown["heads"], shown["keepers"]) == (2, 6, 4)
    said = "".join(shown["pieces"]).replace("<s>", "")
    assert said == tok.decode(out[0]).replace("\ufffd", "") and shown["n_prompt"] == 16
    assert [(k["start"], k["end"]) for k in shown["chunks"]] == [(0, 16), (16, 32), (32, 46)]
    assert [[r["id"] for r in k["reads"]] for k in shown["chunks"]] == [[3, 8], [3, 8], [7, 7]]
    assert shown["chunks"][1]["query"] is None and shown["chunks"][0]["query"] in text_of(4)
    assert {*shown["references"]} == {"3", "7", "8"}
    pool, table = pool_of(memories, trace.table(3)[:1], model)
    shares = attention_shares(model, out[:1], pool, table)[:, 0]  # (Lm, H, T, R)
    gains, whole, nothing = worth(model, out[:1], 16, pool, table)
    slots = [[0, 2], [0, 2], [1, 2]]
    for i, chunk in enumerate(shown["chunks"]):
        for slot, read in zip(slots[i], chunk["reads"], strict=True):
            assert len(read["shares"]) == chunk["end"] - chunk["start"]
            for t, mine in enumerate(read["shares"], chunk["start"]):
                want = 1000 * shares[:, :, t, slot].flatten()
                assert mine == pytest.approx(want.tolist(), abs=0.51) and len(mine) == 12
            assert read["gains"] == pytest.approx(gains[i, slot].tolist(), abs=6e-4)
    every = [np.array(read["shares"]) for read in shown["chunks"][2]["reads"]]
    assert (sum(every) <= 1001).all() and (sum(every) > 0).all()  # the rest is what is left of 1
    assert shown["whole"] == pytest.approx(trace.logprobs[0].tolist(), abs=1e-3)
    assert shown["nothing"] == pytest.approx(nothing.tolist(), abs=6e-4)
    for i, reference in shown["references"].items():
        ids = references[int(i)]
        kept = model.write(torch.from_numpy(ids)[None], return_indices=True)[1][0]
        assert "".join(reference["pieces"]) == tok.decode(ids)
        for n, count in enumerate(reference["kept"]):
            assert count == sum(n in kept[l, h].tolist() for l in range(2) for h in range(2))
        assert sum(reference["kept"]) == 2 * 2 * c.memory_tokens


def data_of(path):
    inside = re.search('id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1]
    return json.loads(inside)


HOSTILE = "</script><b>Zub</b><!-- 東"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tok):
    """A page of five chunks whose reference and prompt try to break it, and its path."""
    root = tmp_path_factory.mktemp("hostile")
    w = World(root / "world", tok)
    retriever, memories = w.open()
    (i,) = generation.remember(HOSTILE, tok, w.model.config, retriever, memories)
    prompt = prompt_of(w, HOSTILE + '\n{{data}} \u2028 \\ " &lt; How many people?')
    out, trace = generate(w.model, prompt, 35, retriever, memories)
    assert i in trace.recalls[0]["ids"][0]
    page(root / "page.html", w.model, tok, memories.references, out, trace, memories)
    return root / "page.html", i


def test_page_is_one_file_that_texts_cannot_break(hostile):
    """A reference that closes the script and goes on as HTML; a page that fetches something."""
    path, i = hostile
    text = path.read_text(encoding="utf-8")
    template = ROOT / "views/memory.html"
    assert "".join(data_of(path)["references"][str(i)]["pieces"]).strip() == HOSTILE
    for tag in ("</script>", "<b>", "<!--"):
        assert text.count(tag) == template.read_text().count(tag), tag
    assert not re.search(r"\b(src|href)=(?!\"data:)|url\(|@import|fetch\(|https?:", text)
    assert len(data_of(path)["chunks"]) >= 4


PROBE = """<script>
document.documentElement.style.width = "360px"  // a window cannot be as narrow as a phone
const say = [], of = (at, q) => [...at.querySelectorAll(q)]
for (const section of of(document, "section")) {
  const tokens = of(section, ".token"), row = {tokens: tokens.map(e => e.textContent)}
  row.roles = tokens.map(e => e.classList.contains("answer"))
  row.cards = of(section, ".card").map(e => e.textContent)
  row.kept = of(section, ".card").map(e => of(e, ".kept").map(k => Number(k.dataset.n ?? 0)))
  const sums = () => of(section, ".share").map(e => parseFloat(e.textContent))
  row.mean = sums()
  tokens[0].focus()
  const key = k => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", {key: k, bubbles: true}))
  key("End")
  row.selected = of(section, "[aria-selected=true]").map(e => tokens.indexOf(e))
  row.readout = section.querySelector(".readout").textContent
  row.last = sums()
  tokens[1].click()
  row.clicked = of(section, "[aria-selected=true]").map(e => tokens.indexOf(e))
  key("Escape")
  row.escaped = of(section, "[aria-selected=true]").length
  const cell = section.querySelector(".grid i")
  cell.onclick()
  row.cell = section.querySelector(".cell").textContent
  say.push(row)
}
document.body.append(Object.assign(document.createElement("pre"), {id: "said", textContent:
  JSON.stringify({rows: say, failed, state: document.documentElement.dataset.state,
    right: Math.max(...of(document, "main *").map(e => e.getBoundingClientRect().right))})}))
</script></body>"""


def opened(path, tmp_path):
    """What PROBE finds in the page after its script ran in Chromium, on 360 pixels."""
    catch = "<script>const failed = []; onerror = e => { failed.push(String(e)) }</script>"
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + catch, 1)
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
        --disable-background-networking --disable-component-update --window-size=500,800"""
    flags = [*flags.split(), f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom"]
    run = [CHROMIUM, *flags, (tmp_path / "probed.html").as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=300).stdout
    return json.loads(html.unescape(re.search('<pre id="said">(.*?)</pre>', dom, re.S)[1]))


browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH")


@browser
def test_page_in_chromium(hostile, tmp_path):
    """A page that stays empty, throws, shows another token's shares, loses the keyboard, or is
    wider than a phone."""
    path, i = hostile
    data = data_of(path)
    said = opened(path, tmp_path)
    assert said["failed"] == [] and said["state"] == "drawn"
    assert 300 < said["right"] <= 360
    assert len(said["rows"]) == len(data["chunks"])
    for row, chunk in zip(said["rows"], data["chunks"], strict=True):
        texts = data["pieces"]
        start = chunk["start"]
        end = chunk["end"]
        want = [texts[t].strip(" ").replace("\n", "\u21b5\n") for t in range(start, end)]
        for mine, text in zip(row["tokens"], want, strict=True):
            assert mine == (text or mine) and (text or set(mine) <= {"\u00b7", "\u2423"})
        assert row["roles"] == [t >= data["n_prompt"] for t in range(start, end)]
        # shares of the last token: of each reference and the rest, together all of it
        for shown, at in ((row["last"], [-1]), (row["mean"], range(end - start))):
            mean = [np.mean([r["shares"][t] for t in at]) / 10 for r in chunk["reads"]]
            assert shown == pytest.approx([*mean, 100 - sum(mean)], abs=0.06)
        assert row["selected"] == [end - start - 1] and row["clicked"] == [1]
        assert row["escaped"] == 0 and row["cell"].startswith("A: layer 0, head 0: ")
        assert f"token {end - 1} " in row["readout"]
        k = end - 1 - data["n_prompt"]
        assert k < 0 or f"probability {math.exp(data['whole'][k]):.3f}" in row["readout"]
        for card, kept, read in zip(row["cards"], row["kept"], chunk["reads"], strict=True):
            gain = sum(read["gains"])
            assert f"reference {read['id']}score" in card and f"{abs(gain):.2f}" in card
            assert kept == data["references"][str(read["id"])]["kept"]
            assert read["id"] != i or "</script><b>Zub</b>" in card


@browser
def test_page_where_nothing_was_found(world, tmp_path):
    """A division by no references, or a page that says nothing."""
    _, memories = world.open()
    out, trace = generate(world.model, prompt_of(world, "Bazq?"), 9, Given([[-1]]), memories)
    page(tmp_path / "page.html", world.model, world.tok, memories.references, out, trace, memories)
    (row,) = opened(tmp_path / "page.html", tmp_path)["rows"]
    assert row["cards"] == [] and row["mean"] == row["last"] == [100.0]
    assert row["cell"] == "rest: layer 0, head 0: 100.0 %"


def test_random_memories_are_shown_too(world, tmp_path):
    """A page that only knows what a search has found: scores of 0, one reference twice."""
    _, memories = world.open()
    tokens = prompt_of(world, text_of(2))
    path = tmp_path / "page.html"
    out, trace = generate(world.model, tokens, 20, Random(17, seed=3), memories)
    page(path, world.model, world.tok, memories.references, out, trace, memories)
    shown = [[read["id"] for read in chunk["reads"]] for chunk in data_of(path)["chunks"]]
    assert shown == trace.table(len(shown))[0].tolist()


def test_main_html(world, tmp_path, capsys):
    """A flag that needs another and does not say so; an answer given, and then no page; a fact
    written although the page cannot be."""
    path = tmp_path / "page.html"
    said = sample.main(world.args(html=path))
    printed = capsys.readouterr().out
    assert "recalled by" in printed and f"written to {path}" in printed
    data = data_of(path)
    assert "".join(data["pieces"][data["n_prompt"] :]) == said.replace("\ufffd", "")
    assert sample.main(world.args(html=path, memory="random"))  # over the old one
    assert data_of(path) != data and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    before = bytes_of(world.data.parent)
    told = ("--remember", "Bazq has 7 people.")
    for args, line in [
        (("--html", tmp_path / "nowhere/page.html", *told), "page.html: give a file in a dir"),
        (("--html", tmp_path, *told), "give a file in a dir"),
        (("--html", path, "--plain", *told), "--html show memories"),
        (("--explain", "--rag", *told), "--html show memories"),
        (("--html", path, "--memory", "off", *told), "--html show memories"),
    ]:
        with pytest.raises(ValueError, match=line) as e:
            sample.main(world.args(*map(str, args)))
        assert "\n" not in str(e.value)
    assert bytes_of(world.data.parent) == before
