"""Files of answers that are gone on with: an answer stays as long as what it was made from is the same.

Each answer has `made_from`: a short hash of its row (or question), and of what all rows share, such as the model, the
settings and the documents. An answer whose hashes differ from today's moves to `NAME.before.jsonl`, and its row is answered
again. Answers of earlier versions have no hashes and stay.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmjax import config, storage
from llmjax.errors import UserError
from llmjax.train import base, folders

MADE_FROM = "made_from"
BEGIN = b'{"id": '  # the beginning of every answer
MadeFrom = Mapping[str, str]  # what an answer is made from -> its hash


def digest(*values: Any) -> str:
    """A short hash of values that JSON has, or that have a text."""
    return hashlib.blake2b(json.dumps(values, default=str).encode(), digest_size=8).hexdigest()


def file_digest(*paths: Path) -> str:
    """A short hash of the contents of files, those that are missing left out."""
    made = hashlib.blake2b(digest_size=8)
    for path in paths:
        if path.is_file():
            made.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                while data := file.read(1 << 20):
                    made.update(data)
    return made.hexdigest()


def model_digest(run: Path, *adapters: Path) -> str:
    """A short hash of a run's newest checkpoint, of its tokenizer, and of adapters. What cannot be read is told when it is loaded."""
    found = []
    for one in (run, *adapters):
        one = config.run_of(one)
        try:
            folder = folders.newest(one)
        except folders.CheckpointError:  # a folder in PEFT's format, or nothing that can be loaded
            found.append(file_digest(*sorted(one.glob("adapter_*"))))
            continue
        named = base.read(folder.parent)
        own = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        found += [base.fingerprint(folder, base.item_of(folder)), named.fingerprint if named else ""]
        found.append(file_digest(*sorted((own / "tokenizer").glob("*"))))
    return digest(*found)


def before(out: Path) -> Path:
    """Where the answers go that are made again."""
    return out.with_name(f"{out.stem}.before.jsonl")


def look(out: Path, wanted: Mapping[str, MadeFrom]) -> tuple[set[str], list[bytes], list[bytes], Counter[str]]:
    """What a file of answers has, of the rows whose ids are wanted.

    Returns:
        the ids that are answered; the lines that stay; the lines that are of other contents; and how many of these there are
        for each thing that has changed. A last line that was cut off counts as missing.

    Raises UserError for another file.
    """
    done: set[str] = set()
    kept: list[bytes] = []
    old: list[bytes] = []
    changed: Counter[str] = Counter()
    if not out.is_file():
        return done, kept, old, changed
    with out.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") and line[: len(BEGIN)] == BEGIN[: len(line)]:
                break
            try:
                row = json.loads(line)
                own, theirs = str(row["id"]), row.get(MADE_FROM)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{out} is not a file of answers: give another --out") from error
            now = wanted.get(own, {})
            differing = (
                [name for name, value in now.items() if theirs.get(name) != value] if isinstance(theirs, dict) else []
            )
            if differing:
                changed.update(differing)
                old.append(line)
            else:
                done.add(own)
                kept.append(line)
    return done, kept, old, changed


@contextlib.contextmanager
def resuming(out: Path, wanted: Mapping[str, MadeFrom]) -> Iterator[tuple[set[str], TextIO]]:
    """The ids that are answered in a file, and the file to append answers to. Answers of other contents leave it, and are kept.

    Raises UserError for a file that is none of answers, or that another process appends to.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is no file, so answers cannot be gone on with there: give another --out")
    busy = f"another process writes {out}: wait for it, or give another --out"
    real = Path(os.path.realpath(out))  # a link stays one, and all names of a file have one lock
    lock = real.with_name(f".{real.name}.lock")
    with storage.locked(lock, otherwise=busy):
        try:
            done, kept, old, changed = look(out, wanted)
            if old:
                with storage.appending(before(out)) as file:
                    file.write(b"".join(old).decode())
                storage.write_bytes(real, b"".join(kept))
                parts = ", ".join(f"of {count:,} the {name}" for name, count in changed.items())
                print(
                    f"{out}: {len(old):,} answers are made again ({parts} changed); the old ones are in {before(out)}"
                )
            with storage.appending(out) as file:
                yield done, file
        finally:
            storage.remove(lock)
