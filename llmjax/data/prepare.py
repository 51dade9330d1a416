"""The prepare stage: sources -> WORKDIR/prepare, clean deduplicated shards and a manifest that accounts for everything.

Two passes keep memory small whatever the corpus holds. The first reads the sources and spills each document to one of
256 bucket files by the first byte of its id; the second goes through the buckets in order, sorts each by id, drops
all but the first of equal ids and writes the shards. As an id is a hash of the text, that order is a shuffle which
depends on the texts only.
"""

import collections
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.data.documents import (
    BUFFER_BYTES,
    SPLITS,
    Document,
    ShardWriter,
    append,
    content_id,
    from_row,
    to_row,
)
from llmjax.data.sources import Source, check_extras, read_source, resolve_sources, suffix_of

REJECTED_TEXT = 1000  # characters of a rejected document that are kept
PROGRESS_BYTES = 1 << 20  # text between two updates of the progress bar
OUTPUTS = (*SPLITS, "rejected")


@dataclass
class Count:
    """Documents and their UTF-8 bytes."""

    documents: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one document."""
        self.documents += 1
        self.bytes += size


@dataclass
class Funnel:
    """What became of one source's documents: read = rejected + train + heldout.

    This holds for bytes always, and for documents unless data.holdout_tail_percent cuts them in two.
    """

    read: Count = field(default_factory=Count)
    rejected: dict[str, Count] = field(default_factory=dict)
    train: Count = field(default_factory=Count)
    heldout: Count = field(default_factory=Count)
    heldout_groups: set[str] = field(default_factory=set)


class Output:
    """The stage's folder: one writer for each split and source, and the counts of what goes through them."""

    def __init__(self, folder: Path, *, names: Sequence[str], shard_bytes: int) -> None:
        self.funnels = {name: Funnel() for name in names}
        self._writers = {
            (split, name): ShardWriter(folder / split, name, shard_bytes) for split in OUTPUTS for name in names
        }

    def keep(self, document: Document, split: str) -> None:
        """Write a document to train/ or heldout/."""
        funnel = self.funnels[document.source]
        (funnel.train if split == "train" else funnel.heldout).add(document.size)
        self._writers[split, document.source].write(document)

    def reject(self, document: Document, reason: str) -> None:
        """Write the beginning of a document to rejected/."""
        kind = reason.partition(":")[0]
        self.funnels[document.source].rejected.setdefault(kind, Count()).add(document.size)
        text = document.text[:REJECTED_TEXT]
        clipped = replace(document, text=text, size=len(text.encode()), reason=reason)
        self._writers["rejected", document.source].write(clipped)

    def close(self) -> dict[str, dict[str, list[dict[str, str | int]]]]:
        """Finish all shards and describe them, by split and source."""
        shards: dict[str, dict[str, list[dict[str, str | int]]]] = {split: {} for split in OUTPUTS}
        for (split, name), writer in self._writers.items():
            shards[split][name] = writer.close()
        return shards


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Make WORKDIR/prepare afresh from `c.data.sources` and return its final numbers.

    Rows of train/SOURCE-NNNNN.jsonl and heldout/: id, source, group, path, text; of rejected/: also reason, and of the
    text the first 1,000 characters. The same sources and settings give the same bytes in every file.

    Raises:
        ValueError: for sources that cannot be read (see `sources`), if nothing is left to train on, or if nothing could
            be held out although a share was asked for.
        OSError: if a file cannot be read or the disk is full; what was written is no finished stage then.
    """
    began = time.perf_counter()
    sources = resolve_sources(c.data.sources)
    check_extras(sources)
    folder = workdir / "prepare"
    _check_apart(sources, workdir)
    if folder.exists():
        shutil.rmtree(folder)
    for split in OUTPUTS:
        (folder / split).mkdir(parents=True)
    output = Output(folder, names=[source.name for source in sources], shard_bytes=c.data.shard_bytes)
    with tempfile.TemporaryDirectory(dir=folder, prefix="spill-") as spill:
        sizes = _spill(c.data, sources, output, Path(spill))
        _place(c.data, output, Path(spill), group_bytes=sizes)
    shards = output.close()
    _check_result(c.data, output.funnels)
    manifest = _manifest(c.data, sources, output.funnels, shards)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_table(output.funnels, sources), flush=True)
    return {**_numbers(output.funnels), "seconds": round(time.perf_counter() - began, 3)}


def is_held_out(group: str, percent: float) -> bool:
    """Whether a group is among the held-out `percent` of all groups; a hash of its name alone decides."""
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "big") < percent / 100 * 2**64


def cut_tail(document: Document, *, percent: float, min_bytes: int) -> tuple[Document, Document | None]:
    """Cut a document into its first characters and its last `percent` of them, as nanoGPT's data[:int(n * 0.9)] does.

    A document stays whole (and the second is None) where a part would have fewer than `min_bytes` bytes.
    """
    cut = int(len(document.text) * (100 - percent) / 100)
    parts = [document.text[:cut], document.text[cut:]]
    if min(len(part.encode()) for part in parts) < max(min_bytes, 1):
        return document, None
    head, tail = (replace(document, text=p, id=content_id(p.encode()), size=len(p.encode())) for p in parts)
    return head, tail


def _check_apart(sources: Sequence[Source], workdir: Path) -> None:
    home = workdir.resolve()
    for source in sources:
        around = source.kind == "folder" and home.is_relative_to(source.root.resolve())
        if around or any(file.resolve().is_relative_to(home / "prepare") for file in source.files):
            raise ValueError(
                f"the source {source.spec!r} takes in the run's own folder {workdir}, so the run would read what it "
                "writes: choose another --workdir, or list in data.sources the subfolders that hold text"
            )


def _spill(data: ConfigDict, sources: Sequence[Source], output: Output, spill: Path) -> dict[str, int]:
    """First pass: read everything, reject what can be judged by itself, spill the rest by the first byte of the id.

    Returns the bytes of each group that the hash would hold out.
    """
    sizes: collections.Counter[str] = collections.Counter()
    buckets: dict[str, bytearray] = collections.defaultdict(bytearray)
    for source in sources:
        funnel = output.funnels[source.name]
        documents = read_source(source, text_field=data.text_field)
        for document in _watched(documents, f"reading {source.name}", _text_bytes(source)):
            funnel.read.add(document.size)
            reason = document.reason or _too_short(document, data.min_bytes)
            if reason:
                output.reject(document, reason)
                continue
            if is_held_out(document.group, data.holdout_percent):
                sizes[document.group] += document.size
            bucket = buckets[document.id[:2]]
            bucket += to_row(document)
            if len(bucket) >= BUFFER_BYTES:
                append(spill / document.id[:2], bucket)
    for name, bucket in buckets.items():
        append(spill / name, bucket)
    return sizes


def _too_short(document: Document, min_bytes: int) -> str:
    if not document.text.strip():
        return "empty"
    return f"too short: {document.size} bytes, data.min_bytes={min_bytes}" if document.size < min_bytes else ""


def _place(data: ConfigDict, output: Output, spill: Path, *, group_bytes: dict[str, int]) -> None:
    """Second pass: write each document to its split, in the order of the ids."""
    tails, pending, trained = spill / "tails", bytearray(), set()
    kept = sum(f.read.bytes - sum(count.bytes for count in f.rejected.values()) for f in output.funnels.values())
    for document in _watched(_unique(output, spill), "writing", kept):
        if data.holdout_tail_percent == 0:
            size = group_bytes.get(document.group)
            held_out = size is not None and (not data.holdout_max_bytes or size <= data.holdout_max_bytes)
            output.keep(document, "heldout" if held_out else "train")
            if held_out and document.group != document.id:  # rows are groups of their own; a list of them says nothing
                output.funnels[document.source].heldout_groups.add(document.group)
            continue
        head, tail = cut_tail(document, percent=data.holdout_tail_percent, min_bytes=data.min_bytes)
        output.keep(head, "train")
        trained.add(bytes.fromhex(head.id))
        if tail is not None:
            pending += to_row(tail)
        if len(pending) >= BUFFER_BYTES:
            append(tails, pending)
    append(tails, pending)
    # Only now is it known whether the end of one document is the whole beginning of another.
    for tail in _rows(tails):
        if bytes.fromhex(tail.id) in trained:
            output.reject(tail, "held-out part also trained on")
        else:
            output.keep(tail, "heldout")


def _unique(output: Output, spill: Path) -> Iterator[Document]:
    """The spilled documents in the order of their ids, without duplicates, which are rejected."""
    for bucket in sorted(spill.iterdir()):
        for document, first in _by_id(bucket):
            if first is None:
                yield document
            else:
                output.reject(document, f"duplicate: of {first.source}: {first.path}")
        bucket.unlink()  # so that the disk holds the corpus once, not twice, besides the source


def _rows(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for row in file:
            yield from_row(row)


def _by_id(bucket: Path) -> Iterator[tuple[Document, Document | None]]:
    """A bucket's documents sorted by id, then in the order of reading; a duplicate comes with the first of its id."""
    keys: list[tuple[bytes, int]] = []
    offset, first = 0, None
    with bucket.open("rb") as file:
        for row in file:
            keys.append((row[8:40], offset))  # to_row writes {"id": "..." first
            offset += len(row)
        for _, offset in sorted(keys):
            file.seek(offset)
            document = from_row(file.readline())
            if first is not None and first.id == document.id:
                yield document, first
            else:
                first = document
                yield document, None


