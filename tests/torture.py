"""What a knowledge base survives: kills, faults and many processes at once, with figures.

    python tests/torture.py kills --times 200       SIGKILL at random moments of every command
    python tests/torture.py faults --times 500      bits, cuts, empty, foreign and mixed files
    python tests/torture.py crowd --seconds 60      one writer, eight readers; several writers
    python tests/torture.py stops --times 3         SIGSTOP of a process that holds the lock

Each says what it found; a line that begins with WRONG is a bug. Small versions run in the tests.

Measured with these commands, on two cores that other work kept busy: 200 kills, 353 changes
acknowledged between them, nothing wrong; 500 faults, 283 refused in one line, 217 healed or
harmless; one writer (527 changes) beside eight readers (1,042 times five memories), and four
writers (1,424) beside two (362): nothing wrong, lost or missing; 3 stops: a second writer refused
after its 30 s each time, readers done in 0.9 s, nothing lost.
"""

import argparse
import collections
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from world import PLACES, World  # noqa: E402

import corpus  # noqa: E402
from bank import WAIT, MemoryBank, Texts  # noqa: E402
from common import UserError  # noqa: E402
from model import load_checkpoint, save_checkpoint  # noqa: E402
from retrieval import Live, choice  # noqa: E402

SPEC = "Residual2x4,PQ4x4"


def make_world(folder):
    """A World (tests/world.py) with quantized memories, in `folder`."""
    tokenizer = corpus.tokenizer(ROOT / "data/cities")
    world = World(Path(folder) / "world", tokenizer)
    live, bank = world.open()
    bank.quantize(SPEC, progress=False)
    live.calibrate([(f"Where is {name}holm?", i) for i, name in enumerate(PLACES)], keep=1)
    return world


def copy_of(world, path):
    shutil.copytree(world.bank, path)
    return path


def wrong_memories(path, model):
    """Opens a base and returns what is wrong with it: ids whose memory is another's, a text that
    search does not find. Raises UserError where it cannot be opened."""
    bank = MemoryBank.open(path, model)
    live = bank.live()
    wrong = []
    pool = bank.recall(live)
    for m, i in enumerate(live.tolist()):
        tokens = bank.references[i]
        want = model.write(torch.from_numpy(tokens)[None])
        near = torch.allclose(
            pool.kv[m].float(), want.kv[0].bfloat16().float(), rtol=0.02, atol=0.02
        )
        if not near or int(pool.count[m]) != int(want.count):
            wrong.append(f"memory {i} is not that of its text")
    retriever = Live.open(bank.references, model)
    texts = [bank.references[i] for i in live]
    if texts and not retriever.meta["embedder"].startswith("self:"):
        found, scores = retriever.search(texts, 1)
        for i, (j,), (score,) in zip(live, found.tolist(), scores.tolist(), strict=True):
            same = j >= 0 and bank.references[j].tolist() == bank.references[int(i)].tolist()
            if not same and score < 0.999:
                wrong.append(f"text {i} is not found")
    return wrong


# -- Kills -------------------------------------------------------------------------------------

COMMANDS = ["add", "replace", "delete", "write", "quantize", "index", "save", "compact"]
COMMANDS += ["checkpoint"]
EMBEDDERS = ["hash:512", "hash:97", "self:1.1"]


def change_for_ever(path, model, tokenizer, seed, say):
    """Changes a base at random, and says what is done once it is."""
    rng = random.Random(seed)
    bank = MemoryBank.open(path, model)
    while True:
        what = rng.choice(COMMANDS)
        text = f"{rng.choice(PLACES)}ton has {rng.randrange(10**6)} people."
        tokens = tokenizer.encode(text)
        live = bank.live().tolist()
        i = rng.choice(live)
        if what == "add":
            i = bank.add([tokens], [dict(n=1)])[0]
            say("added", i, *tokens)
        elif what == "replace":
            bank.replace(i, tokens)
            say("replaced", i, *tokens)
        elif what == "delete" and len(live) > 9:
            bank.delete(i)
            say("deleted", i)
        elif what == "write":
            os.truncate(bank.path / "memories.bin", bank.store.stride * rng.randrange(5))
            bank.write(progress=False)
        elif what == "quantize":
            bank.quantize(SPEC, progress=False)
        elif what == "index":
            embedder = rng.choice(EMBEDDERS)
            say("choosing", embedder)
            Live.build(bank.references, embedder, progress=False, model=model)
            say("chosen", embedder)
        elif what == "save":
            Live.open(bank.references, model).save()
        elif what == "compact":
            bank.compact()
            Live.build(bank.references, progress=False, model=model)
        elif what == "checkpoint":
            checkpoint = path.parent / "model.pt"
            save_checkpoint(checkpoint, model.state_dict(), load_checkpoint(checkpoint)[1])


