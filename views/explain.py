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
import torch.nn.functional as F

from common import replace_file
from generate import pool_of
from memory import causal_attention, filled_slots
from model import apply_rope, rope_table


@torch.inference_mode()
def attention_shares(model, tokens, pool, table):
    """How much of its attention each context token gave to each of its memories.

    tokens (B, T), pool, table (B, c, R) as in model.forward. The same network, with the softmax of
    eq. (3.1) spelled out instead of fused. Returns (Lm, B, H, T, R): shares of 1.
    """
    cfg = model.config
    batch, n_context = tokens.shape
    n_recall = table.shape[2]
    n_header = len(cfg.header)
    n_memory = n_recall * cfg.memory_tokens
    group = cfg.n_head // cfg.n_kv_head  # query heads of one key-value head
    if len(pool) == 0:
        shape = (cfg.n_memory_layer, batch, cfg.n_head, n_context, n_recall)
        return torch.zeros(shape, device=tokens.device)
    tokens = torch.cat([model._header(batch), tokens], 1)  # (B, P+T)
    n_keys = n_header + n_context
    positions = torch.arange(n_keys, device=tokens.device)
    positions = torch.where(positions < n_header, positions, positions + cfg.ref_len)
    cos, sin = rope_table(positions, cfg)
    future = torch.ones(n_keys, n_keys, dtype=torch.bool, device=tokens.device).triu(1)

    # Which memories each context token reads, and which of their slots are filled.
    chunk = torch.arange(n_context, device=tokens.device) // cfg.chunk_len
    rows = table[:, chunk]  # (B, T, R)
    readable = rows.clamp(min=0)  # -1 reads any row, and is masked
    slots = torch.arange(cfg.memory_tokens, device=tokens.device)
    counts = filled_slots(pool.count, cfg)  # (Lm, M, Hkv)
    counts = counts[:, readable].masked_fill(rows.unsqueeze(-1) < 0, 0)  # (Lm, B, T, R, Hkv)
    counts = counts.movedim(-1, 2).repeat_interleave(group, 2)  # (Lm, B, H, T, R)
    valid = (slots < counts.unsqueeze(-1)).flatten(4)  # (Lm, B, H, T, R*S)
    valid = F.pad(valid, (0, 0, n_header, 0))  # (Lm, B, H, P+T, R*S): the header reads nothing

    x = model.embed(tokens)  # (B, P+T, d)
    shares = []
    for l in range(cfg.memory_layers.stop):
        block = model.blocks[l]
        q, k, v = block.attn.project(block.norm1(x))
        q = apply_rope(q, cos, sin)  # (B, H, P+T, dh)
        k = apply_rope(k, cos, sin)  # (B, Hkv, P+T, dh)
        if l not in cfg.memory_layers:
            x = block.finish(x, causal_attention(q, k, v))
            continue
        k = k.repeat_interleave(group, 1)  # (B, H, P+T, dh)
        v = v.repeat_interleave(group, 1)  # (B, H, P+T, dh)
        i = cfg.memory_layers.index(l)
        kv = pool.kv[:, i].to(q.dtype)[readable]  # (B, T, R, 2, Hkv, S, dh)
        kv = kv.permute(3, 0, 4, 1, 2, 5, 6)  # (2, B, Hkv, T, R, S, dh)
        kv = kv.repeat_interleave(group, 2).flatten(4, 5)  # (2, B, H, T, R*S, dh)
        kv = F.pad(kv, (0, 0, 0, 0, n_header, 0))  # (2, B, H, P+T, R*S, dh)
        to_memory = torch.einsum("bhtd,bhtsd->bhts", q, kv[0])  # (B, H, P+T, R*S)
        to_memory = to_memory.masked_fill(~valid[i], -math.inf)
        to_context = (q @ k.mT).masked_fill(future, -math.inf)  # (B, H, P+T, P+T)
        scores = torch.cat([to_memory, to_context], -1) / math.sqrt(cfg.head_dim)
        p = scores.softmax(-1)  # (B, H, P+T, R*S + P+T)
        p_memory = p[..., :n_memory]
        p_context = p[..., n_memory:]
        of_memory = p_memory[:, :, n_header:].unflatten(-1, (n_recall, -1))  # (B, H, T, R, S)
        shares.append(of_memory.sum(-1))  # (B, H, T, R)
        y = torch.einsum("bhts,bhtsd->bhtd", p_memory, kv[1]) + p_context @ v
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
        rows = tokens.expand(len(tables), -1)  # (n, T)
        logits = model(rows, memories=pool, recall=tables)[0]  # (n, T, V)
        logp = logits[:, n_prompt - 1 : -1].float().log_softmax(-1)
        return logp.gather(-1, rows[:, n_prompt:, None])[..., 0]

    complete = follow(table)
    nothing = follow(torch.full_like(table, -1))
    n_chunks, n_recall = table.shape[1:]
    slots = torch.arange(n_recall)
    gains = []
    for chunk in range(n_chunks):
        without = table.repeat(n_recall, 1, 1)  # (R, c, R): row r has all but this chunk's memory r
        without[slots, chunk, slots] = -1
        gains.append(complete - follow(without))
    return torch.stack(gains), complete[0], nothing[0]


def pieces(tokenizer, ids):
    """The text of each token. A letter of several tokens stands at the last of them, "" before."""
    letters = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in ids:
        # a model may have more ids than the tokenizer, and that may have gaps
        listed = token < tokenizer.n_vocab and token not in tokenizer.no_token
        written = tokenizer.encoding.decode_bytes([int(token)]) if listed else b""
        text = letters.decode(written)
        texts.append(text.replace("\ufffd", ""))  # bytes that are no letter
    return texts