def _check_result(data: ConfigDict, funnels: dict[str, Funnel]) -> None:
    total = _total(funnels)
    if total.train.documents == 0:
        reasons = ", ".join(f"{count.documents:,} {kind}" for kind, count in total.rejected.items()) or "none"
        raise ValueError(
            f"no document is left to train on: {total.read.documents:,} read, {total.heldout.documents:,} held out, "
            f"rejected: {reasons}. WORKDIR/prepare/rejected/ has them with their reasons; give other data.sources, or "
            "lower data.min_bytes or data.holdout_percent"
        )
    if total.heldout.documents or not (data.holdout_percent or data.holdout_tail_percent):
        return
    if data.holdout_tail_percent:
        raise ValueError(
            f"data.holdout_tail_percent={data.holdout_tail_percent} held out nothing: all tails are shorter than "
            f"data.min_bytes={data.min_bytes}. Raise the one or lower the other"
        )
    raise ValueError(
        f"none of {total.train.documents:,} documents was held out for evaluation: data.holdout_percent="
        f"{data.holdout_percent} chooses whole files (or rows) by a hash, and these are too few (or all are larger than data.holdout_max_bytes). Set "
        "data.holdout_tail_percent=10 to hold out the last 10% of every document, raise data.holdout_percent, "
        "or set it to 0 to train on everything"
    )


