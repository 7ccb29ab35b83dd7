"""What knowledge costs in each memory format: App. A and the storage of sec. 3.3, for any Config.

    python cost.py --preset 2.4b                          our numbers beside the paper's
    python cost.py --preset 2.4b --plot fig.png           Fig. 1.1
    python cost.py --preset 2.4b --references 1e8 --uses 100 --flops 312e12        plans a bank

    plain text  ->  explicit memory  ->  model parameters        writing dearer, reading cheaper

One piece of knowledge is a reference of ref_len tokens. Costs are FLOPs (TFlops where printed), two
per multiply-add. Counted: the matrix products. Left out, as in App. A: norms, RoPE, softmax, the
header, the masked half of causal attention, decoding the codes, retrieval, and the way from disk.
"""

import argparse
import math

from model import PRESETS, Config
from quantize import default_spec, layout

TERA = 1e12
KNOWLEDGE_BASE = 1.12e8  # references; sec. 4.4 prints 1.1e8, its bytes in sec. 3.3 need 1.12e8

# -- Compute (App. A) -------------------------------------------------------------------------

def _attention(c):  # multiply-adds of a token in a layer: W_Q W_O, W_K W_V
    return 2 * c.n_embd**2 + 2 * c.n_embd * c.head_dim * c.n_kv_head

def _mlp(c):  # gate, up, down
    return 3 * c.n_embd * c.mlp_width

def forward(c, n, head=True):
    """FLOPs of one window of n tokens through the plain decoder; head: with the LM head.
    Causal attention makes scores and weighs values: each n * n/2 pairs of d numbers."""
    body = c.n_layer * (n * (_attention(c) + _mlp(c)) + 2 * n * n / 2 * c.n_embd)
    return 2 * (body + head * n * c.vocab_size * c.n_embd)

def write_implicit(c):
    """Into parameters: a training step's share of ref_len tokens of max_context (A.1). A lower
    bound, as one step rarely teaches a fact. 3: the backward costs twice the forward."""
    return 3 * forward(c, c.max_context) * c.ref_len / c.max_context

def selection(c):
    """Choosing tokens: scores of all pairs, without a causal mask, in the memory layers (A.2)."""
    return 2 * c.n_memory_layer * c.ref_len**2 * c.n_embd

def write_explicit(c):
    """Into an explicit memory: encode the reference up to the last keys and values (A.2), one MLP
    fewer than layers. (A.2 counts W_O and causal attention of that layer; model.write skips them.)
    """
    l, Lm, d = c.ref_len, c.n_memory_layer, c.n_embd
    encode = Lm * (l * _attention(c) + 2 * l * l / 2 * d) + (Lm - 1) * l * _mlp(c)
    return 2 * encode + selection(c)

def read_explicit(c):
    """One chunk attends the S kept tokens of one memory in Lm layers (A.2)."""
    return 2 * c.n_memory_layer * 2 * c.chunk_len * c.memory_tokens * c.n_embd

def read_rag(c):
    """One reference as text in the context (A.3): encoded on the spot, attended by one chunk. A
    lower bound: later chunks and other references do not see it."""
    l, L = c.ref_len, c.n_layer
    attention = L * (l * _attention(c) + 2 * l * (l / 2 + c.chunk_len) * c.n_embd)
    return 2 * (attention + (L - 1) * l * _mlp(c))

def total_cost(c, n):
    """Eq. (1.1) for one piece of knowledge used n times: {format: write + n * read}, FLOPs.

    >>> costs = total_cost(Config(), n=100)
    >>> {name: round(x / TERA, 3) for name, x in costs.items()}
    {'plain text': 62.422, 'explicit memory': 0.323, 'model parameters': 2.239}
    """
    return {
        "plain text": n * read_rag(c),
        "explicit memory": write_explicit(c) + n * read_explicit(c),
        "model parameters": write_implicit(c),  # reading: at least 0 (A.1)
    }

def advantage_interval(c):
    """(low, high): used more than low and less than high times, knowledge is cheapest as an
    explicit memory (Fig. 1.1, A.3). Never, where low >= high.

    >>> [round(n, 3) for n in advantage_interval(Config())]
    [0.494, 13388.364]
    """
    gain = read_rag(c) - read_explicit(c)  # of each use, over text
    low = write_explicit(c) / gain if gain > 0 else math.inf
    return low, (write_implicit(c) - write_explicit(c)) / read_explicit(c)

def step_flops(c, explicit):
    """A training step on one window of max_context tokens (sec. 3.6). explicit: each chunk also
    writes a reference and reads R memories. The choice of tokens has no backward: counted once."""
    chunks = math.ceil(c.max_context / c.chunk_len)
    write = 3 * (write_explicit(c) - selection(c)) + selection(c)
    read = 3 * c.n_recall * read_explicit(c)
    return 3 * forward(c, c.max_context) + explicit * chunks * (write + read)

