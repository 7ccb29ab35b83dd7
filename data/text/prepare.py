"""Your own text as a data set: training text, knowledge base, tokenizer (sec. 4).

    python data/text/prepare.py notes/ --out out/notes
    python data/text/prepare.py corpus.jsonl.gz --out out/mine --text_field content --kb share:0.3

Input: files and folders of .txt .md .rst .html .jsonl .json .csv, also .gz and .zst. In --out:
    train.bin           training text of both stages
    heldout.bin         text that only the knowledge base has: what memories are for
    val.bin             text that neither has
    kb.bin .idx         references: first those of the held-out documents, then the others;
                        kb.documents: how many of them each document has (Remark 3.2);
                        kb.titles: how many tokens of each are its title
    train_refs.bin .idx those others again: what the explicit stage retrieves from
    tokenizer.json, meta.json
Stopped and called again it goes on where it was.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from concurrent import futures
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import read  # noqa: E402
import splits  # noqa: E402
import vocabulary  # noqa: E402
from references import begins_with, references_of  # noqa: E402
from rules import WORD, Rules, Scorer, digest_of, shingles  # noqa: E402
from splits import DROPPED, HELDOUT, TRAIN, TRAIN_AND_KB, VAL  # noqa: E402

import corpus  # noqa: E402
from common import (  # noqa: E402
    UserError,
    check,
    command,
    make_directory,
    optional,
    read_json,
    replace_file,
    run,
    write_json,
)  # fmt: skip

TOKENIZER_TEXT = 30_000_000  # characters that a new tokenizer is trained on


@dataclass
class Options:
    """What decides the data set, and is therefore compared before a stopped run goes on."""

    inputs: list  # files and folders
    text_field: str  # of JSON objects and tables: the text
    title_field: str
    tokenizer: str
    ref_len: int
    kb: str  # all, share:X, or a folder
    heldout: float  # share of the knowledge base's documents
    val: float  # share of all documents
    near: float  # smallest Jaccard similarity of near-duplicates; 0: only exact ones go
    quality: str  # a scorer's file
    keep: float  # share of the documents that is kept, the best
    seed: int
    rules: Rules = field(default_factory=Rules)


# -- Step 1, in several processes: files -> documents that keep the rules ---------------------


def read_part(job):
    """Reads a part. Leaves <work>/00012.jsonl, its documents; .npz, numbers about each of them;
    and .json, the counts, last: where that is, the part is done. Returns the counts."""
    options, part, stem = job
    counts = Counter()
    scorer = Scorer.open(options.quality) if options.quality else None
    rows = []  # numbers about each document, as splits.py wants them
    signatures = []
    with open(f"{stem}.jsonl.tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
        for document in read.read_documents(part, options.text_field, options.title_field, counts):
            counts["read"] += 1
            counts["characters"] += len(document.text)
            counts["characters replaced"] += document.broken
            broken = options.rules.broken_rule(document.text, document.broken)
            if broken:
                counts[broken] += 1
                continue
            row = dict(text=document.text, title=document.title)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.append(numbers_of(document, options, scorer))
            if options.near:
                signatures.append(signature_of(document.text))
    os.replace(f"{stem}.jsonl.tmp", f"{stem}.jsonl")
    about = np.array(rows, NUMBERS)
    arrays = {name: about[name] for name in NUMBERS.names}
    arrays["signature"] = np.array(signatures, np.uint32).reshape(-1, splits.PERMUTATIONS)
    replace_file(f"{stem}.npz", lambda file: np.savez(file, **arrays))
    write_json(f"{stem}.json", counts)
    return counts


NUMBERS = np.dtype(
    [("digest", "u8"), ("place", "u8"), ("share", "f4"), ("in_kb", "?"), ("score", "f4")]
)


def numbers_of(document, options, scorer):
    """(digest, place, share, in_kb, score) of a document: see splits.py."""
    source = f"{document.file} {document.place}"
    place = _hash(options.seed, source)
    share = _hash(options.seed + 1, source) / 2**64
    in_kb = _in_folder(document, options.kb)
    score = scorer.score(document.text) if scorer else 0.0
    return digest_of(document.text), place, share, in_kb, score


def _hash(seed, source):
    """64 bits that depend on nothing but a document's place: the same in every run."""
    data = f"{seed}:{source}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _in_folder(document, kb):
    """Whether a document's file is the one that --kb names, or in the folder that it names."""
    if kb == "all" or kb.startswith("share:"):
        return False
    file = Path(os.path.abspath(document.file))
    folder = Path(os.path.abspath(kb))
    return file == folder or folder in file.parents


