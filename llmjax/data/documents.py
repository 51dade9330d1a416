"""The clean documents on disk: JSONL shards that `prepare` wrote, or that were put there by hand.

A row has at least `text`; those of `prepare` also have id (a hash of the text), source, group and path, and url, licence,
language and facts where they are known.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