def killed_child(path, world, seed, after):
    """A forked process that changes the base until it is killed, `after` seconds from now.
    -> the lines that it said."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reads)

            def say(*words):
                os.write(writes, (" ".join(map(str, words)) + "\n").encode())

            change_for_ever(path, world.model, world.tok, seed, say)
        except BaseException as error:
            say("error", repr(error).replace("\n", " "))
        finally:
            os._exit(1)
    os.close(writes)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reads) as pipe:
        return pipe.read().splitlines()


def kills(times, seed, longest=0.5):
    """Kills a process that changes one base again and again. After each kill the base must open
    without help, hold all that was acknowledged and the index that was chosen, and no memory may be
    another's; the checkpoint must load."""
    found = collections.Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder)
        path = copy_of(world, Path(folder) / "base")
        shutil.copy(world.checkpoint, path.parent / "model.pt")
        for n in range(times):
            texts = expected_texts(path)
            embedders = {choice(path)[0]}
            log = killed_child(path, world, rng.randrange(1 << 30), rng.uniform(0, longest))
            problems = [line for line in log if line.startswith("error")]
            for line in log:
                acknowledged(texts, line.split())
                embedders = chosen(embedders, line.split())
            try:
                problems += differences(texts, path) + wrong_memories(path, world.model)
                if choice(path)[0] not in embedders:
                    problems.append(f"index of {choice(path)[0]}, not of {embedders}")
                weights = load_checkpoint(path.parent / "model.pt")[0].fingerprint()
                if weights != world.model.fingerprint():
                    problems.append("another checkpoint")
            except UserError as error:
                problems.append(f"does not open: {error}")
            for problem in problems:
                print(f"WRONG after kill {n}: {problem}")
            found["kills"] += 1
            found["changes acknowledged"] += sum("choosing" not in line for line in log)
            found["wrong"] += len(problems)
    return dict(found)


def expected_texts(path):
    texts = Texts(path)
    return {i: tokens.tolist() for i, tokens in enumerate(texts)}


def acknowledged(texts, words):
    if words[0] in ("added", "replaced"):
        texts[int(words[1])] = [int(t) for t in words[2:]]
    elif words[0] == "deleted":
        texts[int(words[1])] = []


def chosen(embedders, words):
    """Whose index it may be: of the one chosen last, or of one that was being made."""
    if words[0] == "choosing":
        return embedders | {words[1]}
    return {words[1]} if words[0] == "chosen" else embedders


def differences(texts, path):
    """What was acknowledged and is not there. One change more may have happened, not yet said."""
    now = expected_texts(path)
    differ = [i for i in set(texts) | set(now) if texts.get(i) != now.get(i)]
    if len(differ) > 1:
        return [f"lost or changed: {differ}"]
    lost = [i for i in texts if i not in now]
    return [f"lost: {lost}"] if lost else []


# -- Faults ------------------------------------------------------------------------------------


def faults(times, seed):
    """Damages one file of a base in one of many ways, then asks and changes it. Right: refused in
    one line that names the directory, or healed; texts, memories and sources are what they were."""
    found = collections.Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder)
        good = expected_texts(world.bank)
        other = copy_of(world, Path(folder) / "other")
        changed = MemoryBank.open(other, world.model)
        changed.replace(3, changed.references[5])
        changed.append(world.tok.encode("Zub City has 42 people."))
        Live.open(changed.references).save()
        changed.references.run("PRAGMA wal_checkpoint(TRUNCATE)")
        for n in range(times):
            path = copy_of(world, Path(folder) / f"{n}")
            what = damage(path, other, rng)
            outcome = ask(path, world, good)
            found[outcome.split(":")[0]] += 1
            if outcome.startswith("WRONG"):
                print(f"{outcome} ({n}, {what})")
            shutil.rmtree(path)
    return dict(found)


