"""Generation with memory recall (sec. 3.1), and a look at what was recalled.

    python sample.py --prompt "What is the population of Rivello?"
    python sample.py --prompt "..." --explain --html out/memory.html     what was recalled and read
    python sample.py --prompt "..." --cold_start --bank out/cold.bank    writes memories on recall
    python sample.py --prompt "What is the population of Zubrowka City?" \\
        --remember "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."
"""

import argparse
import os

import torch

from common import check, number, run, visible
from generate import (
    check_fits,
    generate,
    in_context,
    model_flags,
    open_memory,
    open_model,
    remember,
)
from retrieval import Random
from views.explain import explain, page


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    share = number(float, 1e-9, 1)
    p.add_argument("--prompt", required=True, help="the text to continue")
    p.add_argument("--tokens", type=number(int, 1), default=32, help="how many to generate")
    p.add_argument("--stop", default=".", help='a token that ends the answer; "": none')
    p.add_argument(
        "--temperature", type=number(float, 0), default=0.0, help="0: always the likeliest token"
    )
    p.add_argument(
        "--top_k", type=number(int, 0), default=0, help="sample from the k likeliest tokens; 0: all"
    )
    p.add_argument(
        "--top_p", type=share, default=1.0, help="sample from the likeliest tokens of this total p"
    )
    p.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the random numbers"
    )
    p.add_argument(
        "--memory", default="bank", choices=["off", "random", "bank"], help="what is recalled"
    )
    p.add_argument("--rag", action="store_true", help="put the references' text before the prompt")
    p.add_argument("--plain", action="store_true", help="no header (--rag has none)")
    p.add_argument(
        "--remember", action="append", default=[], help="write this text into the bank first"
    )
    p.add_argument(
        "--cold_start",
        action="store_true",
        help="without a bank: write a memory when it is first recalled",
    )
    p.add_argument(
        "--explain", action="store_true", help="show what was recalled, kept and attended to"
    )
    p.add_argument("--html", help="a file for a page of --explain, token by token")
    p.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the weights"
    )
    model_flags(p)
    return p


def check_flags(a):
    """Refuses flags that contradict each other, before anything is opened or written."""
    plain = a.rag or a.plain
    check(a.prompt.strip(), "--prompt is empty; give a text to continue")
    check(not plain or a.memory != "random", "--memory random goes with neither --rag nor --plain")
    if a.explain or a.html:
        shown = a.memory != "off" and not plain
        check(shown, "--explain and --html show memories: with --memory bank or random only")
    if a.html:
        folder = os.path.dirname(a.html) or "."
        valid = os.access(folder, os.W_OK) and not os.path.isdir(a.html)
        check(valid, f"--html {a.html}: give a file in a directory that can be written to")


def stop_token(tokenizer, text):
    """The token that --stop names, None for ""."""
    tokens = tokenizer.encoding.encode_ordinary(text)
    line = f"--stop {text!r} is {len(tokens)} tokens; it must be one"
    check(len(tokens) < 2, f'{line}, or "" to go on to the end')
    return tokens[0] if tokens else None


def main(argv=None):
    """Answers one prompt and prints how long it took; returns the answer."""
    a = parser().parse_args(argv)
    check_flags(a)
    model, tokenizer = open_model(
        a.checkpoint, a.data, a.device, a.dtype, a.n_recall, verify=not a.no_verify
    )
    cfg = model.config
    # refuse a wrong question before any fact is written
    prompt = tokenizer.encode(a.prompt)
    stop = stop_token(tokenizer, a.stop)
    check_fits(1 + len(prompt), a.tokens, cfg)
    plain = a.rag or a.plain  # the format without header: it reads text, and no memories
    reads = a.memory != "off" and not plain
    retriever = bank = None
    if reads or a.rag or a.remember:
        references, retriever, bank = open_memory(a, model, a.cold_start)
    for text in a.remember:
        for i in remember(text, tokenizer, cfg, retriever, bank):
            print(f"remembered as reference {i}", flush=True)
    if a.rag:
        query = [tokenizer.bos, *prompt][-cfg.chunk_len :]  # as a chunk of the prompt recalls
        ids, scores = retriever.search([query], cfg.n_recall)  # (1, R)
        texts = []  # token lists, the best first
        for i, score in zip(ids[0], scores[0], strict=True):
            if i >= 0:
                texts.append(references[int(i)].tolist())
                text = tokenizer.decode(texts[-1]).strip()
                print(visible(f"in context: score {score:.2f}  {text}"))
        prompt = in_context(texts, prompt, cfg.max_context - a.tokens - 1)
    if not reads:
        retriever = bank = None  # only --rag or --remember needed them
    elif a.memory == "random":
        retriever = Random(references.live(), a.seed)

    tokens = torch.tensor([[tokenizer.bos, *prompt]])  # (1, T)
    sampling = dict(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, seed=a.seed)
    how = dict(plain=plain, stop=stop, **sampling)
    out, trace = generate(model, tokens, a.tokens, retriever, bank, **how)
    answer = tokenizer.decode(out[0, tokens.shape[1] :])
    if retriever is not None and all((recalled["ids"] < 0).all() for recalled in trace.recalls):
        print("the knowledge base knows nothing about this: answered without a memory")
    print(visible(f"\n{a.prompt}\n -> {answer.strip()}\n"))
    if a.explain or a.html:
        seen = (model, tokenizer, references, out, trace, bank)
        print(visible("\n".join(explain(*seen))))
        if a.html:
            page(a.html, *seen)
    n_new = trace.logprobs.shape[1]
    ms = {name: seconds * 1e3 for name, seconds in trace.seconds.items()}
    parts = ", ".join(f"{name} {x:.1f}" for name, x in ms.items())
    cache = f"; {bank.stats()}" if bank else ""
    print(f"{n_new} tokens in {sum(ms.values()):.0f} ms: {parts}{cache}")
    return answer


if __name__ == "__main__":
    run(main)
