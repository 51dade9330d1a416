"""The rows of data sets, a page at a time: JSON lines, JSON, CSV, Parquet, token shards, and rows of examples."""

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.data.records import SUFFIXES, records
from llmjax.data.tokens import Stream, load_index
from llmjax.serve.refusals import Refusal
from llmjax.studio.batch import pieces, tokenizer_of
from llmjax.studio.places import Places

MOST_ROWS, MOST_TOKENS = 200, 4096  # of a page
CHARACTERS, ENTRIES = 4000, 100  # of a text, of a list that are shown
INDEX = "index.json"


def listing(places: Places, name: str, place: str) -> dict[str, Any]:
    """The folders and the data files of a folder. Raises Refusal if it is not there."""
    folder = places.path(name, place)
    found: list[dict[str, Any]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or "\\" in entry.name:
                    continue
                full = f"{name}/{entry.name}" if name else entry.name
                try:
                    path = places.path(full, place)
                    kind = _kind(path)
                    size = path.stat().st_size if path.is_file() else None
                except (Refusal, OSError):  # a link that leads out; a file that has just gone
                    continue
                if kind:
                    found.append({"name": full, "title": entry.name, "kind": kind, "size": size})
    except OSError:
        raise Refusal(404, "there is no such folder", code="not_found", param="name") from None
    return {"place": place, "name": name, "entries": found}


def _kind(path: Path) -> str:
    """ "folder", "rows", "tokens" (a stream of shards), "examples"; "" for what has no rows to show."""
    if path.is_dir():
        return "tokens" if _stream(path) else "folder"
    if path.suffix == ".npz" and path.parent.name == "rows":
        return "examples"
    return "rows" if path.name.endswith(SUFFIXES) else ""


def _stream(folder: Path) -> bool:
    """Whether a folder is TOKENS/SPLIT/SOURCE of token shards."""
    return (folder.parents[1] / INDEX).is_file() and any(folder.glob("*.array_record"))


def page(places: Places, name: str, place: str, *, start: int, count: int) -> dict[str, Any]:
    """Some rows of a file, or tokens of a stream, from `start` on.

    Raises:
        Refusal: for a file that is not there, or that has no rows.
        UserError: for a file that cannot be read.
    """
    path = places.path(name, place)
    kind = _kind(path) if path.exists() else ""
    told = {"place": place, "name": name, "kind": kind, "start": start}
    if kind == "rows":
        rows = list(itertools.islice(_rows(path, start), min(count, MOST_ROWS) + 1))
        return told | {"rows": [shortened(row) for row in rows[:count]], "more": len(rows) > count}
    if kind == "tokens":
        return told | _tokens(path, start, min(count, MOST_TOKENS))
    if kind == "examples":
        return told | _examples(path, start, min(count, MOST_ROWS))
    raise Refusal(404, "there is no such file of rows", code="not_found", param="name")


def _rows(path: Path, start: int) -> Iterator[Any]:
    """The rows from number `start` (from 0) on; what is no row says so under "error"."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in itertools.islice((line for line in file if line.strip()), start, None):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    cut = "" if line.endswith(b"\n") else "the line is being written, or was cut: "
                    yield {"error": f"{cut}{error}"}
        return
    if path.suffix == ".parquet":
        yield from _parquet(path, start)
        return
    for _, row in itertools.islice(records(path), start, None):
        yield row if isinstance(row, dict) else {"error": str(row)}


def _parquet(path: Path, start: int) -> Iterator[Any]:
    """The rows of a Parquet file; groups of rows before `start` are not read. Raises Refusal for one that is not whole."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        for number in range(file.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            if start >= size:
                start -= size
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[number]):
                skip = min(start, batch.num_rows)
                start -= skip
                yield from batch.slice(skip).to_pylist()
    except pyarrow.ArrowException as error:
        raise Refusal(409, f"the file is damaged, or being written: {error}", code="unreadable", again=True) from error


def shortened(value: Any) -> Any:
    """A value for JSON, of a size that a page can show."""
    if isinstance(value, str):
        rest = len(value) - CHARACTERS
        return value if rest <= 0 else f"{value[:CHARACTERS]} [{rest:,} more characters]"
    if isinstance(value, dict):
        return {str(key): shortened(one) for key, one in itertools.islice(value.items(), ENTRIES)}
    if isinstance(value, (list, tuple)):
        more = [f"[{len(value) - ENTRIES:,} more]"] if len(value) > ENTRIES else []
        return [*(shortened(one) for one in value[:ENTRIES]), *more]
    return value if isinstance(value, (bool, int, float, type(None))) else shortened(str(value))


def _tokens(folder: Path, start: int, count: int) -> dict[str, Any]:
    tokens = folder.parents[1]
    stream = Stream(load_index(tokens), folder.parent.name, folder.name)
    end = min(start + count, stream.tokens)
    ids = stream.read(min(start, end), end).tolist()
    return {"pieces": pieces(tokenizer_of(tokens.parents[1]), ids), "total": stream.tokens, "more": end < stream.tokens}


def _examples(path: Path, start: int, count: int) -> dict[str, Any]:
    from llmjax.post.rows import load

    run = path.parents[1]
    store, tokenizer = load(run, path.stem), tokenizer_of(run)
    end = min(start + count, len(store))
    groups = []
    for number in range(start, end):
        examples = store.examples(number)
        parts = [pieces(tokenizer, e.ids.tolist(), e.weights.tolist()) for e in examples]
        ranks = store.ranks[store.first[number] : store.first[number + 1]].tolist()
        groups.append(
            {
                "ids": [e.ids.tolist() for e in examples],
                "parts": parts,
                "ranks": ranks,
                "columns": shortened(store.columns[number]),
            }
        )
    return {"groups": groups, "total": len(store), "more": end < len(store)}