def damage(path, other, rng):
    """One fault in one file; says which."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    weights = [8 if file.name == "texts.sqlite" else 2 for file in files]
    file = rng.choices(files, weights)[0]
    data = bytearray(file.read_bytes())
    kind = rng.choice(["bit", "bit", "bit", "bytes", "cut", "empty", "zeros", "mixed", "gone"])
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        at = rng.randrange(len(data))
        data[at : at + 16] = rng.randbytes(len(data[at : at + 16]))
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "empty":
        data = b""
    elif kind == "zeros":
        at = rng.randrange(len(data))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    elif kind == "mixed":  # the same file of a base that was changed since
        twin = other / file.relative_to(path)
        data = twin.read_bytes() if twin.exists() else b"foreign"
    file.write_bytes(data)
    if kind == "gone":
        file.unlink()
    return f"{kind} of {file.relative_to(path)}"


def ask(path, world, good):
    """What comes of opening, asking and changing a damaged base: "refused", "healed", or WRONG."""
    try:
        bank = MemoryBank.open(path, world.model)
        texts = {i: tokens.tolist() for i, tokens in enumerate(bank.references)}
        mixed = len(texts) == 18  # texts.sqlite of the other base: whole, and what it says counts
        if texts != good and not mixed:
            return "WRONG: other texts, and nobody says so"
        problems = wrong_memories(path, world.model)
        if problems:
            return f"WRONG: {problems[0]}"
        MemoryBank.open(path, codes=True).recall([0, 3])
        i = bank.append([5, 6, 7])
        if bank.recall([i]).count.tolist() != [3]:
            return "WRONG: an appended text has no memory"
        return "healed or harmless"
    except UserError as error:
        line = str(error)
        named = str(path) in line
        if "\n" in line or not named:
            return f"WRONG: a refusal of several lines, or without a file: {line}"
        return "refused in one line"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"


# -- Many processes ----------------------------------------------------------------------------


def asks(path, checkpoint, seconds, seed, results):
    """A process that only asks: every memory must be that of a text which its row has had."""
    torch.set_num_threads(1)
    model = load_checkpoint(checkpoint)[0].eval()
    bank = MemoryBank.open(path, model, cache=4)
    retriever = Live.open(bank.references)
    rng = np.random.default_rng(seed)
    end = time.time() + seconds
    asked = 0
    wrong = 0
    while time.time() < end:
        ids = rng.permutation(bank.live())[:5]
        before = bank.references.rows(ids)
        pool = bank.recall(ids)
        after = bank.references.rows(ids)
        for m in range(len(ids)):
            if before[m] == after[m] and before[m].live:  # it did not change meanwhile
                tokens = torch.from_numpy(bank.references.tokens(before[m]))[None]
                want = model.write(tokens).kv[0].bfloat16().float()
                wrong += not torch.allclose(pool.kv[m].float(), want, rtol=0.02, atol=0.02)
        retriever.search([bank.references.tokens(before[0])] if before[0].live else ["Aba"], 3)
        asked += 1
    results.put(("asked", asked, wrong))


def changes(path, checkpoint, seconds, seed, results):
    """A process that changes the base as fast as it can."""
    torch.set_num_threads(1)
    model = load_checkpoint(checkpoint)[0].eval()
    bank = MemoryBank.open(path, model)
    rng = np.random.default_rng(seed)
    end = time.time() + seconds
    added = []
    n = 0
    while time.time() < end:
        tokens = [int(t) for t in rng.integers(300, 4000, rng.integers(3, 20))]
        if n % 3 == 0:
            added.append((bank.append(tokens, dict(by=seed)), tokens))
        elif n % 3 == 1:
            bank.replace(int(rng.integers(17)), tokens)
        elif len(added) > 3:
            bank.delete(added.pop(0)[0])
        n += 1
    results.put(("changed", n, added))


def crowd(seconds, writers=1, readers=8):
    """Readers beside writers: nothing wrong, nothing lost, nothing that hangs."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder)
        path = copy_of(world, Path(folder) / "base")
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        same = (str(path), str(world.checkpoint), seconds)
        processes = []
        for k in range(writers):
            processes.append(spawn.Process(target=changes, args=(*same, k, results)))
        for k in range(readers):
            processes.append(spawn.Process(target=asks, args=(*same, 100 + k, results)))
        for process in processes:
            process.start()
        said = [results.get(timeout=seconds + 120) for _ in processes]
        for process in processes:
            process.join()
        bank = MemoryBank.open(path, world.model)
        lost = 0
        for kind, _, added in said:
            for i, tokens in added if kind == "changed" else []:
                lost += bank.references[i].tolist() != tokens
        wrong = sum(result[2] for result in said if result[0] == "asked")
        bad = bank.verify()
        bank.write(progress=False)
        problems = wrong_memories(path, world.model)
        for problem in problems:
            print(f"WRONG: {problem}")
        return dict(
            writers=writers,
            readers=readers,
            changes=sum(result[1] for result in said if result[0] == "changed"),
            asked=sum(result[1] for result in said if result[0] == "asked"),
            wrong=wrong + len(problems),
            lost=lost,
            missing=len(bad),
        )


