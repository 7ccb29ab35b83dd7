"""Generation with memory recall (sec. 3.1), and a look at what was recalled.

    python sample.py --prompt "What is the population of Kyiv?"
    python sample.py --prompt "..." --explain --html out/memory.html     what was recalled and read
    python sample.py --prompt "What is the population of Zubrowka City?" \\
        --remember "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."

Prompt and generated tokens lie on one grid of chunks of C = 64. Each chunk of the prompt recalls
R = 5 memories by its own text; from then on, whenever the context has grown by a chunk, its last C
tokens are the query for R new memories, which replace the old ones.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import corpus
from corpus import need
from memory import Memories, MemoryBank, attention_path
from model import Cache, find_device, load_checkpoint
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
    """What happened. recalls: for each chunk that recalled, dict(chunk, query (B, <=C) tokens, ids
    (B, R), scores (B, R)); its memories stay until the next entry. logprobs (B, n_new) of the new
    tokens; greedy (B, n_new): whether each was the likeliest. seconds: by what they went to."""

    recalls: list = field(default_factory=list)
    logprobs: torch.Tensor = None
    greedy: torch.Tensor = None
    seconds: dict = field(default_factory=lambda: dict(search=0, load=0, prefill=0, steps=0))

    def table(self, n_chunks):
        """(B, n_chunks, R) reference ids as one table: what model.forward needs for the same."""
        B, R = self.recalls[0]["ids"].shape
        table = np.full((B, n_chunks, R), -1)
        for r in self.recalls:
            table[:, r["chunk"] :] = r["ids"][:, None]
        return table

def pool_of(bank, ids, model, codec=None):
    """Loads the memories that ids (any shape, -1 = none) name: a pool, and ids as its rows.
    codec: the bank's, for a pool that is still its codes."""
    names, rows = np.unique(ids, return_inverse=True)
    none = int(len(names) > 0 and names[0] < 0)  # -1 comes first
    names, table = names[none:], torch.from_numpy(rows.reshape(ids.shape) - none).to(model.device)
    if len(names) == 0:
        return Memories.empty(model.config, model.device), table
    return bank.recall(names, decode=False) if codec else bank.recall(names), table

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
    # p / (a number of the exponential distribution) is largest at token t with probability p_t;
    # torch.multinomial does this as well, but makes Python wait for the GPU
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

class Steps:
    """One step of generation, over and over: decode the last token, choose the next, keep it.
    All that a step reads and writes stays in its place. So CUDA captures it once as a graph and
    then replays that, sampling included: to start its thousand kernels from Python would take
    longer than they run. A recall between two steps overwrites the cache's slots in place, too.
    tokens, logprobs and greedy (B, n) are of the prompt and what follows; see Trace."""

    @torch.inference_mode(False)  # tensors that may be changed inside of that mode and outside
    def __init__(self, model, B, n, plain, forced, *sampling):
        device, weights = model.device, model.embed.weight
        self.cache = Cache(model.config, B, n, not plain, weights.dtype, device)
        self.forced, self.sampling, self.graph = forced, sampling, None
        self.generator = torch.Generator(device)
        self.tokens, self.logprobs, self.greedy = (
            torch.zeros(B, n, dtype=t, device=device) for t in (torch.int64, torch.float32, bool)
        )
        self.at = torch.zeros(1, dtype=int, device=device)  # the next token's place in them
        # how often to look whether all have stopped: to look waits for the GPU
        self.look = model.config.chunk_len if weights.is_cuda else 1

    def start(self, tokens, forced, seed):
        T = tokens.shape[1]
        self.tokens[:, :T] = tokens
        if self.forced:
            self.tokens[:, T : T + forced.shape[1]] = forced
        self.at.fill_(T)
        self.cache.clear()
        self.generator.manual_seed(seed)

    def keep(self, logits):
        """The next token of each sequence, chosen by logits (B, V) or forced."""
        new = self.tokens.index_select(1, self.at)
        if not self.forced:
            new = choose(logits, *self.sampling, self.generator)[:, None]
        self.tokens.index_copy_(1, self.at, new)
        logprobs = logits.float().log_softmax(-1).gather(-1, new)
        self.logprobs.index_copy_(1, self.at, logprobs)
        self.greedy.index_copy_(1, self.at, logits.argmax(-1, keepdim=True) == new)
        self.at += 1

    def step(self, model):
        last = self.tokens.index_select(1, self.at - 1)[:, 0]
        self.keep(model.decode(last, self.cache))

    def __call__(self, model):
        if self.at.is_cuda:
            self.graph = self.graph or self.capture(model)
            self.graph.replay()
        else:
            self.step(model)

    @torch.inference_mode(False)  # nor may the graph's own tensors be of that mode
    @torch.no_grad()
    def capture(self, model):
        """As PyTorch's notes on CUDA graphs want it: run on a side stream first, then record."""
        before, rng = (self.at.clone(), self.cache.length.clone()), self.generator.get_state()
        device = self.at.device  # which need not be the current one
        side, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(model)
                self.at.copy_(before[0])  # what it wrote there will be written over
                self.cache.length.copy_(before[1])
        now.wait_stream(side)
        self.generator.set_state(rng)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=side):
            self.step(model)  # recorded, not run
        return graph

