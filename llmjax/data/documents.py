"""The clean documents on disk: JSONL shards that `prepare` wrote, or that were put there by hand.

A row has at least `text`; those of `prepare` also have id (a hash of the text), source, group and path, and url, licence,
language and facts where they are known.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.data import parallel_text

SPLITS = ("train", "heldout")


def shard_files(folder: Path) -> dict[str, list[Path]]:
    """The shards SOURCE-NNNNN.jsonl of a folder such as WORKDIR/prepare/train, by source and in order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        match = re.fullmatch(r"(.+)-\d{5,}\.jsonl", path.name)
        if match:
            found.setdefault(match[1], []).append(path)
    return found


def read_documents(folder: Path, *, source: str) -> Iterator[dict[str, Any]]:
    """The rows of one source in a folder such as WORKDIR/prepare/train, in prepare's order, one at a time."""
    for path in shard_files(folder).get(source, []):
        with path.open("rb") as file:
            for row in file:
                yield json.loads(row)


def languages_of(prepared: Path, source: str) -> tuple[str, ...]:
    """The languages of a source in WORKDIR/prepare: its name, or the two of parallel text."""
    manifest = prepared / "manifest.json"
    if not manifest.is_file():  # documents put there by hand
        return (source,)
    sources = json.loads(manifest.read_text(encoding="utf-8"))["sources"]
    if source in sources:
        return tuple(sources[source]["languages"])
    return (source.rpartition(".")[2],)  # routed by language: SOURCE.LANGUAGE


def read_texts(prepared: Path, split: str, source: str) -> Iterator[str]:
    """The texts of a source as they are encoded, in order: its documents, or both texts of each pair."""
    languages = languages_of(prepared, source)
    for document in read_documents(prepared / split, source=source):
        yield from parallel_text.sides(document["text"], languages)
