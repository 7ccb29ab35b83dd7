"""What knowledge costs in each memory format: App. A and the storage of sec. 3.3, for any Config.

    python cost.py --preset 2.4b                          our numbers beside the paper's
    python cost.py --preset 2.4b --plot fig.png           Fig. 1.1
    python cost.py --preset 2.4b --references 1e8 --uses 100 --flops 312e12        plans a bank
    ... --gpus 512 --tokens 3.1e12 --explicit_tokens 1.2e11        training (benchmarks/scale.md)

One piece of knowledge is a reference of ref_len tokens. Costs are FLOPs, two per multiply-add, of
matrix products. Not counted, as in App. A: norms, RoPE, softmax, the header, the masked half of
causal attention, decoding the codes, retrieval, and the way from disk.
"""

import argparse
import math
from pathlib import Path

import numpy as np

import index
from common import check, number, optional, run
from model import PRESETS, Config
from quantize import default_spec, layout

TERA = 1e12
KNOWLEDGE_BASE = 1.12e8  # references; sec. 4.4 prints 1.1e8, its bytes in sec. 3.3 need 1.12e8

# -- Compute (App. A) -------------------------------------------------------------------------


def forward(c, n, head=True):
    """One window of n tokens through the plain decoder; head: with the LM head."""
    products = n * c.n_params
    products += c.n_layer * 2 * (n * n / 2) * c.n_head * c.head_dim  # scores, values: causal pairs
    if head:
        products += n * c.vocab_size * c.n_embd
    return 2 * products


def write_implicit(c):
    """Into parameters: ref_len tokens of a training step (A.1), which rarely teaches a fact."""
    return 3 * forward(c, c.max_context) * c.ref_len / c.max_context  # backward: 2 forward


def selection(c):
    """Choosing tokens: scores of all pairs, without a causal mask, in the memory layers (A.2)."""
    return 2 * c.n_memory_layer * c.ref_len**2 * c.n_head * c.head_dim


def write_explicit(c):
    """Into an explicit memory: encode the reference up to the last keys and values, one MLP fewer
    than layers (A.2, which counts that layer's W_O and attention; model.write skips them)."""
    return _encode(c, c.memory_layers.stop, c.ref_len / 2) + selection(c)


def _encode(c, layers, span):  # the last layer has no MLP; a token attends `span` on average
    weights = layers * c.n_params / c.n_layer - 3 * c.n_embd * c.mlp_width  # gate, up, down
    scores_and_values = 2 * span * c.n_head * c.head_dim
    return 2 * c.ref_len * (weights + layers * scores_and_values)


def read_explicit(c):
    """One chunk attends the S kept tokens of one memory in Lm layers (A.2). If only some heads keep
    memories (Config.memory_heads), only their query heads read them."""
    keys = math.prod(c.record_shape[:-1]) // 2  # Lm * Hkv * S
    group = c.n_head // c.n_kv_head  # query heads that read each of them
    return 2 * 2 * c.chunk_len * keys * group * c.head_dim


def read_rag(c):
    """One reference as text in the context, encoded there, and attended by one chunk only (A.3)."""
    return _encode(c, c.n_layer, c.ref_len / 2 + c.chunk_len)


def total_cost(c, n):
    """Eq. (1.1) for one piece of knowledge used n times: {format: write + n * read}, FLOPs.

    >>> costs = total_cost(Config(), n=100)
    >>> {name: round(x / 1e12, 3) for name, x in costs.items()}
    {'plain text': 62.422, 'explicit memory': 0.323, 'model parameters': 2.239}
    """
    return {
        "plain text": n * read_rag(c),  # writing costs nothing
        "explicit memory": write_explicit(c) + n * read_explicit(c),
        "model parameters": write_implicit(c),  # reading: at least 0 (A.1)
    }


def advantage_interval(c):
    """(low, high): explicit memory is cheapest for low < n < high uses, if any (Fig. 1.1, A.3).

    >>> [round(n, 3) for n in advantage_interval(Config())]
    [0.494, 13388.364]
    """
    gain = read_rag(c) - read_explicit(c)  # of each use, over text
    low = write_explicit(c) / gain if gain > 0 else math.inf
    high = (write_implicit(c) - write_explicit(c)) / read_explicit(c)
    return low, high


def step_flops(c, explicit, tokens=None):
    """A training step on one window. explicit: each chunk also writes one memory and reads R (sec.
    3.6)."""
    tokens = tokens or c.max_context
    plain = 3 * forward(c, tokens)  # the backward pass is two forward passes
    if not explicit:
        return plain
    trained = write_explicit(c) - selection(c) + c.n_recall * read_explicit(c)
    chunk = 3 * trained + selection(c)  # the choice of tokens has no backward pass
    return plain + math.ceil(tokens / c.chunk_len) * chunk


