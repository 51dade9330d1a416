"""Documents and the JSONL shards that hold them on disk.

A document is a text and where it came from. Its id is a hash of the text and of nothing else, so the same text has
the same id in every run, on every machine and under every file name; deduplication and order rest on that.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "heldout")
# What a writer keeps in memory before it appends to its file. Files are opened only for the append, so that any
# number of sources and buckets stays below the operating system's limit of open files.
BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its origin; a rejected one carries the reason and, where there is no text, what could be shown of it.

    `size` is in UTF-8 bytes of the text, or in raw bytes where the input was no text.
    `reason` is "" or "KIND" or "KIND: detail"; counts are kept by kind.
    """

    source: str
    group: str  # documents of one group are held out together
    path: str
    text: str
    id: str
    size: int
    reason: str = ""


def content_id(data: bytes) -> str:
    """The first 16 bytes of BLAKE2b, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def to_row(document: Document) -> bytes:
    """One JSONL row, with "reason" only where there is one."""
    row = {"id": document.id, "source": document.source, "group": document.group, "path": document.path}
    if document.reason:
        row["reason"] = document.reason
    return json.dumps({**row, "text": document.text}, ensure_ascii=False).encode() + b"\n"


def from_row(row: bytes) -> Document:
    """The document that `to_row` wrote."""
    values = json.loads(row)
    return Document(size=len(values["text"].encode()), **values)


def shard_files(folder: Path) -> dict[str, list[Path]]:
    """The shards SOURCE-NNNNN.jsonl of a folder such as WORKDIR/prepare/train, by source and in order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        match = re.fullmatch(r"(.+)-\d{5,}\.jsonl", path.name)
        if match:
            found.setdefault(match[1], []).append(path)
    return found


def read_documents(folder: Path, *, source: str) -> Iterator[Document]:
    """The documents of one source in a folder such as WORKDIR/prepare/train, in prepare's order, one at a time."""
    for path in shard_files(folder).get(source, []):
        with path.open("rb") as file:
            for row in file:
                yield from_row(row)


@dataclass
class ShardWriter:
    """Writes one source's documents of one split to SOURCE-NNNNN.jsonl, a new file whenever `shard_bytes` is full.

    `shards` describes the files written so far: name, documents, bytes (UTF-8 of the text), sha256 (after `close`).
    Files appear with the first document, so a split without documents leaves none. OSError when the disk is full.
    """

    folder: Path
    source: str
    shard_bytes: int
    shards: list[dict[str, str | int]] = field(default_factory=list)
    _buffer: bytearray = field(default_factory=bytearray)
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def write(self, document: Document) -> None:
        """Append one document."""
        if not self.shards or (self._bytes and self._bytes + document.size > self.shard_bytes):
            self._finish()
            self.shards.append({"name": f"{self.source}-{len(self.shards):05d}.jsonl", "documents": 0, "bytes": 0})
        row, shard = to_row(document), self.shards[-1]
        shard["documents"] = int(shard["documents"]) + 1
        shard["bytes"] = self._bytes + document.size
        self._digest.update(row)
        self._buffer += row
        if len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def close(self) -> list[dict[str, str | int]]:
        """Write what is left and return the description of the shards."""
        self._finish()
        return self.shards

    @property
    def _bytes(self) -> int:
        return int(self.shards[-1]["bytes"])

    def _flush(self) -> None:
        append(self.folder / str(self.shards[-1]["name"]), self._buffer)

    def _finish(self) -> None:
        if self.shards and "sha256" not in self.shards[-1]:
            self._flush()
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            self._digest = hashlib.sha256()


def append(path: Path, buffer: bytearray) -> None:
    """Append the buffer to the file, making its folder where needed, and empty the buffer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(buffer)
    buffer.clear()
