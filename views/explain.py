"""What was recalled, kept and attended to: the memory behind an answer, as text and as a page.

    python sample.py --prompt "..." --explain                          chunk by chunk, as text
    python sample.py --prompt "..." --explain --html out/memory.html   token by token, as a page

The page is memory.html with the numbers put in. It needs nothing but a browser.
"""

import codecs
import json
import math
from pathlib import Path

import numpy as np
import torch

from common import replace_file
from generate import pool_of
from model import apply_rope, rope_table


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
    rows = table[:, torch.arange(T, device=tokens.device) // c.chunk_len]  # (B, T, R)
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


@torch.inference_mode()
def worth(model, tokens, n_prompt, pool, table):
    """By how many nats each memory made each token of the answer likelier.

    tokens (1, T): n_prompt tokens of prompt, then the answer; pool, table (1, c, R) as in
    model.forward. The answer is followed again with one entry of the table set to -1, all others as
    they were. Returns gains (c, R, T - n_prompt) in nats, 0 where no memory was, and the log-
    probabilities (T - n_prompt,) with all memories and with none.
    """

    def follow(tables):  # (n, c, R) -> (n, T - n_prompt)
        rows = tokens.expand(len(tables), -1)
        logits = model(rows, memories=pool, recall=tables)[0][:, n_prompt - 1 : -1]
        return logits.float().log_softmax(-1).gather(-1, rows[:, n_prompt:, None])[..., 0]

    whole, nothing = follow(table), follow(torch.full_like(table, -1))
    gains, slots = [], torch.arange(table.shape[2])
    for chunk in range(table.shape[1]):
        without = table.repeat(len(slots), 1, 1)  # row r: all but memory r of this chunk
        without[slots, chunk, slots] = -1
        gains.append(whole - follow(without))
    return torch.stack(gains), whole[0], nothing[0]


def pieces(tokenizer, ids):
    """The text of each token. A letter of several tokens stands at the last of them, "" before."""
    letters = codecs.getincrementaldecoder("utf-8")("replace")
    known = [[int(t)] if t < tokenizer.n_vocab else [] for t in ids]  # a model may have more ids
    texts = [letters.decode(tokenizer.encoding.decode_bytes(t)) for t in known]
    return [text.replace("\ufffd", "") for text in texts]  # bytes that are no letter


def kept_by(model, reference):
    """How many heads, of all memory layers, kept each token of a reference. (n,) ids -> (n,)"""
    chosen = model.write(torch.from_numpy(reference)[None], return_indices=True)[1]
    return np.bincount(chosen[chosen >= 0].cpu().numpy(), minlength=len(reference))


def marked(tokenizer, reference, kept):
    """The text of a reference, each kept token followed by how many heads kept it."""
    small = str.maketrans("0123456789", "".join(map(chr, range(0x2080, 0x208A))))  # subscripts
    counts = [str(n).translate(small) if n else "" for n in kept]
    texts = pieces(tokenizer, reference)
    return "".join(a + b for a, b in zip(texts, counts, strict=True)).strip()


@torch.inference_mode()
def look(model, tokenizer, references, tokens, trace, bank):
    """What sequence 0 recalled and how much it read of it.

    Returns pool and table (1, c, R) as in model.forward, shares (Lm, H, T, R) of attention, and per
    chunk dict(start, end, text, query, reads); query is None where a chunk still reads what the one
    before it recalled. reads, for each memory found: dict(slot, id, score, kept (n,)).
    """
    C, T = model.config.chunk_len, tokens.shape[1]
    pool, table = pool_of(bank, trace.table(-(-T // C))[:1], model)
    shares = attention_shares(model, tokens[:1], pool, table)[:, 0].cpu().numpy()
    found = {int(i) for r in trace.recalls for i in r["ids"][0] if i >= 0}
    kept = {i: kept_by(model, references[i]) for i in found}

    def text_of(ids):
        return tokenizer.decode(ids).replace("\ufffd", "").strip().replace("\n", " / ")

    chunks = []
    for start in range(0, T, C):
        last = next(r for r in reversed(trace.recalls) if r["chunk"] * C <= start)
        own = last["chunk"] * C == start
        reads = [
            dict(slot=r, id=int(i), score=float(last["scores"][0][r]), kept=kept[int(i)])
            for r, i in enumerate(last["ids"][0])
            if i >= 0
        ]
        chunk = dict(start=start, end=min(start + C, T), text=text_of(tokens[0, start : start + C]))
        chunks.append(chunk | dict(query=text_of(last["query"][0]) if own else None, reads=reads))
    return pool, table, shares, chunks


def explain(model, tokenizer, references, tokens, trace, bank):
    """Lines that say, chunk by chunk, what sequence 0 recalled and how much it read of each."""
    _, _, shares, chunks = look(model, tokenizer, references, tokens, trace, bank)
    lines = []
    for i, chunk in enumerate(chunks):
        recalled = f'  recalled by "{chunk["query"]}":'
        still = "  still reads the memories of the chunk before it:"
        lines += [f'chunk {i}: "{chunk["text"]}"', still if chunk["query"] is None else recalled]
        for read in chunk["reads"]:
            share = shares[:, :, chunk["start"] : chunk["end"], read["slot"]].mean((1, 2))  # (Lm,)
            by_layer = " ".join(f"{s:.1%}" for s in share)
            said = f"score {read['score']:.2f}  attention {share.mean():.1%} (by layer {by_layer})"
            text = marked(tokenizer, references[read["id"]], read["kept"])
            lines += [f"  {said}  reference {read['id']}", f"      {text}"]
    return lines


def view(model, tokenizer, references, tokens, trace, bank):
    """All that the page shows, as a dict for JSON. Shares are in thousandths, the rest in nats."""
    c, n_prompt = model.config, tokens.shape[1] - trace.logprobs.shape[1]
    pool, table, shares, chunks = look(model, tokenizer, references, tokens, trace, bank)
    lost = worth(model, tokens[:1], n_prompt, pool, table)
    gains, whole, nothing = (x.double().cpu().numpy().round(3) for x in lost)
    shares, texts = (shares * 1000).round().astype(int), {}
    for i, chunk in enumerate(chunks):
        for read in chunk["reads"]:
            slot, ids = read.pop("slot"), references[read["id"]]
            texts[read["id"]] = dict(pieces=pieces(tokenizer, ids), kept=read.pop("kept").tolist())
            mine = shares[:, :, chunk["start"] : chunk["end"], slot]  # (Lm, H, <=C)
            read["shares"] = mine.reshape(-1, mine.shape[2]).T.tolist()  # token by token: Lm * H
            read |= dict(score=round(read["score"], 3), gains=gains[i, slot].tolist())
    return dict(
        layers=c.n_memory_layer,
        heads=c.n_head,
        keepers=c.n_memory_layer * c.n_kv_head,
        memory_tokens=c.memory_tokens,
        n_prompt=n_prompt,
        whole=whole.tolist(),
        nothing=nothing.tolist(),
        pieces=pieces(tokenizer, tokens[0].tolist()),
        chunks=chunks,
        references=texts,
    )


def page(path, *seen):
    """Writes the view of (model, tokenizer, references, tokens, trace, bank) as one HTML file."""
    data = json.dumps(view(*seen), separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    template = Path(__file__).with_name("memory.html").read_text(encoding="utf-8")
    replace_file(path, lambda file: file.write(template.replace("{{data}}", data).encode()))
    print(f"written to {path}: open it in a browser")