def reading_share(c, tokens=256):
    """(FLOPs of reading memories, of all else but the LM head) in 128 + 128 tokens (Remark 7.1)."""
    chunks = math.ceil(tokens / c.chunk_len)
    reading = chunks * c.n_recall * read_explicit(c)
    return reading, forward(c, tokens, head=False)


# -- Storage (sec. 3.3) -----------------------------------------------------------------------


def memory_bytes(c, form, references=KNOWLEDGE_BASE):
    """Bytes of one reference. form: "full" = keys and values of all layers, query heads (no GQA)
    and tokens, bf16; "bf16" = the kept ones; "codes" = those by the codec that `references` of
    them can train. The count and checksum of a record, 8 bytes, are left out.

    >>> [memory_bytes(Config(), form) for form in ("full", "bf16", "codes")]
    [72089600, 450560, 39424]
    """
    kept = math.prod(c.record_shape[:-1])  # vectors in a memory
    if form == "full":
        every = c.n_layer * 2 * c.n_head * c.ref_len  # vectors before anything is left out
        return every * c.head_dim * 2
    if form == "bf16":
        return kept * c.head_dim * 2
    check(form == "codes", f"form {form!r}: full, bf16 or codes")
    spec = default_spec(c.head_dim, int(references * kept))
    return kept * layout(spec)[1]  # bytes of one vector's code


def sparsity(c, form="bf16"):
    """How many times smaller than "full": layers x heads x tokens = 2 * 5 * 16, then the codec."""
    return memory_bytes(c, "full") / memory_bytes(c, form)


def weights(c):  # with the embeddings, norms aside
    matrices = 1 if c.tied else 2  # embedding, LM head
    return c.n_params + matrices * c.vocab_size * c.n_embd


def training_bytes(c):  # weights, gradients, AdamW's moments in float32; activations on top
    return 16 * weights(c)


def answering_bytes(c):
    """bf16 weights, and the keys and values of max_context tokens and R memories (batch 1)."""
    tokens = c.max_context * c.n_layer + c.n_recall * c.memory_tokens * c.n_memory_layer
    keys_values = tokens * 2 * c.n_kv_head * c.head_dim
    return 2 * weights(c) + 2 * keys_values


# -- A plan for a knowledge base --------------------------------------------------------------


def plan(c, references, uses, flops, utilisation):
    """A knowledge base in every format: [(format, bytes, hours to write, FLOPs in all)].

    uses: of each reference; flops: FLOP/s at the machine's peak; utilisation: the share of it that
    is reached. UserError unless all are positive numbers and the share is at most 1."""
    given = dict(references=references, uses=uses, flops=flops, utilisation=utilisation)
    for name, x in given.items():
        check(0 < x < math.inf, f"--{name} {x:g}: give a positive number")
    check(utilisation <= 1, f"--utilisation {utilisation:g}: give a share of at most 1")
    bytes_per_token = 2 if c.vocab_size <= 65536 else 4  # as corpus.py keeps ids
    sizes = {  # bytes of a reference
        "plain text": c.ref_len * bytes_per_token,
        "explicit memory, bf16": memory_bytes(c, "bf16"),
        "explicit memory, codes": memory_bytes(c, "codes", references),
        "model parameters": 0,  # none beyond the model's own
    }
    write = total_cost(c, 0)  # FLOPs of a reference
    total = total_cost(c, uses)
    rows = []
    for form, size in sizes.items():
        name = form.split(",")[0]  # the two explicit ones cost the same
        seconds = references * write[name] / (flops * utilisation)
        rows.append((form, references * size, seconds / 3600, references * total[name]))
    return rows


# -- A plan for training on many GPUs ----------------------------------------------------------

STEP_TOKENS = 2**22  # sec. 5.1: "around 4 million" of a step
NODE = 8  # GPUs
CORES = 64  # of a node
# What one core of an AMD EPYC does in a second, measured by experiments/index_at_size.py (a million
# references) and benchmarks/embedding.py
MULTIPLICATIONS = 5e10  # where lists are learnt and found
EMBEDDED = 12_000  # references of 80 words, hashed
SCANNED = 2e7  # product codes of 128 bytes, compared with the queries of a batch
# seconds that a query takes to find its lists by a graph: what a query takes with one beyond what
# it takes without (experiments/README.md), and comparing 4,096 centroids
GRAPH = 1.4e-4


