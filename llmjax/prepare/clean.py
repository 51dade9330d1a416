"""The task of one part: read it (or take it from the pass before), run the steps on each batch, write it, and count.

`summary.py` adds the counts of the parts up. They become the funnel and the data card.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmjax.prepare import split
from llmjax.prepare.documents import (
    SCHEMA,
    PartWriter,
    Step,
    beginning,
    kept,
    part_path,
    read_batches,
    reject,
    replace,
    side_table,
    take_rows,
    with_ids,
)
from llmjax.prepare.formats.rows import Fields
from llmjax.prepare.parts import Part
from llmjax.prepare.reading import read_part
from llmjax.prepare.steps import make_step
from llmjax.prepare.summary import Summary

PER_DOCUMENT = (
    "extract", "repair", "emoji", "spelling", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb",
    "perplexity", "quality", "toxicity", "personal", "decontaminate",
)  # fmt: skip


def clean_part(
    *,
    part: Part,
    before: str,
    removed: str,
    spans: str,
    steps: Sequence[str],
    settings: dict[str, Any],
    text_field: str,
    min_bytes: int,
    out: str,
) -> dict[str, Any]:
    """Run per-document steps on one part and write it to the folder `out`.

    Args:
        before: folder of the documents of the step before; "": read the sources.
        removed: folder of side tables (ordinal, kind, of, detail) of documents to reject; "": none.
        spans: folder of side tables (ordinal, start, stop) of bytes to take out of texts; "": none.
        settings: those of c.prepare.

    Returns:
        the part's `Summary` as JSON values.
    """
    chosen = SimpleNamespace(**settings)
    if part.kind == "earlier":  # clean already, and there only to be compared with
        steps, min_bytes = [name for name in steps if name == "extract"], 0
    pipeline = [(name, make_step(name, chosen)) for name in steps]
    summary, fields = Summary(), Fields()
    if before:
        batches = _changed(Path(before), part.number, removed, spans, summary)
    else:
        batches = read_part(part, text_field=text_field, max_bytes=settings["max_document_bytes"], fields=fields)
    path = part_path(Path(out), part.number)
    with PartWriter(path, number=part.number, source=part.source) as writer:
        for batch in batches:
            if not before:
                batch = _read(batch, summary)
            for name, step in pipeline:
                batch = _run(name, step, batch, summary)
                if name == "extract" and settings["bias"]:
                    summary.add_bias(batch)
            batch = _check_size(batch, min_bytes, summary)
            batch = _clip(batch)
            keep = kept(batch)
            summary.add_facts(batch)
            groups = split.group_hashes(batch["group"].to_pylist())
            writer.write(batch, sizes=batch["size"].to_numpy(), groups=groups, kept=keep)
    summary.fields = {"rows": fields.rows, "with_field": fields.with_field, "names": sorted(fields.names)}
    return summary.to_json()


def _read(batch: pa.RecordBatch, summary: Summary) -> pa.RecordBatch:
    """Count what was read. Documents that need no extraction have the right ids already."""
    summary.read_documents += batch.num_rows
    summary.read_bytes += pc.sum(batch["size"]).as_py() or 0
    summary.add_rejected("read", batch, np.zeros(batch.num_rows, bool))
    return batch


def _run(name: str, step: Step, batch: pa.RecordBatch, summary: Summary) -> pa.RecordBatch:
    began = time.process_time()
    was_kept, before = kept(batch), batch["text"]
    after = step(batch)
    assert after.num_rows == batch.num_rows and after.schema == SCHEMA, name
    changed = 0
    if after["text"] is not before:
        differ = pc.not_equal(pc.fill_null(after["text"], ""), pc.fill_null(before, "")).to_numpy(zero_copy_only=False)
        changed = int((differ & was_kept).sum())
        after = with_ids(after, differ & kept(after)) if changed else after
    if name == "extract":
        after = _without_data(batch, after)
    summary.add_step(name, before=batch, after=after, was_kept=was_kept, changed=changed)
    summary.add_rejected(name, after, ~was_kept)
    summary.seconds[name] = summary.seconds.get(name, 0.0) + time.process_time() - began
    return after


def _without_data(before: pa.RecordBatch, after: pa.RecordBatch) -> pa.RecordBatch:
    """After the extraction: no raw bytes. Where there is no text, their beginning stands in its place."""
    texts = after["text"].to_pylist() if after["text"].null_count else after["text"]
    for row in np.flatnonzero(after["text"].is_null().to_numpy(zero_copy_only=False)):
        texts[row] = beginning(before["data"][int(row)].as_py())
    rows = after.num_rows
    return replace(after, text=texts, data=pa.nulls(rows, pa.large_binary()), format=[""] * rows)


def _check_size(batch: pa.RecordBatch, min_bytes: int, summary: Summary) -> pa.RecordBatch:
    was_kept = kept(batch)
    reasons: dict[int, str] = {}
    sizes, texts = batch["size"].to_numpy(), batch["text"]
    for row in np.flatnonzero(was_kept & (sizes < max(min_bytes, 64))):
        if not texts[int(row)].as_py().strip():
            reasons[int(row)] = "empty"
        elif sizes[row] < min_bytes:
            reasons[int(row)] = f"too short: {sizes[row]} bytes, data.min_bytes={min_bytes}"
    # Of long texts only those that begin with white space are searched for something else.
    for row in np.flatnonzero(was_kept & (sizes >= max(min_bytes, 64))):
        text = texts[int(row)]
        if text.as_buffer().to_pybytes()[:1].isspace() and not text.as_py().strip():
            reasons[int(row)] = "empty"
    batch = reject(batch, reasons)
    summary.add_rejected("size", batch, ~was_kept)
    return batch


def _clip(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rejected documents keep their beginning only."""
    keep = kept(batch)
    if keep.all():
        return batch
    texts = batch["text"].to_pylist()
    return replace(batch, text=[t if k else beginning(t) for t, k in zip(texts, keep, strict=True)])


