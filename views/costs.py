"""What cost.py prints and draws: ours beside the paper's figures, a plan, and Fig. 1.1.

    python cost.py --preset 2.4b --plot fig.png --references 1e8 --uses 100 --flops 312e12

The numbers are formulas of cost.py. The paper printed them for its own model only, the 2.4b.
"""

import numpy as np

import cost
from common import optional
from model import Config

TERA = 1e12


def table(c):
    """[(quantity, ours, the paper's printed figure or "", where in the paper)]; ours: a number."""
    (low, high), (reading, rest) = cost.advantage_interval(c), cost.reading_share(c)
    implicit, explicit = cost.step_flops(c, False), cost.step_flops(c, True)
    full, bf16, codes = (cost.memory_bytes(c, form) for form in ("full", "bf16", "codes"))
    TIB = 2**40 / cost.KNOWLEDGE_BASE  # the paper's "TB", of one reference
    return [
        ("non-embedding weights", c.n_params, "2.4e9", "sec. 3.4"),
        ("GiB to train, activations aside", cost.training_bytes(c) / 2**30, "", ""),
        ("GiB to answer, bf16, batch 1", cost.answering_bytes(c) / 2**30, "", ""),
        ("bytes a memory, bf16", bf16, "", ""),
        ("bytes a memory, codes", codes, "", ""),
        ("sparsity", cost.sparsity(c), "160", "sec. 3.3"),
        ("sparsity with codes", cost.sparsity(c, "codes"), "1830", "sec. 3.3"),
        ("all keys and values of 1.12e8, PiB", full / TIB / 1024, "7.17", "sec. 3.3"),
        ("all keys and values of 1.12e8, TiB", full / TIB, "7340", "sec. 3.3"),
        ("bank of 1.12e8, bf16, TiB", bf16 / TIB, "45.9", "sec. 3.3"),
        ("bank of 1.12e8, codes, TiB", codes / TIB, "4.02", "sec. 3.3"),
        ("implicit write, TFlops", cost.write_implicit(c) / TERA, "2.24", "A.1"),
        ("explicit write, TFlops", cost.write_explicit(c) / TERA, "0.308", "A.2"),
        ("explicit read, TFlops", cost.read_explicit(c) / TERA, "1.44e-4", "A.2"),
        ("RAG read, TFlops", cost.read_rag(c) / TERA, "0.624", "A.3"),
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
    Figure = optional("matplotlib.figure").Figure
    n = np.geomspace(1e-2, 1e6)
    ax = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    for name, flops in cost.total_cost(c, n).items():
        ax.loglog(n, flops / TERA + 0 * n, label=name)
    low, high = cost.advantage_interval(c)
    for edge in (low, high) if low < high else ():
        ax.axvline(edge, color="0.3", ls=":", label=f"n = {float(f'{edge:.3g}'):,g}")
    ax.set(xlabel="expected usage count n", ylabel="write + n * read, TFlops")
    ax.legend()
    ax.figure.savefig(file, dpi=150)


def show(a, c, rows):
    """a: cost.py's arguments; c: their Config; rows: of cost.plan, none where none is asked for."""
    papers = c == Config()
    print(f"{a.preset}: memories {c.memory_shape}, vocabulary {c.vocab_size:,}")
    print(f"{'':38} {'ours':>13}" + "   paper         where" * papers)
    for quantity, ours, paper, where in table(c):
        number = f"{ours:,}" if isinstance(ours, int) else f"{ours:.5g}"
        print(f"{quantity:38} {number:>13}" + f"   {paper:12}  {where}" * papers)
    if rows:
        print(f"\n{a.references:,.0f} references of {c.ref_len} tokens, each used {a.uses:g} times")
        print(f"{'':24} {'GiB':>12} {'hours to write':>15} {'TFlops in all':>14}")
        for name, size, hours, flops in rows:
            print(f"{name:24} {size / 2**30:12,.6g} {hours:15,.6g} {flops / TERA:14.4g}")
        print(f"cheapest by eq. (1.1): {min(rows, key=lambda row: row[3])[0].split(',')[0]}")
    if a.plot:
        plot(c, a.plot)
        print(f"\nwritten to {a.plot}")