def cluster(c, references, tokens, explicit_tokens, gpus, flops, utilisation):
    """Both stages, index, neighbours and banks on `gpus` GPUs, in nodes of 8: [(quantity, number)].

    flops: FLOP/s of one GPU at its peak; utilisation: the share of it that is reached. Weights in
    bfloat16, sharded over all GPUs (train.py --parallel fsdp --param_dtype bfloat16). Each node
    writes a base of its own, of its share of the references.
    """
    second = flops * utilisation  # FLOPs of a GPU
    hour = 3600 * gpus * second  # of all
    nodes = math.ceil(gpus / NODE)
    windows = STEP_TOKENS / c.max_context
    step = step_flops(c, explicit=False)
    implicit = tokens / c.max_context * step
    explicit = explicit_tokens / c.max_context * step_flops(c, explicit=True)
    # gathered in bfloat16 for forward and backward; gradients are added in float32
    received = (2 + 2 + 4) * weights(c) * (1 - 1 / gpus)
    computing = windows / gpus * step / second  # seconds of a step
    # into a node comes what its GPUs do not have among them, once: they pass it on to each other
    into_node = (2 + 2 + 4) * weights(c) * (1 - min(NODE, gpus) / gpus)
    bank = references * memory_bytes(c, "bf16")
    codes = references * memory_bytes(c, "codes", references)
    return [
        ("windows of a step", windows),
        ("windows of a step for each GPU", windows / gpus),
        ("references of a step for each GPU", windows / gpus * c.max_context / c.chunk_len),
        ("GB of weights, gradients, states on each GPU", 12 * weights(c) / gpus / 1e9),
        ("GB that each GPU receives in a pass", received / 1e9),
        ("seconds that a GPU computes in a step", computing),
        ("Gbit/s into each node, to hide behind that", 8 * into_node / computing / 1e9),
        ("GB of a checkpoint, last.pt", 10 * weights(c) / 1e9),
        ("days of the implicit stage", implicit / hour / 24),
        ("days of the explicit stage", explicit / hour / 24),
        *index_rows(c, int(references), explicit_tokens, nodes),
        ("hours to write the bases, one a node", references * write_explicit(c) / hour),
        ("TB of their memories, bf16", bank / 1e12),
        ("TB of them on each node", bank / nodes / 1e12),
        ("TB of their memories, codes", codes / 1e12),
        ("TB of those on each node", codes / nodes / 1e12),
        ("files of each base", BASE_FILES),
    ]


# texts.sqlite, memories.bin, meta.json, tokenizer.json and a lock; of the index index.faiss,
# embedder.npy, meta.json and a lock; of the codes codes.bin, codec.faiss and codec.npz
BASE_FILES = 5 + 4 + 3


def index_rows(c, references, explicit_tokens, nodes):
    """What `cluster` says of the index of the references, and of the neighbours it is made for."""
    factory = index.choose_factory(references)
    empty = index.empty_index(factory, 512)
    takes = index.predict(references, empty)
    cores = nodes * CORES
    coding = references / EMBEDDED + takes.coding / MULTIPLICATIONS  # seconds of a core
    chunks = explicit_tokens / c.chunk_len
    searching = chunks * (GRAPH + index.scanned(references, empty) / SCANNED)
    return [
        (f"GB of the index, {factory}", takes.size / 1e9),
        ("GB of RAM while it is made", takes.peak / 1e9),
        ("hours to learn its lists, one node", takes.training / MULTIPLICATIONS / CORES / 3600),
        ("hours to embed and code, all nodes", coding / cores / 3600),
        ("files of its shards, for each node", 2 * CORES),
        ("hours to find the neighbours, all nodes", searching / cores / 3600),
        ("GB of the neighbours, one a chunk", 4 * chunks / 1e9),
    ]


# -- The table, Fig. 1.1 ----------------------------------------------------------------------