def reading_share(c, tokens=256):
    """(FLOPs of reading memories, of the rest) for a prompt and its answer, Remark 7.1: 128 + 128
    tokens, every chunk reads R memories that lie on disk; the LM head is not counted there."""
    chunks = math.ceil(tokens / c.chunk_len)
    return chunks * c.n_recall * read_explicit(c), forward(c, tokens, head=False)

# -- Storage (sec. 3.3) -----------------------------------------------------------------------

def memory_bytes(c, form, references=KNOWLEDGE_BASE):
    """Bytes of one reference. form: "full" = keys and values of all layers, query heads (no GQA)
    and tokens, bf16; "bf16" = the kept ones; "codes" = those by the codec that `references` of
    them can train. Without the bank's count and checksum, 5 bytes.

    >>> [memory_bytes(Config(), form) for form in ("full", "bf16", "codes")]
    [72089600, 450560, 39424]
    """
    if form == "full":
        return c.n_layer * 2 * c.n_head * c.ref_len * c.head_dim * 2
    vectors = math.prod(c.memory_shape[:-1])
    if form == "bf16":
        return vectors * c.head_dim * 2
    return vectors * layout(default_spec(c.head_dim, int(references * vectors)))[1]

def weights(c):  # with the embeddings, norms aside
    return c.n_params + c.vocab_size * c.n_embd * (1 if c.tied else 2)

def training_bytes(c):
    """Weights, gradients and AdamW's two moments, float32: what a card must hold before the first
    activation. Activations come on top, and --micro_batch makes them smaller."""
    return 16 * weights(c)

def answering_bytes(c, batch=1):
    """bf16 weights, and keys and values of max_context tokens and R memories a sequence."""
    slots = c.max_context * c.n_layer + c.n_recall * c.memory_tokens * c.n_memory_layer
    return 2 * weights(c) + batch * slots * 2 * c.n_kv_head * c.head_dim * 2

def sparsity(c, form="bf16"):
    """How many times less than "full": layers x heads x tokens = 2 * 5 * 16, then the codec."""
    return memory_bytes(c, "full") / memory_bytes(c, form)

def plan(c, references, uses, flops, utilisation):
    """A knowledge base in every format: [(format, bytes, hours to write, FLOPs in all)].

    uses: how often each reference is expected to be used; flops: the machine's peak FLOP/s, of
    which the share `utilisation` is reached. FLOPs in all: eq. (1.1), over all references.
    Raises ValueError for a number that is not positive or a share above 1."""
    given = dict(references=references, uses=uses, flops=flops, utilisation=utilisation)
    for name, x in given.items():
        if not 0 < x < math.inf or x > 1 and name == "utilisation":
            raise ValueError(f"--{name} {x:g}: give a positive number, and a share of at most 1")
    token = 2 if c.vocab_size <= 65536 else 4  # bytes of a token id, as corpus.py keeps them
    hour = 3600 * flops * utilisation  # FLOPs of an hour
    write, cost = write_explicit(c), total_cost(c, uses)

    def row(name, size, write):
        total = references * cost[name.split(",")[0]]
        return name, references * size, references * write / hour, total

    return [
        row("plain text", c.ref_len * token, 0),
        row("explicit memory, bf16", memory_bytes(c, "bf16"), write),
        row("explicit memory, codes", memory_bytes(c, "codes", references), write),
        row("model parameters", 0, write_implicit(c)),  # no bytes beyond the model's own
    ]

# -- What is printed and drawn ----------------------------------------------------------------

def table(c):
    """[(quantity, ours, the paper's printed figure or "", where in the paper)]; ours: a number."""
    (low, high), (reading, rest) = advantage_interval(c), reading_share(c)
    implicit, explicit = step_flops(c, False), step_flops(c, True)
    full, bf16, codes = (memory_bytes(c, form) for form in ("full", "bf16", "codes"))
    PIB, TIB = 2**50 / KNOWLEDGE_BASE, 2**40 / KNOWLEDGE_BASE  # the paper's "PB", "TB"
    return [
        ("non-embedding weights", c.n_params, "2.4e9", "sec. 3.4"),
        ("GiB to train, activations aside", training_bytes(c) / 2**30, "", ""),
        ("GiB to answer, bf16, batch 1", answering_bytes(c) / 2**30, "", ""),
        ("bytes a reference, all keys and values", full, "", ""),
        ("bytes a memory, bf16", bf16, "", ""),
        ("bytes a memory, codes", codes, "", ""),
        ("sparsity", sparsity(c), "160", "sec. 3.3"),
        ("sparsity with codes", sparsity(c, "codes"), "1830", "sec. 3.3"),
        ("all keys and values of 1.12e8, PiB", full / PIB, "7.17", "sec. 3.3"),
        ("all keys and values of 1.12e8, TiB", full / TIB, "7340", "sec. 3.3"),
        ("bank of 1.12e8, bf16, TiB", bf16 / TIB, "45.9", "sec. 3.3"),
        ("bank of 1.12e8, codes, TiB", codes / TIB, "4.02", "sec. 3.3"),
        ("implicit write, TFlops", write_implicit(c) / TERA, "2.24", "A.1"),
        ("explicit write, TFlops", write_explicit(c) / TERA, "0.308", "A.2"),
        ("explicit read, TFlops", read_explicit(c) / TERA, "1.44e-4", "A.2"),
        ("RAG read, TFlops", read_rag(c) / TERA, "0.624", "A.3"),
        ("explicit is cheapest from n", low, "0.494", "Fig. 1.1"),
        ("explicit is cheapest to n", high, "13400", "Fig. 1.1"),
        ("implicit step of a window, TFlops", implicit / TERA, "", ""),
        ("explicit step of a window, TFlops", explicit / TERA, "", ""),
        ("explicit over implicit step", explicit / implicit, "> 2 in time", "sec. 3.6"),
        ("reading in 256 tokens, TFlops", reading / TERA, "2.884e-3", "Remark 7.1"),
        ("all else in 256 tokens, TFlops", rest / TERA, "1.264", "Remark 7.1"),
        ("reading over all else, %", 100 * reading / rest, "0.228", "Remark 7.1"),
    ]