# -- A process that is stopped ------------------------------------------------------------------


def appends_for_ever(path, model, tokenizer, writes):
    bank = MemoryBank.open(path, model)
    n = 0
    while True:
        tokens = tokenizer.encode(f"Stop {n} has {n * n} people.")
        i = bank.append(tokens)
        os.write(writes, (" ".join(map(str, ["added", i, *tokens])) + "\n").encode())
        n += 1


def stop_with_lock(pid, texts):
    """Stops a process at a moment when it holds the base's write lock."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        try:
            with texts.transaction(0):
                pass
        except UserError:
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.02))


def stops(times, wait=WAIT):
    """Stops (SIGSTOP) a process that holds the lock. Meanwhile readers must get what is there and
    a second writer must be refused after `wait` seconds; one that waits when the process goes on
    must get its turn. Nothing may be lost."""
    found = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(folder)
        path = copy_of(world, Path(folder) / "base")
        for n in range(times):
            texts = expected_texts(path)
            reads, writes = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    appends_for_ever(path, world.model, world.tok, writes)
                finally:
                    os._exit(1)
            os.close(writes)
            time.sleep(0.3)
            bank = MemoryBank.open(path, world.model)
            stop_with_lock(pid, bank.references)
            began = time.time()
            problems = wrong_memories(path, world.model)
            slowest = max(slowest, time.time() - began)
            began = time.time()
            try:
                with bank.references.transaction(wait):
                    problems.append("two processes hold the lock")
            except UserError:
                found["refused in time"] += time.time() - began < wait + 2
            goes_on = threading.Timer(1, os.kill, (pid, signal.SIGCONT))
            goes_on.start()
            tokens = world.tok.encode(f"Waiter {n} has {n} people.")
            texts[bank.append(tokens)] = tokens
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with os.fdopen(reads) as pipe:
                for line in pipe.read().splitlines():
                    acknowledged(texts, line.split())
            problems += differences(texts, path) + wrong_memories(path, world.model)
            for problem in problems:
                print(f"WRONG after stop {n}: {problem}")
            found["stops"] += 1
            found["wrong"] += len(problems)
    return dict(found, seconds_to_read_all=round(slowest, 2))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["kills", "faults", "crowd", "stops"])
    p.add_argument("--times", type=int, default=200)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    if a.what == "kills":
        print(kills(a.times, a.seed))
    elif a.what == "faults":
        print(faults(a.times, a.seed))
    elif a.what == "stops":
        print(stops(a.times))
    else:
        print(crowd(a.seconds))
        print(crowd(a.seconds / 2, writers=4, readers=2))


if __name__ == "__main__":
    main()