def steps_for(model, B, n, *how):
    """Steps for B sequences of n tokens. On CUDA those of earlier calls where they fit: capturing
    takes longer than a short answer. model.steps has the last four, of rounded lengths."""
    weights, kept = model.embed.weight, vars(model).setdefault("steps", {})
    if not weights.is_cuda:
        return Steps(model, B, n, *how)
    n = min(model.config.max_context, 1 << (n - 1).bit_length())
    places = tuple(p.data_ptr() for p in model.parameters())  # where a graph reads weights
    key = B, n, how, model.config.n_recall, weights.dtype, places
    kept[key] = kept.pop(key, None) or Steps(model, B, n, *how)
    for old in list(kept)[:-4]:
        del kept[old]
    return kept[key]

def clock(device):
    if device.type == "cuda":  # which works on its own
        torch.cuda.synchronize(device)
    return time.perf_counter()

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
    once every sequence has it. Returns tokens (B, T + n_new or fewer) and the Trace."""
    c, (B, T) = model.config, tokens.shape
    need(T > 0, "the prompt is empty; it has at least the BOS")
    line = f"{T} prompt tokens and {n_new} new ones; the context is at most {c.max_context}"
    need(T + n_new <= c.max_context, f"{line}: shorten the prompt, or ask for fewer tokens")
    need(n_new > 0, f"{n_new} new tokens were asked for; it takes at least 1")
    short = forced is not None and forced.shape != (B, n_new)
    need(not short, f"forced is to be ({B}, {n_new}) tokens: B, n_new")
    need((retriever is None) == (bank is None), "memories need both a retriever and a bank")
    need(bank is None or not plain, "the plain format has no header and reads no memories")
    C, R, trace, device = c.chunk_len, c.n_recall, Trace(), model.device
    steps = steps_for(model, B, T + n_new, plain, forced is not None, temperature, top_k, top_p)
    steps.start(tokens, forced, seed)
    codec, began = getattr(bank, "codec", None), clock(device)

    def recall(queries, chunks, codec=None):
        """queries: per chunk (B, <=C) tokens -> pool, table (B, len(chunks), R)."""
        start = clock(device)
        flat = [q for query in queries for q in query.tolist()]  # all chunks in one search
        ids, scores = retriever.search(flat, R)
        ids, scores = (np.asarray(x).reshape(len(chunks), B, R) for x in (ids, scores))
        for chunk, query, i, score in zip(chunks, queries, ids, scores, strict=True):
            trace.recalls.append(dict(chunk=chunk, query=query, ids=i, scores=score))
        found = time.perf_counter()
        pool, table = pool_of(bank, ids.transpose(1, 0, 2), model, codec)
        trace.seconds["search"] += found - start
        trace.seconds["load"] += clock(device) - found
        return pool, table

    # The prompt, in one pass. Full chunks are their own queries; a last chunk that is not full is
    # queried by the last C tokens of the prompt, not by its few own.
    pool, table = None if plain else Memories.empty(c, device=device), None
    if retriever is not None:
        queries = [tokens[:, i : i + C] for i in range(0, T - C + 1, C)]
        if T % C:
            queries.append(tokens[:, max(0, T - C) :])
        pool, table = recall(queries, range(len(queries)))
    logits = model(steps.tokens[:, :T], None, pool, table, steps.cache)[0][:, 0]
    if table is not None:
        steps.cache.recall(pool, table[:, -1])
    del pool  # a bank's memory, used again
    trace.seconds["prefill"] = clock(device) - began - sum(trace.seconds.values())

    steps.keep(logits)
    for n in range(T, T + n_new):  # token n comes; the ones before it are the context
        if n > T:
            steps(model)
        if stop is not None and n % steps.look == 0:
            if before_stop(steps.tokens[:, T : n + 1], stop) <= n - T:
                break
        # Token n - 1 still belonged to the old chunk: it read the old memories. Now new ones come.
        if retriever is not None and n % C == 0 and T < n < T + n_new - 1:
            pool, table = recall([steps.tokens[:, n - C : n].clone()], [n // C], codec)
            steps.cache.recall(pool, table[:, 0], codec)
            del pool
    trace.seconds["steps"] = clock(device) - began - sum(trace.seconds.values())
    end = n + 1
    if stop is not None:
        end = min(end, T + 1 + before_stop(steps.tokens[:, T:end], stop))
    trace.logprobs, trace.greedy = (x[:, T:end].clone() for x in (steps.logprobs, steps.greedy))
    return steps.tokens[:, :end].clone(), trace

def before_stop(said, stop):
    """How many columns of said (B, n) come before every sequence has had `stop`."""
    return int((said != stop).cumprod(1).any(0).sum())

# -- Writing a fact down ----------------------------------------------------------------------

def remember(text, tokenizer, config, retriever, bank):
    """Writes a text into the knowledge base, the bank and the index, now. Returns reference ids.
    A text beyond ref_len tokens becomes several references, as in sec. 4.4."""
    tokens, ids = tokenizer.encode(text), []
    need(tokens, "--remember: the text is empty")
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

def open_model(checkpoint, data, device, dtype="auto"):
    """-> model and tokenizer, checked against each other; prints what runs and why.
    dtype: of the weights; auto: bfloat16 on a GPU that has it: decoding waits for their bytes."""
    (model, meta), device = load_checkpoint(checkpoint), find_device(device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or dtype == "auto" and fast:
        model.rounded(torch.bfloat16)
    model.to(device).eval()
    c, tokenizer = model.config, corpus.tokenizer(corpus.manifest(data)["tokenizer"])
    trained = f"{checkpoint} was trained with tokenizer {meta['tokenizer']}"
    need(meta["tokenizer"] == tokenizer.id, f"{trained}; that of {data} is {tokenizer.id}")
    dtype, chunk = model.embed.weight.dtype, len(c.header) + c.chunk_len
    sizes = c.head_dim, c.n_head // c.n_kv_head, c.n_recall * c.memory_tokens
    path, why = attention_path(device, dtype, chunk, *sizes)
    print(f"{checkpoint}: {c.n_params:,} non-embedding weights on {device}, {dtype}; attention of "
          f"a prompt of one chunk: {path} ({why})")  # fmt: skip
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
    p.add_argument("--html", default="", help="--explain, and the same as a page, token by token")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    return p

def main(argv=None):
    a = parser().parse_args(argv)
    plain, here = a.rag or a.plain, os.path.dirname(a.html) or "."
    need(not plain or a.memory != "random", "--memory random goes with neither --rag nor --plain")
    shown = a.memory != "off" and not plain or not (a.explain or a.html)
    need(shown, "--explain and --html show memories: with --memory bank or random only")
    file = not a.html or os.access(here, os.W_OK) and not os.path.isdir(a.html)
    need(file, f"--html {a.html}: give a file in a directory that can be written to")
    need(a.prompt.strip(), "--prompt is empty; give a text to continue")
    fits = a.temperature >= 0 and a.top_k >= 0 and 0 < a.top_p <= 1 and a.tokens >= 1
    need(fits, "--temperature, --top_k: from 0; --top_p: above 0, to 1; --tokens: from 1")
    model, tokenizer = open_model(a.checkpoint, a.data, a.device, a.dtype)
    c, retriever, bank = model.config, None, None
    if a.memory != "off" and not a.plain or a.rag or a.remember:
        references = corpus.References.open(f"{a.data}/{a.references}")
        bank = MemoryBank.open(a.bank, model, references)
        retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    # what is wrong with the question is said before a fact is written
    prompt, stop = tokenizer.encode(a.prompt), tokenizer.encoding.encode_ordinary(a.stop)
    need(len(stop) < 2, f"--stop {a.stop!r} is {len(stop)} tokens; it must be one")
    line = f"{1 + len(prompt)} prompt tokens and {a.tokens} new ones"
    fits = 1 + len(prompt) + a.tokens <= c.max_context
    need(fits, f"{line}; the context is at most {c.max_context}: shorten the prompt")
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
        model, tokens, a.tokens, retriever, bank, plain=plain, temperature=a.temperature,
        top_k=a.top_k, top_p=a.top_p, seed=a.seed, stop=stop[0] if stop else None,
    )  # fmt: skip
    answer = tokenizer.decode(out[0, tokens.shape[1] :])
    print(f"\n{a.prompt}\n -> {answer.strip()}\n")
    if a.explain or a.html:
        from views.explain import explain, page  # they import this file
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
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        sys.exit(f"sample.py: {e}")