def plot(c, file):
    """Fig. 1.1 for this Config: total cost over the expected usage count, log-log."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    low, high = advantage_interval(c)
    left, right = (low / 50, high * 50) if low < high else (1e-3, 1e6)
    n = [left * (right / left) ** (i / 400) for i in range(401)]
    costs = [{name: x / TERA for name, x in total_cost(c, i).items()} for i in n]
    best = [min(x.values()) for x in costs]
    ax = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    for name, color in zip(costs[0], ("tab:green", "tab:red", "tab:blue"), strict=True):
        ax.loglog(n, [x[name] for x in costs], color=color, label=name, lw=2)
    bottom = min(best) / 3
    ax.fill_between(n, bottom, best, color="0.88", lw=0, label="the cheapest")
    for edge, side in ((low, "left"), (high, "right")) if low < high else ():
        ax.axvline(edge, color="0.3", ls=":", lw=1)
        ax.text(edge, bottom * 1.2, f" n = {float(f'{edge:.3g}'):,g} ", ha=side)
    ax.set(xlim=(left, right), ylim=(bottom, max(best) * 30))
    ax.set(xlabel="expected usage count n", ylabel="write + n * read, TFlops")
    ax.figure.legend(loc="outside upper center", ncols=4, frameon=False)
    ax.figure.savefig(file, dpi=150)

def main(argv=None):
    title, examples, *_ = __doc__.split("\n\n")
    form = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=title, epilog=examples, **form)
    p.add_argument("--preset", default="2.4b", help=", ".join(PRESETS) + " (default 2.4b)")
    p.add_argument("--plot", metavar="FILE", help="draws Fig. 1.1 (.png, .svg, .pdf)")
    plans = p.add_argument_group("plan a knowledge base (the first three together)").add_argument
    plans("--references", type=float, metavar="N", help="how many references, e.g. 1e6")
    plans("--uses", type=float, metavar="n", help="expected uses of each reference")
    plans("--flops", type=float, metavar="F", help="peak FLOP/s, e.g. 312e12 for an A100")
    plans("--utilisation", type=float, metavar="U", default=0.4, help="share reached (0.4)")
    a = p.parse_args(argv)
    c = Config.preset(a.preset)
    wanted, rows = [a.references, a.uses, a.flops], []
    if None not in wanted:
        rows = plan(c, *wanted, a.utilisation)
    elif wanted != [None] * 3:
        raise ValueError("a plan needs --references, --uses and --flops together")
    papers = c == Config()  # its figures are of the 2.4b only
    print(f"{a.preset}: memories {c.memory_shape}, vocabulary {c.vocab_size:,}")
    print(f"{'':38} {'ours':>13}" + "   paper         where" * papers)
    for quantity, ours, paper, where in table(c):
        number = f"{ours:,}" if isinstance(ours, int) else f"{ours:.5g}"
        print(f"{quantity:38} {number:>13}" + f"   {paper:12}  {where}" * papers)
    if rows:
        machine = f"{a.flops:.3g} FLOP/s at {a.utilisation:.0%}"
        used = f"references of {c.ref_len} tokens, each used {a.uses:g} times"
        print(f"\n{a.references:,.0f} {used}; {machine}")
        print(f"{'':24} {'GiB':>12} {'hours to write':>15} {'TFlops in all':>14}")
        for name, size, hours, flops in rows:
            print(f"{name:24} {size / 2**30:12,.6g} {hours:15,.6g} {flops / TERA:14.4g}")
        print(f"cheapest by eq. (1.1): {min(rows, key=lambda row: row[3])[0].split(',')[0]}")
    if a.plot:
        plot(c, a.plot)
        print(f"\nwritten to {a.plot}")

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        raise SystemExit(f"cost.py: {e}") from None
