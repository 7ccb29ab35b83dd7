"""What knowledge costs in each memory format: App. A and the storage of sec. 3.3, for any Config.

    python cost.py --preset 2.4b                          our numbers beside the paper's
    python cost.py --preset 2.4b --plot fig.png           Fig. 1.1
    python cost.py --preset 2.4b --references 1e8 --uses 100 --flops 312e12        plans a bank

One piece of knowledge is a reference of ref_len tokens. Costs are FLOPs, two per multiply-add, of
matrix products. Not counted, as in App. A: norms, RoPE, softmax, the header, the masked half of
causal attention, decoding the codes, retrieval, and the way from disk.
"""

import argparse
import math

from common import check, run
from model import PRESETS, Config
from quantize import default_spec, layout

KNOWLEDGE_BASE = 1.12e8  # references; sec. 4.4 prints 1.1e8, its bytes in sec. 3.3 need 1.12e8

# -- Compute (App. A) -------------------------------------------------------------------------


def forward(c, n, head=True):
    """One window of n tokens through the plain decoder; head: with the LM head."""
    attention = c.n_layer * 2 * (n * n / 2) * c.n_embd  # scores, values: causal pairs of d numbers
    return 2 * (n * c.n_params + attention + head * n * c.vocab_size * c.n_embd)


def write_implicit(c):
    """Into parameters: ref_len tokens in one training step, which rarely teaches a fact (A.1)."""
    return 3 * forward(c, c.max_context) * c.ref_len / c.max_context  # backward: 2 forward


def selection(c):
    """Choosing tokens: scores of all pairs, without a causal mask, in the memory layers (A.2)."""
    return 2 * c.n_memory_layer * c.ref_len**2 * c.n_embd


def write_explicit(c):
    """Into an explicit memory: encode the reference up to the last keys and values, one MLP fewer
    than layers (A.2, which counts that layer's W_O and attention; model.write skips them)."""
    return _encode(c, c.n_memory_layer, c.ref_len / 2) + selection(c)


def _encode(c, layers, span):  # the last layer has no MLP; a token attends `span` on average
    weights = layers * c.n_params / c.n_layer - 3 * c.n_embd * c.mlp_width  # gate, up, down
    return 2 * c.ref_len * (weights + layers * 2 * span * c.n_embd)  # 2 * span: scores and values


def read_explicit(c):
    """One chunk attends the S kept tokens of one memory in Lm layers (A.2)."""
    return 2 * c.n_memory_layer * 2 * c.chunk_len * c.memory_tokens * c.n_embd


def read_rag(c):
    """One reference as text in the context, encoded there, and attended by one chunk only (A.3)."""
    return _encode(c, c.n_layer, c.ref_len / 2 + c.chunk_len)


def total_cost(c, n):
    """Eq. (1.1) for one piece of knowledge used n times: {format: write + n * read}, FLOPs.

    >>> costs = total_cost(Config(), n=100)
    >>> {name: round(x / 1e12, 3) for name, x in costs.items()}
    {'plain text': 62.422, 'explicit memory': 0.323, 'model parameters': 2.239}
    """
    text, explicit = n * read_rag(c), write_explicit(c) + n * read_explicit(c)
    implicit = write_implicit(c)  # reading: at least 0 (A.1)
    return {"plain text": text, "explicit memory": explicit, "model parameters": implicit}


def advantage_interval(c):
    """(low, high): explicit memory is cheapest for low < n < high uses, if any (Fig. 1.1, A.3).

    >>> [round(n, 3) for n in advantage_interval(Config())]
    [0.494, 13388.364]
    """
    gain = read_rag(c) - read_explicit(c)  # of each use, over text
    low = write_explicit(c) / gain if gain > 0 else math.inf
    return low, (write_implicit(c) - write_explicit(c)) / read_explicit(c)


def step_flops(c, explicit, tokens=None):
    """A window's training step; explicit: each chunk also writes one memory, reads R (sec. 3.6)."""
    tokens = tokens or c.max_context
    trained = write_explicit(c) - selection(c) + c.n_recall * read_explicit(c)  # of each chunk
    chunks = explicit * math.ceil(tokens / c.chunk_len)
    return 3 * forward(c, tokens) + chunks * (3 * trained + selection(c))  # chosen: no backward


def reading_share(c, tokens=256):
    """(FLOPs of reading memories, of all else but the LM head) in 128 + 128 tokens (Remark 7.1)."""
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
    every, kept = c.n_layer * 2 * c.n_head * c.ref_len, math.prod(c.memory_shape[:-1])  # vectors
    code = layout(default_spec(c.head_dim, int(references * kept)))[1]  # bytes of one
    return dict(full=2 * every * c.head_dim, bf16=2 * kept * c.head_dim, codes=kept * code)[form]


def sparsity(c, form="bf16"):
    """How many times less than "full": layers x heads x tokens = 2 * 5 * 16, then the codec."""
    return memory_bytes(c, "full") / memory_bytes(c, form)


def weights(c):  # with the embeddings, norms aside
    return c.n_params + c.vocab_size * c.n_embd * (1 if c.tied else 2)


def training_bytes(c):  # weights, gradients, AdamW's moments in float32; activations on top
    return 16 * weights(c)


def answering_bytes(c):
    """bf16 weights, and the keys and values of max_context tokens and R memories (batch 1)."""
    slots = c.max_context * c.n_layer + c.n_recall * c.memory_tokens * c.n_memory_layer
    return 2 * weights(c) + slots * 2 * c.n_kv_head * c.head_dim * 2


def plan(c, references, uses, flops, utilisation):
    """A knowledge base in every format: [(format, bytes, hours to write, FLOPs in all)]. uses: of
    each reference; flops: FLOP/s at the machine's peak; utilisation: the share of it reached."""
    given = dict(references=references, uses=uses, flops=flops, utilisation=utilisation)
    for name, x in given.items():
        fits = 0 < x < math.inf and (x <= 1 or name != "utilisation")
        check(fits, f"--{name} {x:g}: give a positive number, and a share of at most 1")
    size = {  # bytes of a reference
        "plain text": c.ref_len * (2 if c.vocab_size <= 65536 else 4),  # as corpus.py keeps ids
        "explicit memory, bf16": memory_bytes(c, "bf16"),
        "explicit memory, codes": memory_bytes(c, "codes", references),
        "model parameters": 0,  # none beyond the model's own
    }
    write, total = total_cost(c, 0), total_cost(c, uses)  # FLOPs of a reference
    N, hour, forms = references, 3600 * flops * utilisation, [(x, x.split(",")[0]) for x in size]
    return [(x, N * size[x], N * write[form] / hour, N * total[form]) for x, form in forms]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", default="2.4b", help=", ".join(PRESETS) + " (default 2.4b)")
    p.add_argument("--plot", metavar="FILE", help="draws Fig. 1.1 (.png, .svg, .pdf)")
    p.add_argument("--references", type=float, metavar="N", help="plan: how many, e.g. 1e6")
    p.add_argument("--uses", type=float, metavar="n", help="plan: expected uses of each")
    p.add_argument("--flops", type=float, metavar="F", help="plan: FLOP/s; A100: 312e12")
    p.add_argument("--utilisation", type=float, default=0.4, help="plan: share of it reached (0.4)")
    a = p.parse_args(argv)
    c, wanted = Config.preset(a.preset), [a.references, a.uses, a.flops]
    check(wanted.count(None) in (0, 3), "a plan needs --references, --uses and --flops together")
    from views import costs  # it imports this file

    costs.show(a, c, [] if None in wanted else plan(c, *wanted, a.utilisation))


if __name__ == "__main__":
    run(main)