def _changed(before: Path, number: int, removed: str, spans: str, summary: Summary) -> Iterator[pa.RecordBatch]:
    """A part as the last pass left it, without the documents and the bytes that were removed since."""
    out = side_table(Path(removed) / f"{number:06d}.parquet") if removed else None
    cut = side_table(Path(spans) / f"{number:06d}.parquet") if spans else None
    reasons = removal_reasons(out, before) if out is not None else {}
    start = 0
    for batch in read_batches(part_path(before, number)):
        stop, was_kept = start + batch.num_rows, kept(batch)
        batch = reject(batch, {row - start: reason for row, reason in reasons.items() if start <= row < stop})
        summary.add_rejected("overall", batch, ~was_kept)
        if cut is not None:
            batch = _without_spans(batch, start, cut)
        yield batch
        start = stop


def removal_reasons(removed: pa.Table, documents: Path) -> dict[int, str]:
    """The reasons of the documents of one part that a step over all documents removed, by row."""
    reasons: dict[int, str] = {}
    origins = _origins(removed["of"].to_numpy(), documents)
    for ordinal, kind, of, detail in zip(
        *(removed[n].to_pylist() for n in ("ordinal", "kind", "of", "detail")), strict=True
    ):
        where = f"of {origins[of]}" if of >= 0 else ""
        reasons[ordinal & 0xFFFFFFFF] = f"{kind}: {' '.join(filter(None, (detail, where)))}"
    return reasons


def _origins(ordinals: np.ndarray, documents: Path) -> dict[int, str]:
    """ "SOURCE: PATH" of documents by their ordinals."""
    found: dict[int, str] = {}
    wanted = np.unique(ordinals[ordinals >= 0])
    for part in np.unique(wanted >> 32):
        chosen = wanted[wanted >> 32 == part]
        table = take_rows(part_path(documents, int(part)), chosen & 0xFFFFFFFF, columns=("source", "path"))
        found |= {
            int(o): f"{s}: {p}"
            for o, s, p in zip(chosen, table["source"].to_pylist(), table["path"].to_pylist(), strict=True)
        }
    return found


def _without_spans(batch: pa.RecordBatch, start: int, cut: pa.Table) -> pa.RecordBatch:
    from llmjax.prepare.dedup.cutting import remove_spans

    rows = (cut["ordinal"].to_numpy() & 0xFFFFFFFF) - start
    inside = (rows >= 0) & (rows < batch.num_rows)
    inside[inside] &= kept(batch)[rows[inside]]
    if not inside.any():
        return batch
    begins, ends = cut["start"].to_numpy()[inside], cut["stop"].to_numpy()[inside]
    return with_ids(replace(batch, text=remove_spans(batch["text"], rows[inside], begins, ends)))