def kept_by(model, reference):
    """How many heads, of all memory layers, kept each token of a reference. (n,) ids -> (n,)"""
    row = torch.from_numpy(reference)[None]  # (1, n)
    chosen = model.write(row, return_indices=True)[1]  # (1, Lm, Hkv, S)
    chosen = chosen[chosen >= 0].cpu().numpy()
    return np.bincount(chosen, minlength=len(reference))


SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def marked(tokenizer, reference, kept):
    """The text of a reference, each kept token followed by how many heads kept it."""
    text = ""
    for piece, n in zip(pieces(tokenizer, reference), kept, strict=True):
        text += piece
        if n:
            text += str(n).translate(SUBSCRIPTS)
    return text.strip()


def text_of(tokenizer, ids):
    """The text of some tokens, in one line."""
    text = tokenizer.decode(ids).replace("\ufffd", "")
    return text.strip().replace("\n", " / ")


@torch.inference_mode()
def look(model, tokenizer, references, tokens, trace, bank):
    """What sequence 0 recalled and how much it read of it.

    Returns pool and table (1, c, R) as in model.forward, shares (Lm, H, T, R) of attention, and per
    chunk dict(start, end, text, query, reads); query is None where a chunk still reads what the one
    before it recalled. reads, for each memory found: dict(slot, id, score, kept (n,)).
    """
    chunk_len = model.config.chunk_len
    n_tokens = tokens.shape[1]
    n_chunks = -(-n_tokens // chunk_len)
    pool, table = pool_of(bank, trace.table(n_chunks)[:1], model)
    shares = attention_shares(model, tokens[:1], pool, table)[:, 0]  # (Lm, H, T, R)
    by_chunk = {recalled["chunk"]: recalled for recalled in trace.recalls}
    kept = {}
    chunks = []
    for number in range(n_chunks):
        start = number * chunk_len
        end = min(start + chunk_len, n_tokens)
        query = None
        if number in by_chunk:
            last = by_chunk[number]
            query = text_of(tokenizer, last["query"][0])
        reads = []
        for slot, i in enumerate(last["ids"][0].tolist()):
            if i < 0:
                continue
            if i not in kept:
                kept[i] = kept_by(model, references[i])
            score = float(last["scores"][0][slot])
            reads.append(dict(slot=slot, id=i, score=score, kept=kept[i]))
        text = text_of(tokenizer, tokens[0, start:end])
        chunks.append(dict(start=start, end=end, text=text, query=query, reads=reads))
    return pool, table, shares.cpu().numpy(), chunks


def explain(model, tokenizer, references, tokens, trace, bank):
    """Lines that say, chunk by chunk, what sequence 0 recalled and how much it read of each."""
    shares, chunks = look(model, tokenizer, references, tokens, trace, bank)[2:]
    lines = []
    for number, chunk in enumerate(chunks):
        lines.append(f'chunk {number}: "{chunk["text"]}"')
        if chunk["query"] is None:
            lines.append("  still reads the memories of the chunk before it:")
        else:
            lines.append(f'  recalled by "{chunk["query"]}":')
        for read in chunk["reads"]:
            share = shares[:, :, chunk["start"] : chunk["end"], read["slot"]]  # (Lm, H, <=C)
            share = share.mean((1, 2))  # (Lm,)
            by_layer = " ".join(f"{s:.1%}" for s in share)
            attention = f"attention {share.mean():.1%} (by layer {by_layer})"
            lines.append(f"  score {read['score']:.2f}  {attention}  reference {read['id']}")
            lines.append(f"      {marked(tokenizer, references[read['id']], read['kept'])}")
            lines.append(f"      from {references.origin(read['id'])}")
    return lines


def view(model, tokenizer, references, tokens, trace, bank):
    """All that the page shows, as a dict for JSON. Shares are in thousandths, the rest in nats."""
    cfg = model.config
    n_prompt = tokens.shape[1] - trace.logprobs.shape[1]
    pool, table, shares, chunks = look(model, tokenizer, references, tokens, trace, bank)
    gains, complete, nothing = worth(model, tokens[:1], n_prompt, pool, table)
    shares = (shares * 1000).round().astype(int)
    texts = {}
    for number, chunk in enumerate(chunks):
        for read in chunk["reads"]:
            slot = read.pop("slot")
            kept = read.pop("kept")
            ids = references[read["id"]]
            texts[read["id"]] = dict(pieces=pieces(tokenizer, ids), kept=kept.tolist())
            share = shares[:, :, chunk["start"] : chunk["end"], slot]  # (Lm, H, <=C)
            share = share.reshape(-1, share.shape[2])  # (Lm * H, <=C)
            read["shares"] = share.T.tolist()  # token by token
            read["score"] = round(read["score"], 3)
            read["gains"] = rounded(gains[number, slot])
    return dict(
        layers=cfg.n_memory_layer,
        heads=cfg.n_head,
        keepers=n_heads(cfg),
        memory_tokens=cfg.memory_tokens,
        n_prompt=n_prompt,
        whole=rounded(complete),
        nothing=rounded(nothing),
        pieces=pieces(tokenizer, tokens[0].tolist()),
        chunks=chunks,
        references=texts,
    )


def n_heads(config):
    """How many key-value heads keep memories."""
    if config.kept_heads is not None:
        return len(config.kept_heads)
    return config.n_memory_layer * config.n_kv_head


def rounded(x):
    return x.double().cpu().numpy().round(3).tolist()


def page(path, *seen):
    """Writes the view of (model, tokenizer, references, tokens, trace, bank) as one HTML file."""
    data = json.dumps(view(*seen), separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    template = Path(__file__).with_name("memory.html").read_text(encoding="utf-8")
    replace_file(path, lambda file: file.write(template.replace("{{data}}", data).encode()))
    print(f"written to {path}: open it in a browser")
