"""Generation with memory recall (sec. 3.1), and a look at what was recalled.

    python sample.py --prompt "What is the population of Kyiv?"
    python sample.py --prompt "..." --explain            what was recalled, kept and attended to
    python sample.py --prompt "What is the population of Zubrowka City?" \\
        --remember "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."

Prompt and generated tokens lie on one grid of chunks of C = 64. Each chunk of the prompt recalls
R = 5 memories by its own text; from then on, whenever the context has grown by a chunk, its last C
tokens are the query for R new memories, which replace the old ones.
"""

import argparse
import codecs
import math
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import corpus
from memory import Memories, MemoryBank, attention_path
from model import Cache, apply_rope, find_device, load_checkpoint, rope_table
from retrieval import Retriever

# -- Where memories come from: anything with .search(queries, k) -> ids (n, k), scores (n, k) ---

class Random:
    """Recalls k memories at random, whatever the query: what noise does."""

    def __init__(self, n, seed=0):
        self.n, self.rng = n, np.random.default_rng(seed)

    def search(self, queries, k):
        return self.rng.integers(0, self.n, (len(queries), k)), np.zeros((len(queries), k))

class Given:
    """Recalls references ids (B, n), whatever the query: the right one of each sequence, say."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def search(self, queries, k):
        ids = np.full((len(queries), k), -1)
        sequence = np.arange(len(queries)) % len(self.ids)  # queries come chunk by chunk
        ids[:, : self.ids.shape[1]] = self.ids[sequence, :k]
        return ids, np.zeros((len(queries), k))

# -- Generation -------------------------------------------------------------------------------

@dataclass
class Trace:
    """What happened: one entry of `recalls` per chunk that recalled.

    recalls: dict(chunk, query (B, <=C) tokens, ids (B, R), scores (B, R)); the memories of chunk c
    stay until the next entry. logprobs (B, n_new) of the new tokens; greedy (B, n_new): whether
    each was the likeliest. seconds: of search, load, prefill and steps.
    """

    recalls: list = field(default_factory=list)
    logprobs: torch.Tensor = None
    greedy: torch.Tensor = None
    seconds: dict = field(
        default_factory=lambda: dict(search=0.0, load=0.0, prefill=0.0, steps=0.0)
    )

    def table(self, n_chunks):
        """(B, n_chunks, R) reference ids as one table: what model.forward needs for the same."""
        B, R = self.recalls[0]["ids"].shape
        table = np.full((B, n_chunks, R), -1)
        for r in self.recalls:
            table[:, r["chunk"] :] = r["ids"][:, None]
        return table

def pool_of(bank, ids, model):
    """Loads the memories that ids (any shape, -1 = none) name: a pool, and ids as its rows."""
    names, rows = np.unique(ids, return_inverse=True)
    rows = rows.reshape(ids.shape)
    if len(names) and names[0] < 0:
        names, rows = names[1:], rows - 1
    table = torch.from_numpy(rows).to(model.device)
    if len(names) == 0:
        return Memories.empty(model.config, device=model.device), table
    return bank.recall(names).to(model.device), table

def choose(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> one token a row. temperature 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p > top_p, -math.inf)  # keeps the first
        logits = torch.full_like(logits, -math.inf).scatter(-1, index, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

@torch.inference_mode()
def generate(
    model, tokens, n_new, retriever=None, bank=None, *, plain=False, temperature=0.0, top_k=0,
    top_p=1.0, seed=0, forced=None, stop=None,
):  # fmt: skip
    """Continues prompts by n_new tokens, recalling memories on the way.

    tokens (B, T) int64: prompts of one length, BOS first. retriever and bank: both, or neither (the
    header and an empty pool). plain: the format of the implicit stage, without header. forced
    (B, n_new): tokens to follow instead of the model's own choice; the trace then says how likely
    they were, and whether the model would have chosen them. stop: a token at which to end early,
    once every sequence has it.
    Returns tokens (B, T + n_new or fewer) and the Trace.
    """
    c, (B, T) = model.config, tokens.shape
    if T == 0:
        raise ValueError("the prompt is empty; it has at least the BOS")
    if T + n_new > c.max_context:
        raise ValueError(
            f"{T} prompt tokens and {n_new} new ones; the context is at most {c.max_context}: "
            "shorten the prompt, or ask for fewer tokens"
        )
    if n_new < 1:
        raise ValueError(f"{n_new} new tokens were asked for; it takes at least 1")
    if (retriever is None) != (bank is None):
        raise ValueError("memories need both a retriever and a bank")
    if plain and bank is not None:
        raise ValueError("the plain format has no header and reads no memories")
    C, R, trace = c.chunk_len, c.n_recall, Trace()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    tokens = tokens.to(model.device)

    def recall(queries, chunks):
        """queries: per chunk (B, <=C) tokens -> pool, table (B, len(chunks), R)."""
        start = time.perf_counter()
        flat = [q for query in queries for q in query.tolist()]  # all chunks in one search
        ids, scores = retriever.search(flat, R)
        ids = np.asarray(ids).reshape(len(chunks), B, R)
        scores = np.asarray(scores).reshape(len(chunks), B, R)
        for i, chunk in enumerate(chunks):
            trace.recalls.append(
                dict(chunk=chunk, query=queries[i], ids=ids[i], scores=scores[i])
            )
        found = time.perf_counter()
        pool, table = pool_of(bank, ids.transpose(1, 0, 2), model)
        trace.seconds["search"] += found - start
        trace.seconds["load"] += time.perf_counter() - found
        return pool, table

    # The prompt, in one pass. Full chunks are their own queries; a last chunk that is not full is
    # queried by the last C tokens of the prompt, not by its few own.
    pool = table = None
    if not plain:
        pool = Memories.empty(c, device=model.device)
    if retriever is not None:
        n_full = T // C
        queries = [tokens[:, i * C : (i + 1) * C] for i in range(n_full)]
        if T % C:
            queries.append(tokens[:, max(0, T - C) :])
        pool, table = recall(queries, list(range(len(queries))))
    start = time.perf_counter()
    dtype = model.embed.weight.dtype
    cache = Cache(c, B, T + n_new, header=not plain, dtype=dtype, device=model.device)
    logits = model(tokens, memories=pool, recall=table, cache=cache)[0][:, -1]
    if table is not None:
        cache.recall(pool, table[:, -1])
    trace.seconds["prefill"] += time.perf_counter() - start

    logprobs, greedy, loading = [], [], trace.seconds["search"] + trace.seconds["load"]
    start = time.perf_counter()
    for i in range(n_new):
        chosen = choose(logits, temperature, top_k, top_p, generator)
        new = chosen if forced is None else forced[:, i].to(model.device)
        greedy.append(logits.argmax(-1) == new)
        logprobs.append(logits.float().log_softmax(-1).gather(-1, new[:, None])[:, 0])
        tokens = torch.cat([tokens, new[:, None]], 1)
        n = tokens.shape[1]
        if i + 1 == n_new or (stop is not None and bool((tokens[:, T:] == stop).any(1).all())):
            break
        # Token n - 1 still belongs to the old chunk: it reads the old memories, then new ones come.
        logits = model.decode(new, cache)
        if retriever is not None and n % C == 0:
            pool, table = recall([tokens[:, -C:]], [n // C])
            cache.recall(pool, table[:, 0])
    trace.seconds["steps"] = time.perf_counter() - start
    trace.seconds["steps"] -= trace.seconds["search"] + trace.seconds["load"] - loading
    trace.logprobs, trace.greedy = torch.stack(logprobs, 1), torch.stack(greedy, 1)
    return tokens, trace

# -- Looking at it ----------------------------------------------------------------------------

@torch.inference_mode()
def attention_shares(model, tokens, pool, table):
    """How much of its attention each context token gave to each of its memories.

    tokens (B, T), pool, table (B, c, R) as in model.forward. The same network, with the softmax of
    eq. (3.1) spelled out instead of fused. Returns (Lm, B, H, T, R): shares of 1.
    """
    c, (B, T) = model.config, tokens.shape
    P, G, S, R = len(c.header), c.n_head // c.n_kv_head, c.memory_tokens, table.shape[2]
    if len(pool) == 0:
        return torch.zeros(c.n_memory_layer, B, c.n_head, T, R, device=tokens.device)
    tokens = torch.cat([model._header(B), tokens], 1)
    positions = torch.arange(P + T, device=tokens.device)
    cos, sin = rope_table(torch.where(positions < P, positions, positions + c.ref_len), c)
    future = torch.ones(P + T, P + T, dtype=bool, device=tokens.device).triu(1)
    chunk = torch.arange(T, device=tokens.device) // c.chunk_len
    rows = table[:, chunk]  # (B, T, R)
    filled = torch.arange(S, device=tokens.device) < pool.count[rows.clamp(min=0), None]
    valid = (filled & (rows >= 0).unsqueeze(-1)).flatten(2)  # (B, T, R*S)
    valid = torch.cat([valid.new_zeros(B, P, R * S), valid], 1)[:, None]  # the header reads none
    x, shares = model.embed(tokens), []
    for l in range(c.n_memory_layer):
        block = model.blocks[l]
        q, k, v = block.attn.project(block.norm1(x))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)  # (B, H, P+T, dh)
        kv = pool.kv[:, l].to(q.dtype)[rows.clamp(min=0)]  # (B, T, R, 2, Hkv, S, dh)
        kv = kv.permute(3, 0, 4, 1, 2, 5, 6).repeat_interleave(G, 2)  # (2, B, H, T, R, S, dh)
        mem_k, mem_v = torch.nn.functional.pad(kv.flatten(4, 5), (0, 0, 0, 0, P, 0))
        own = (q @ k.mT).masked_fill(future, -math.inf)
        memory = torch.einsum("bhtd,bhtsd->bhts", q, mem_k).masked_fill(~valid, -math.inf)
        p = (torch.cat([memory, own], -1) / math.sqrt(c.head_dim)).softmax(-1)
        p_memory, p_own = p.split([R * S, P + T], -1)
        shares.append(p_memory[:, :, P:].unflatten(-1, (R, S)).sum(-1))
        y = torch.einsum("bhts,bhtsd->bhtd", p_memory, mem_v) + p_own @ v
        x = block.finish(x, y)
    return torch.stack(shares)

def marked(tokenizer, reference, chosen):
    """The text of a reference, each kept token followed by how many heads kept it.

    reference (n,) ids; chosen (Lm, Hkv, S): indices of kept tokens, -1 = none.
    """
    kept = np.bincount(chosen[chosen >= 0].ravel(), minlength=len(reference))
    small = str.maketrans("0123456789", "".join(map(chr, range(0x2080, 0x208A))))  # subscripts
    letters = codecs.getincrementaldecoder("utf-8")("replace")  # some take more than one token
    pieces = [
        letters.decode(tokenizer.encoding.decode_bytes([int(t)]))
        + (str(n).translate(small) if n else "")
        for t, n in zip(reference, kept, strict=True)
    ]
    return "".join(pieces).strip()

def explain(model, tokenizer, references, tokens, trace, bank):
    """Lines that say, chunk by chunk, what sequence 0 recalled and how much it read of each."""
    c, T = model.config, tokens.shape[1]
    n_chunks = -(-T // c.chunk_len)
    ids = trace.table(n_chunks)[:1]
    pool, table = pool_of(bank, ids, model)
    shares = attention_shares(model, tokens[:1], pool, table)[:, 0].mean(1)  # (Lm, T, R)
    lines = []
    for chunk in range(n_chunks):
        at = slice(chunk * c.chunk_len, (chunk + 1) * c.chunk_len)
        recalled = next(r for r in reversed(trace.recalls) if r["chunk"] <= chunk)
        text = tokenizer.decode(tokens[0, at]).strip().replace("\n", " / ")
        lines.append(f'chunk {chunk}: "{text}"')
        if recalled["chunk"] == chunk:
            query = tokenizer.decode(recalled["query"][0]).strip().replace("\n", " / ")
            lines.append(f'  recalled by "{query}":')
        else:
            lines.append("  still reads the memories of the chunk before it:")
        for r, i in enumerate(recalled["ids"][0]):
            if i < 0:
                continue
            reference = torch.from_numpy(references[int(i)])[None]
            chosen = model.write(reference, return_indices=True)[1][0].cpu().numpy()
            share = shares[:, at, r].mean(1)  # (Lm,), mean over heads and the chunk's tokens
            by_layer = " ".join(f"{s:.1%}" for s in share.tolist())
            lines.append(
                f"  score {recalled['scores'][0][r]:.2f}  attention {share.mean():.1%} "
                f"(by layer {by_layer})  reference {i}\n"
                f"      {marked(tokenizer, reference[0].numpy(), chosen)}"
            )
    return lines

def remember(text, tokenizer, config, retriever, bank):
    """Writes a text into the knowledge base, the bank and the index, now. Returns reference ids.

    A text beyond ref_len tokens becomes several references, as in sec. 4.4.
    """
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError("--remember: the text is empty")
    ids = []
    for i in range(0, len(tokens), config.ref_len):
        piece = tokens[i : i + config.ref_len]
        near = retriever.search([piece], min(8, len(retriever)))[0][0]  # other orders score alike
        known = [int(j) for j in near if j >= 0 and bank.references[int(j)].tolist() == piece]
        if known:
            ids.append(known[0])  # remembered before
            continue
        ids.append(bank.append(piece))
        retriever.add([ids[-1]], [tokenizer.decode(piece)])
        retriever.save(bank.references)
    return ids

# -- Command line -----------------------------------------------------------------------------

def open_model(checkpoint, data, device):
    """-> model and tokenizer, checked against each other; prints what runs and why."""
    model, meta = load_checkpoint(checkpoint)
    model.to(find_device(device)).eval()
    c, tokenizer = model.config, corpus.tokenizer(corpus.manifest(data)["tokenizer"])
    if meta["tokenizer"] != tokenizer.id:
        raise ValueError(
            f"{checkpoint} was trained with tokenizer {meta['tokenizer']}; that of {data} is "
            f"{tokenizer.id}"
        )
    chunk = len(c.header) + c.chunk_len
    path, why = attention_path(model.device, model.embed.weight.dtype, chunk)
    print(
        f"{checkpoint}: {c.n_params:,} non-embedding weights on {model.device}; attention of a "
        f"prompt of one chunk: {path} ({why})"
    )
    return model, tokenizer

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
    p.add_argument("--device", default="auto")
    return p

def main(argv=None):
    a = parser().parse_args(argv)
    if (a.rag or a.plain) and a.memory == "random":
        raise ValueError("--memory random goes with neither --rag nor --plain")
    if not a.prompt.strip():
        raise ValueError("--prompt is empty; give a text to continue")
    if a.temperature < 0 or a.top_k < 0 or not 0 < a.top_p <= 1 or a.tokens < 1:
        raise ValueError("--temperature, --top_k: from 0; --top_p: above 0, to 1; --tokens: from 1")
    model, tokenizer = open_model(a.checkpoint, a.data, a.device)
    c = model.config
    retriever = bank = None
    if a.memory != "off" and not a.plain or a.rag or a.remember:
        references = corpus.References.open(f"{a.data}/{a.references}")
        bank = MemoryBank.open(a.bank, model, references)
        retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    # what is wrong with the question is said before a fact is written
    prompt, stop = tokenizer.encode(a.prompt), tokenizer.encoding.encode_ordinary(a.stop)
    if len(stop) > 1:
        raise ValueError(f"--stop {a.stop!r} is {len(stop)} tokens; it must be one")
    if 1 + len(prompt) + a.tokens > c.max_context:
        n = f"{1 + len(prompt)} prompt tokens and {a.tokens} new ones"
        raise ValueError(f"{n}; the context is at most {c.max_context}: shorten the prompt")
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
    if a.rag or a.plain or a.memory == "off":
        retriever = bank = None
    elif a.memory == "random":
        retriever = Random(len(references), a.seed)
    tokens = torch.tensor([[tokenizer.bos, *prompt]])
    out, trace = generate(
        model, tokens, a.tokens, retriever, bank, plain=a.plain or a.rag, temperature=a.temperature,
        top_k=a.top_k, top_p=a.top_p, seed=a.seed, stop=stop[0] if stop else None,
    )  # fmt: skip
    answer = tokenizer.decode(out[0, tokens.shape[1] :])
    print(f"\n{a.prompt}\n -> {answer.strip()}\n")
    if a.explain and trace.recalls:
        print("\n".join(explain(model, tokenizer, references, out, trace, bank)))
    elif a.explain:
        print("nothing was recalled: --explain has memories to show with --memory bank or random")
    s, n = trace.seconds, trace.logprobs.shape[1]
    print(
        f"{n} tokens in {sum(s.values()) * 1e3:.0f} ms: "
        + ", ".join(f"{k} {v * 1e3:.1f}" for k, v in s.items())
        + (f"; {bank.stats()}" if bank else "")
    )
    return answer

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        sys.exit(f"sample.py: {e}")