def signature_of(text):
    """The MinHash of a text: (128,) numbers below 2^32."""
    sketch = optional("datasketch").MinHash(num_perm=splits.PERMUTATIONS, seed=1)
    sketch.update_batch(shingles(text))
    return sketch.hashvalues


# -- Step 2: which documents are training text, knowledge base, held out ----------------------


def roles_of(stems, options, counts):
    """What becomes of every document (see splits.py): an array of roles for each part."""
    parts = [dict(np.load(f"{stem}.npz")) for stem in stems]
    about = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    roles = splits.choose_roles(about, options, counts)
    borders = np.cumsum([len(part["digest"]) for part in parts])
    return np.split(roles, borders[:-1])


# -- Step 3: the tokenizer --------------------------------------------------------------------


def sample_texts(stems, roles, most=TOKENIZER_TEXT):
    """Training texts from all parts alike, `most` characters at most."""
    each = most // len(stems)
    for stem, role in zip(stems, roles, strict=True):
        left = each
        for row, number in zip(_rows(stem), role, strict=True):
            if number in (TRAIN, TRAIN_AND_KB):
                text = full_text(row)
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _rows(stem):
    """The documents of a part, one after the other: dict(text, title)."""
    with open(f"{stem}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def full_text(row):
    """A document as training text: its title in front, unless it begins with it."""
    text = row["text"]
    title = row["title"]
    if not title or begins_with(text, title):
        return text
    return f"{title}\n{text}"


# -- Step 4, in several processes: documents -> tokens ----------------------------------------

# The files of a part, and what they become when joined. References have .idx files, too: lengths.
SPLITS = ("train", "heldout", "val")
REFERENCES = ("kb_heldout", "kb_seen")


def encode_part(job):
    """Leaves the tokens of a part in <work>/00012.<name>.bin, the lengths of its references in
    .idx, of their titles in .titles, how many references each document has in .documents;
    .tokens.json, the counts, comes last. Returns the counts."""
    options, folder, stem, role = job
    tokenizer = corpus.open_tokenizer(f"{folder}/tokenizer.json")
    dtype = corpus.dtype_for(tokenizer.n_vocab)
    counts = Counter()
    lengths = {name: [] for name in REFERENCES}
    titles = {name: [] for name in REFERENCES}
    pieces = {name: [] for name in REFERENCES}
    with contextlib.ExitStack() as stack:  # a part may be a file of any length: nothing is held
        files = {}
        for name in SPLITS + REFERENCES:
            files[name] = stack.enter_context(open(f"{stem}.{name}.bin", "wb"))

        def write(name, ids):
            files[name].write(np.array(ids, dtype).tobytes())
            counts[name] += len(ids)

        for row, number in zip(_rows(stem), role, strict=True):
            if number == DROPPED:
                continue
            split = {HELDOUT: "heldout", VAL: "val"}.get(int(number), "train")
            write(split, [tokenizer.bos, *tokenizer.encode(full_text(row))])
            if number in (HELDOUT, TRAIN_AND_KB):
                name = "kb_heldout" if number == HELDOUT else "kb_seen"
                made = references_of(row["text"], row["title"], tokenizer, options.ref_len)
                references, before = made
                for ids in references:
                    write(name, ids)
                    lengths[name].append(len(ids))
                titles[name] += before
                if references:
                    pieces[name].append(len(references))
    for name, numbers in lengths.items():
        counts[f"{name} references"] = len(numbers)
        _write_array(f"{stem}.{name}.idx", np.array(numbers, "<i8"))
        _write_array(f"{stem}.{name}.titles", np.array(titles[name], "<i8"))
        _write_array(f"{stem}.{name}.documents", np.array(pieces[name], "<i8"))
    write_json(f"{stem}.tokens.json", counts)
    return counts


def _write_array(path, array):
    """The numbers of an array, as a file of nothing else."""
    replace_file(path, lambda file: file.write(array.tobytes()))


# -- Step 5: the files of the data set --------------------------------------------------------


def join(out, stems):
    """Joins the parts' files, one after the other, into those of the data set."""
    for name in SPLITS:
        sources = [f"{stem}.{name}.bin" for stem in stems]
        _join_files(out / f"{name}.bin", sources)
    heldout = [f"{stem}.kb_heldout" for stem in stems]
    seen = [f"{stem}.kb_seen" for stem in stems]
    _join_references(out / "kb", heldout + seen)
    _join_references(out / "train_refs", seen)


def _join_files(path, sources):
    """The files end to end; where they are all empty there is none."""

    def write(file):
        for source in sources:
            with open(source, "rb") as part:
                shutil.copyfileobj(part, file)

    if sum(os.path.getsize(source) for source in sources):
        replace_file(path, write)
    else:
        Path(path).unlink(missing_ok=True)


def _join_references(path, sources):
    """The references of all parts: their tokens, and offsets out of their lengths."""
    _join_files(f"{path}.bin", [f"{source}.bin" for source in sources])
    lengths = np.concatenate([np.fromfile(f"{source}.idx", "<i8") for source in sources])
    if len(lengths):
        offsets = np.zeros(len(lengths) + 1, "<i8")
        offsets[1:] = lengths.cumsum()
        _write_array(f"{path}.idx", offsets)
    else:
        Path(f"{path}.idx").unlink(missing_ok=True)
    for kind in ("titles", "documents"):
        _join_files(f"{path}.{kind}", [f"{source}.{kind}" for source in sources])


# -- All of it --------------------------------------------------------------------------------


def in_processes(work, jobs, processes, sizes, title):
    """Runs work(job) for every job, in so many processes, and adds up the Counters it returns.

    sizes: bytes of each job, for the progress bar. UserError if a process was killed.
    """
    total = Counter()
    bar = tqdm(total=sum(sizes), desc=title, unit="B", unit_scale=True)
    with bar:
        if processes == 1 or len(jobs) <= 1:
            for job, size in zip(jobs, sizes, strict=True):
                total.update(work(job))
                bar.update(size)
            return total
        # fork, where there is it: processes share the modules that are loaded already
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if can_fork else "spawn")
        # Ctrl-C is for this process only; the others end their part, which then counts
        ignore = (signal.SIGINT, signal.SIG_IGN)
        pool = futures.ProcessPoolExecutor(processes, context, signal.signal, ignore)
        try:
            for counts, size in zip(pool.map(work, jobs), sizes, strict=True):
                total.update(counts)
                bar.update(size)
        except futures.process.BrokenProcessPool:
            line = "a process was killed, perhaps for want of memory"
            raise UserError(f"{line}: call it again with fewer --processes, it goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return total


def fingerprint_of(options, files):
    """Names the options and the state of every input file, however their paths are written."""
    state = []
    for path in files:
        now = path.stat()
        state.append((os.path.abspath(path), now.st_size, now.st_mtime_ns))
    plain = asdict(options)
    plain["inputs"] = [os.path.abspath(path) for path in options.inputs]
    if not options.tokenizer.startswith("bpe:"):  # by its content, for a file can become another
        plain["tokenizer"] = vocabulary.open_named(options.tokenizer).id
    said = json.dumps([plain, state])
    if options.quality:
        said += hashlib.sha256(Path(options.quality).read_bytes()).hexdigest()
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def inputs_of(options, out):
    """The files to read, a Counter of those that are skipped, and the fingerprint of it all."""
    within = [path for path in options.inputs if os.path.abspath(path) == os.path.abspath(out)]
    check(not within, f"--out {out} is the text itself: give another directory")
    files, skipped = read.find_files(options.inputs, leave_out=out)
    check(files, f"{', '.join(options.inputs)}: no file of {' '.join(read.KINDS)} there")
    return files, skipped, fingerprint_of(options, files)


def prepare(options, out, processes, made_by):
    """Makes the data set; returns its manifest. What is there already is not made again."""
    out = Path(out)
    files, skipped, fingerprint = inputs_of(options, out)
    if (out / "meta.json").exists():
        meta = read_json(out / "meta.json", {}, "give another --out")
        check("prepared" in meta, f"--out {out} holds another data set: give another directory")
        if meta["prepared"] == fingerprint:
            print(f"{out} is there already, made of the same files")
            return meta
    work = start_work(out, fingerprint)
    parts = read.make_parts(files)
    stems = [str(work / f"{i:05}") for i in range(len(parts))]

    # files -> documents, each part in a file of JSON lines
    todo = unfinished(stems, ".json")
    jobs = [(options, parts[i], stems[i]) for i in todo]
    in_processes(read_part, jobs, processes, [parts[i].bytes for i in todo], "reading")
    counts = _add_up(f"{stem}.json" for stem in stems)
    roles = roles_of(stems, options, counts)

    # the tokenizer, trained on what has become training text
    if not (work / "tokenizer.json").exists():
        texts = sample_texts(stems, roles)
        made, said = vocabulary.choose(options.tokenizer, texts, out.name)
        print(f"tokenizer: {said}", flush=True)
        made.save(work / "tokenizer.json")
    tokenizer = corpus.open_tokenizer(work / "tokenizer.json")

    # documents -> tokens, each part in files of its own
    todo = unfinished(stems, ".tokens.json")
    jobs = [(options, str(work), stems[i], roles[i]) for i in todo]
    in_processes(encode_part, jobs, processes, [parts[i].bytes for i in todo], "encoding")
    tokens = _add_up(f"{stem}.tokens.json" for stem in stems)

    meta = dict(
        name=out.name,
        command=made_by,
        tokenizer=".",
        tokenizer_id=tokenizer.id,
        n_vocab=tokenizer.n_vocab,
        ref_len=options.ref_len,
        kb=tokens["kb_heldout references"] + tokens["kb_seen references"],
        heldout=tokens["kb_heldout references"],  # so many of them, the first
        splits={name: tokens[name] for name in SPLITS if tokens[name]},
        documents={rule.name: 0 for rule in fields(Rules)} | counts,
        files=len(files),
        skipped=dict(skipped),
        options=asdict(options),
        prepared=fingerprint,
    )
    (out / "meta.json").unlink(missing_ok=True)  # until the end the directory is no data set
    remove_derived(out)  # before there is one again: an old index must not be taken for its own
    join(out, stems)
    tokenizer.save(out / "tokenizer.json")
    write_prompts(out, tokenizer, meta)
    write_json(out / "meta.json", meta)
    shutil.rmtree(work)
    report(meta)
    return meta


def write_prompts(out, tokenizer, meta, n=3):
    """Beginnings of held-out references, to ask the model with, and how their sentence goes on:
    prompts.txt, a line each, a tab between the two."""
    kb = corpus.References.open(out / "kb", meta["n_vocab"])
    held_out = meta["heldout"] or len(kb)
    chosen = {}
    short = {}  # where there are only short ones
    for i in np.linspace(0, held_out - 1, 20 * n).astype(int):
        text = " ".join(tokenizer.decode(kb[i]).split())
        starts = [word.start() for word in WORD.finditer(text)]  # or pairs of letters (rules.py)
        if len(starts) >= 12:
            chosen[text[: starts[8]].rstrip()] = text[starts[8] :]
        elif len(starts) >= 2:
            middle = starts[len(starts) // 2]
            short[text[:middle].rstrip()] = text[middle:]
    step = max(1, len(chosen) // n)  # from all over the text
    listed = [*list(chosen.items())[::step][:n], *chosen.items(), *short.items()]
    lines = []
    for prompt, rest in dict(listed).items():
        lines.append(f"{prompt}\t{corpus.sentences(rest)[0]}\n")
    replace_file(out / "prompts.txt", lambda file: file.write("".join(lines[:n]).encode()))


def remove_derived(out):
    """Removes what was made of an older text in the same directory: indices and neighbours."""
    for path in [*out.glob("*.index"), *out.glob("*.neighbors.*"), *out.glob("shape.txt")]:
        print(f"{path} was of the text before, and is removed")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def unfinished(stems, suffix):
    """Numbers of the parts whose last file is not there yet."""
    return [i for i, stem in enumerate(stems) if not Path(stem + suffix).exists()]


def start_work(out, fingerprint):
    """The directory of unfinished work: that of a run that was stopped, or an empty one."""
    work = make_directory(out / "work")
    state = work / "job.json"
    if state.exists():
        if read_json(state, dict(job=str), f"remove {work}")["job"] == fingerprint:
            return work
        shutil.rmtree(work)
        make_directory(work)
    write_json(state, dict(job=fingerprint))
    return work


def _add_up(paths):
    """The sum of the counts in several files."""
    total = Counter()
    for path in paths:
        total.update(read_json(path, {}, "remove it, and run this again"))
    return total


def report(meta):
    """Prints what became of the documents: every rule, every split."""
    counts = Counter(meta["documents"])
    print(f"{meta['files']:,} files, {counts['read']:,} documents", end="")
    print(f" (long ones count piece by piece), {counts['characters']:,} characters")
    if counts["characters replaced"]:
        print(f"    {counts['characters replaced']:,} characters were no UTF-8: now U+FFFD")
    ours = {"read", "characters", "characters replaced", "kept", "of the training text"}
    ours |= {"of the knowledge base", "in the knowledge base only", "in neither"}
    for why, n in counts.items():
        if why not in ours and n:
            print(f"    {n:9,} left out: {EXPLAINED.get(why, why)}")
    for kind, n in meta["skipped"].items():
        print(f"    {n:9,} files skipped: {kind}")
    print(f"    {counts['kept']:9,} kept, of which")
    train = counts["of the training text"]
    print(f"    {train:9,} training text (train: {meta['splits']['train']:,} tokens)")
    n = counts["of the knowledge base"]
    print(f"    {n:9,} knowledge base (kb: {meta['kb']:,} references)")
    for name, where in (("heldout", "in the knowledge base only"), ("val", "in neither")):
        tokens = meta["splits"].get(name, 0)
        print(f"    {counts[where]:9,} {where} ({name}: {tokens:,} tokens)")


EXPLAINED = dict(
    min_words="too few words (--min_words)",
    max_word_length="words too long on average (--max_word_length)",
    max_non_alphabetic="too few letters (--max_non_alphabetic)",
    max_unique="hardly any word twice (--max_unique)",
    min_entropy="the same words again and again (--min_entropy)",
    max_broken="mostly no UTF-8 (--max_broken)",
)


def command_line(argv=None):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("inputs", nargs="+", help="files and folders")
    p.add_argument("--out", required=True, help="directory of the data set")
    p.add_argument("--text_field", default="text", help="of .json .jsonl .csv: where the text is")
    p.add_argument("--title_field", default="title", help="and its title, if there is one")
    p.add_argument(
        "--tokenizer",
        default="bpe:4096",
        help="bpe:VOCAB (train one), a data set, a tokenizer.json, or a name of tiktoken",
    )
    p.add_argument("--ref_len", type=int, default=128, help="tokens of a reference, at most")
    p.add_argument("--kb", default="all", help="knowledge base: all, share:0.3, or a folder")
    p.add_argument("--heldout", type=float, default=0.05, help="share of it not in training text")
    p.add_argument("--val", type=float, default=0.02, help="share of all that is in neither")
    p.add_argument("--near", type=float, default=0.0, help="drop near-duplicates above this (0.8)")
    p.add_argument("--quality", default="", help="a scorer made by quality.py")
    p.add_argument("--keep", type=float, default=0.5, help="share that --quality keeps")
    p.add_argument("--seed", type=int, default=1, help="of the choice of splits")
    p.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    p.add_argument(
        "--fingerprint", action="store_true", help="only print what names text and flags together"
    )
    limits = p.add_argument_group("rules of section 4.2 (0 switches one off)")
    for rule in fields(Rules):
        what = EXPLAINED[rule.name].split(" (")[0]
        limits.add_argument(f"--{rule.name}", type=rule.type, default=rule.default, help=what)
    return p.parse_args(argv)


def main(argv=None):
    a = command_line(argv)
    check(16 <= a.ref_len <= 65535, f"--ref_len {a.ref_len}: from 16 to 65,535 tokens")
    check(a.processes >= 1, f"--processes {a.processes}: at least 1")
    for name in ("heldout", "val", "near"):
        value = getattr(a, name)
        check(0 <= value <= 1, f"--{name} {value}: a share from 0 to 1")
    check(0 < a.keep <= 1, f"--keep {a.keep}: a share above 0, up to 1")
    if a.quality:
        Scorer.open(a.quality)
    if a.near:
        optional("datasketch")
    if a.kb.startswith("share:"):
        try:
            share = float(a.kb.removeprefix("share:"))
        except ValueError:
            share = 0.0
        check(0 < share <= 1, f"--kb {a.kb}: a share above 0, up to 1, as in share:0.3")
    elif a.kb != "all":
        check(Path(a.kb).exists(), f"--kb {a.kb}: all, share:0.3, or a folder among the inputs")
    limits = {}
    for rule in fields(Rules):
        value = getattr(a, rule.name)
        check(value >= 0, f"--{rule.name} {value}: from 0")
        limits[rule.name] = value
    given = {f.name: getattr(a, f.name) for f in fields(Options) if f.name != "rules"}
    options = Options(**given, rules=Rules(**limits))
    made_by = command("data/text/prepare.py", *(sys.argv[1:] if argv is None else argv))
    try:
        if a.fingerprint:
            print(inputs_of(options, a.out)[2])
            return
        prepare(options, a.out, a.processes, made_by)
    except OSError as error:
        where = error.filename or a.out
        raise UserError(f"{where}: {error.strerror or error}") from None


if __name__ == "__main__":
    run(main)
