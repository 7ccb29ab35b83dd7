"""Generation with memory recall (sec. 3.1), and a look at what was recalled.

    python sample.py --prompt "What is the population of Kyiv?"
    python sample.py --prompt "..." --explain --html out/memory.html     what was recalled and read
    python sample.py --prompt "What is the population of Zubrowka City?" \\
        --remember "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."
"""

import argparse
import os

import torch

import corpus
from bank import MemoryBank
from common import check, run
from generate import generate, open_model, remember
from retrieval import Random, Retriever
from views.explain import explain, page


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--prompt", required=True, help="the text to continue")
    p.add_argument("--checkpoint", default="checkpoints/toy", help="a .pt file or its directory")
    p.add_argument("--data", default="data/cities", help="the prepared data set")
    p.add_argument("--references", default="kb", help="its knowledge base")
    p.add_argument("--bank", default="out/kb.bank", help="the memories of the knowledge base")
    p.add_argument("--memory", default="bank", choices=["off", "random", "bank"])
    p.add_argument("--rag", action="store_true", help="put the references' text before the prompt")
    p.add_argument("--plain", action="store_true", help="no header (--rag has none)")
    p.add_argument("--tokens", type=int, default=32, help="how many to generate")
    p.add_argument("--stop", default=".", help='a token that ends the answer ("": none)')
    p.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    p.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest (0: all)")
    p.add_argument("--top_p", type=float, default=1.0, help="the likeliest that make up this share")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--remember", action="append", default=[], help="a text to write down first")
    p.add_argument("--explain", action="store_true", help="what was recalled, kept, attended to")
    p.add_argument("--html", default="", help="--explain, and the same as a page, token by token")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    plain, here = a.rag or a.plain, os.path.dirname(a.html) or "."
    check(not plain or a.memory != "random", "--memory random goes with neither --rag nor --plain")
    shown = a.memory != "off" and not plain or not (a.explain or a.html)
    check(shown, "--explain and --html show memories: with --memory bank or random only")
    file = not a.html or os.access(here, os.W_OK) and not os.path.isdir(a.html)
    check(file, f"--html {a.html}: give a file in a directory that can be written to")
    check(a.prompt.strip(), "--prompt is empty; give a text to continue")
    fits = a.temperature >= 0 and a.top_k >= 0 and 0 < a.top_p <= 1 and a.tokens >= 1
    check(fits, "--temperature, --top_k: from 0; --top_p: above 0, to 1; --tokens: from 1")
    model, tokenizer = open_model(a.checkpoint, a.data, a.device, a.dtype)
    c, retriever, bank = model.config, None, None
    if a.memory != "off" and not a.plain or a.rag or a.remember:
        references = corpus.References.open(f"{a.data}/{a.references}")
        bank = MemoryBank.open(a.bank, model, references)
        retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    # what is wrong with the question is said before a fact is written
    prompt, stop = tokenizer.encode(a.prompt), tokenizer.encoding.encode_ordinary(a.stop)
    check(len(stop) < 2, f"--stop {a.stop!r} is {len(stop)} tokens; it must be one")
    line = f"{1 + len(prompt)} prompt tokens and {a.tokens} new ones"
    fits = 1 + len(prompt) + a.tokens <= c.max_context
    check(fits, f"{line}; the context is at most {c.max_context}: shorten the prompt")
    for text in a.remember:
        for i in remember(text, tokenizer, c, retriever, bank):
            print(f"remembered as reference {i}")
    if a.rag:
        query = [tokenizer.bos, *prompt][-c.chunk_len :]  # as a chunk of the prompt recalls
        ids, scores = retriever.search([query], c.n_recall)
        found = [(references[int(i)], s) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0]
        for reference, score in found:
            print(f"in context: score {score:.2f}  {tokenizer.decode(reference).strip()}")
        prompt = [int(t) for reference, _ in found for t in reference] + prompt
    if plain or a.memory == "off":
        retriever = bank = None
    elif a.memory == "random":
        retriever = Random(len(references), a.seed)
    tokens = torch.tensor([[tokenizer.bos, *prompt]])
    out, trace = generate(
        model,
        tokens,
        a.tokens,
        retriever,
        bank,
        plain=plain,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        seed=a.seed,
        stop=stop[0] if stop else None,
    )
    answer = tokenizer.decode(out[0, tokens.shape[1] :])
    print(f"\n{a.prompt}\n -> {answer.strip()}\n")
    if a.explain or a.html:
        seen = model, tokenizer, references, out, trace, bank
        print("\n".join(explain(*seen)))
        if a.html:
            page(a.html, *seen)
    n, took = trace.logprobs.shape[1], trace.seconds
    each = ", ".join(f"{name} {s * 1e3:.1f}" for name, s in took.items())
    cache = f"; {bank.stats()}" if bank else ""
    print(f"{n} tokens in {sum(took.values()) * 1e3:.0f} ms: {each}{cache}")
    return answer


if __name__ == "__main__":
    run(main)