def _total(funnels: dict[str, Funnel]) -> Funnel:
    total = Funnel()
    for funnel in funnels.values():
        pairs = [(total.read, funnel.read), (total.train, funnel.train), (total.heldout, funnel.heldout)]
        pairs += [(total.rejected.setdefault(kind, Count()), count) for kind, count in funnel.rejected.items()]
        for into, count in pairs:
            into.documents += count.documents
            into.bytes += count.bytes
        total.heldout_groups |= funnel.heldout_groups
    return total


def _numbers(funnels: dict[str, Funnel]) -> dict[str, float | int | str]:
    total = _total(funnels)
    rejected = list(total.rejected.values())
    numbers: dict[str, float | int | str] = {
        "documents": total.read.documents,
        "bytes": total.read.bytes,
        "rejected": sum(count.documents for count in rejected),
        "rejected_bytes": sum(count.bytes for count in rejected),
        "duplicates": total.rejected.get("duplicate", Count()).documents,
        "duplicate_bytes": total.rejected.get("duplicate", Count()).bytes,
        "heldout_groups": len(total.heldout_groups),
    }
    for name, funnel in {"": total, **funnels}.items():
        end = f"/{name}" if name else ""
        numbers[f"train_documents{end}"], numbers[f"train_bytes{end}"] = funnel.train.documents, funnel.train.bytes
        numbers[f"heldout_documents{end}"], numbers[f"heldout_bytes{end}"] = (
            funnel.heldout.documents,
            funnel.heldout.bytes,
        )
    return numbers


def _manifest(data: ConfigDict, sources: Sequence[Source], funnels: dict[str, Funnel], shards: Any) -> dict[str, Any]:
    keys = ("text_field", "min_bytes", "holdout_percent", "holdout_max_bytes", "holdout_tail_percent", "shard_bytes")
    rows = {}
    for source in sources:
        row = asdict(funnels[source.name])
        row["rejected"] = dict(sorted(row["rejected"].items()))
        row["heldout_groups"] = sorted(row["heldout_groups"])
        row["languages"] = source.languages or (source.name,)
        rows[source.name] = {"spec": source.spec, "files": len(source.files), "skipped_files": source.skipped, **row}
    return {
        "settings": {"sources": list(data.sources), **{key: data[key] for key in keys}},
        "python": platform.python_version(),
        "total": _numbers(funnels),
        "sources": rows,
        "shards": shards,
    }


def _table(funnels: dict[str, Funnel], sources: Sequence[Source]) -> str:
    """The funnel as a few lines of text."""
    lines = [f"{'prepare':<32}{'documents':>12}{'MB':>10}"]

    def line(label: str, count: Count, note: str = "") -> None:
        lines.append(f"  {label:<30}{count.documents:>12,}{count.bytes / 1e6:>10.2f}{note}")

    for source in sources:
        funnel = funnels[source.name]
        line(f"{source.name}: read", funnel.read)
        for kind, count in sorted(funnel.rejected.items()):
            line(f"- {kind}", count)
        line("= train", funnel.train)
        groups = sorted(funnel.heldout_groups)
        named = ", ".join(groups[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
        line("= held out", funnel.heldout, f"  {named}" if groups else "")
        if source.skipped:
            lines.append(
                f"  skipped files: {', '.join(f'{count:,} {suffix}' for suffix, count in source.skipped.items())}"
            )
    return "\n".join(lines)


def _watched(documents: Iterator[Document], label: str, total: int | None) -> Iterator[Document]:
    """The same documents, with a progress bar while they pass if a person watches; `total` is in bytes, if known."""
    if not sys.stderr.isatty():
        yield from documents
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        waiting = 0
        for document in documents:
            yield document
            waiting += document.size
            if waiting >= PROGRESS_BYTES:
                progress.advance(task, waiting)
                waiting = 0


def _text_bytes(source: Source) -> int | None:
    """About how much text a source holds, from the sizes of its files; None where they do not tell."""
    if not source.files or any(suffix_of(file) in (".jsonl.gz", ".parquet") for file in source.files):
        return None
    return sum(file.stat().st_size for file in source.files)