def table(c):
    """[(quantity, ours, the paper's printed figure or "", where in the paper)]; ours: a number.

    The paper printed its figures for its own model only, the 2.4b."""
    low, high = advantage_interval(c)
    reading, rest = reading_share(c)
    implicit = step_flops(c, explicit=False)
    explicit = step_flops(c, explicit=True)
    full = memory_bytes(c, "full")
    bf16 = memory_bytes(c, "bf16")
    codes = memory_bytes(c, "codes")
    tib = 2**40 / KNOWLEDGE_BASE  # the paper's "TB", of one reference
    return [
        ("non-embedding weights", c.n_params, "2.4e9", "sec. 3.4"),
        ("GiB to train, activations aside", training_bytes(c) / 2**30, "", ""),
        ("GiB to answer, bf16, batch 1", answering_bytes(c) / 2**30, "", ""),
        ("bytes a memory, bf16", bf16, "", ""),
        ("bytes a memory, codes", codes, "", ""),
        ("sparsity", sparsity(c), "160", "sec. 3.3"),
        ("sparsity with codes", sparsity(c, "codes"), "1830", "sec. 3.3"),
        ("all keys and values of 1.12e8, PiB", full / tib / 1024, "7.17", "sec. 3.3"),
        ("all keys and values of 1.12e8, TiB", full / tib, "7340", "sec. 3.3"),
        ("bank of 1.12e8, bf16, TiB", bf16 / tib, "45.9", "sec. 3.3"),
        ("bank of 1.12e8, codes, TiB", codes / tib, "4.02", "sec. 3.3"),
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


def show_table(c):
    """Prints the table; the paper's columns only for the paper's model."""
    with_paper = c == Config()
    line = f"{'':38} {'ours':>13}"
    if with_paper:
        line += "   paper         where"
    print(line)
    for quantity, ours, paper, where in table(c):
        shown = f"{ours:,}" if isinstance(ours, int) else f"{ours:.5g}"
        line = f"{quantity:38} {shown:>13}"
        if with_paper:
            line += f"   {paper:12}  {where}"
        print(line)


def show_plan(c, references, uses, rows):
    print(f"\n{references:,.0f} references of {c.ref_len} tokens, each used {uses:g} times")
    print(f"{'':24} {'GiB':>12} {'hours to write':>15} {'TFlops in all':>14}")
    for form, size, hours, flops in rows:
        gib = size / 2**30
        tflops = flops / TERA
        print(f"{form:24} {gib:12,.6g} {hours:15,.6g} {tflops:14.4g}")
    cheapest, *_ = min(rows, key=flops_of)
    name = cheapest.split(",")[0]
    print(f"cheapest by eq. (1.1): {name}")


def show_cluster(gpus, rows):
    print(f"\n{gpus:,} GPUs in {math.ceil(gpus / NODE):,} nodes")
    for quantity, number_of_it in rows:
        print(f"{quantity:46} {number_of_it:12,.5g}")


def flops_of(row):
    return row[3]


def plot(c, file):
    """Fig. 1.1 for this Config: total cost over the expected usage count, log-log."""
    Figure = optional("matplotlib.figure").Figure
    n = np.geomspace(1e-2, 1e6)
    ax = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    for name, flops in total_cost(c, n).items():
        ax.loglog(n, np.broadcast_to(flops / TERA, n.shape), label=name)
    low, high = advantage_interval(c)
    if low < high:
        for edge in (low, high):
            ax.axvline(edge, color="0.3", ls=":", label=f"n = {float(f'{edge:.3g}'):,g}")
    ax.set(xlabel="expected usage count n", ylabel="write + n * read, TFlops")
    ax.legend()
    ax.figure.savefig(file, dpi=150)


PICTURES = (".png", ".svg", ".pdf")


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    positive = number(float, 1e-300)
    p.add_argument("--preset", default="2.4b", choices=list(PRESETS), help="which shape")
    p.add_argument("--plot", metavar="FILE", help="draws Fig. 1.1 (.png, .svg, .pdf)")
    p.add_argument("--references", type=positive, metavar="N", help="plan: how many, e.g. 1e6")
    p.add_argument("--uses", type=positive, metavar="n", help="plan: expected uses of each")
    p.add_argument("--flops", type=positive, metavar="F", help="plan: FLOP/s; A100: 312e12")
    p.add_argument("--gpus", type=number(int, 1), metavar="N", help="plan of training: how many")
    p.add_argument("--tokens", type=positive, default=3.1e12, help="of the implicit stage")
    p.add_argument("--explicit_tokens", type=positive, default=1.2e11, help="of the explicit stage")
    share = number(float, 1e-300, 1)
    p.add_argument("--utilisation", type=share, default=0.4, help="plan: share of it reached")
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    c = Config.preset(a.preset)
    asked = [a.references, a.uses, a.flops]
    missing = asked.count(None)
    check(missing in (0, 3), "a plan needs --references, --uses and --flops together")
    if a.plot:
        kind = Path(a.plot).suffix
        check(kind in PICTURES, f"--plot {a.plot}: give a file that ends in {', '.join(PICTURES)}")
        folder = Path(a.plot).parent
        check(folder.is_dir(), f"--plot {a.plot}: there is no directory {folder}")
        check(not Path(a.plot).is_dir(), f"--plot {a.plot} is a directory: give a file")
    print(f"{a.preset}: memories {c.memory_shape}, vocabulary {c.vocab_size:,}")
    show_table(c)
    if not missing:
        rows = plan(c, a.references, a.uses, a.flops, a.utilisation)
        show_plan(c, a.references, a.uses, rows)
    if a.gpus:
        check(not missing, "--gpus: give --references, --uses and --flops with it")
        sizes = (a.references, a.tokens, a.explicit_tokens, a.gpus)
        show_cluster(a.gpus, cluster(c, *sizes, a.flops, a.utilisation))
    if a.plot:
        plot(c, a.plot)
        print(f"\nwritten to {a.plot}")


if __name__ == "__main__":
    run(main)
