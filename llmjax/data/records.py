"""Rows of small files that people make by hand or download: JSON lines, JSON, CSV and Parquet, each row a dict.

Some sources are no files: `MADE` names what is made of the standard library.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import importlib
import io
import json
import platform
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmjax.errors import UserError

MADE = {f"stdlib-{name}": f"llmjax.data.stdlib_questions:{name}" for name in ("answers", "pairs", "prompts", "test")}
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".csv.gz")
ESCAPED = re.compile("[\udc80-\udcff]")  # what stands for a byte that is no UTF-8
NO_UTF8 = "no UTF-8: save the file in this encoding"


def files_of(sources: Iterable[str]) -> list[Path]:
    """The files of `data.sources`: files, folders, globs and names of MADE. Raises UserError where there are none."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif path.is_file() or source in MADE:
            inside = [path]
        else:
            inside = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if name.endswith(SUFFIXES)]
        if not inside:
            raise UserError(f"data.sources: {source!r} has no file of conversations ({', '.join(SUFFIXES)})")
        found += inside
    return found


def records(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """(number from 1, row) of a file of any known suffix; a text in place of a row says why there is none."""
    name = file.name
    if str(file) in MADE and not file.exists():
        yield from enumerate(_made(name)(), start=1)
        return
    if not name.endswith(SUFFIXES):
        raise UserError(f"{file}: conversations are read from {', '.join(SUFFIXES)}")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(file)
            return
        opened = gzip.open if name.endswith(".gz") else open
        with opened(file, "rb") as stream:  # PowerShell writes UTF-16
            wide = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if wide else "utf-8-sig"
        with opened(file, "rt", encoding=encoding, errors="surrogateescape", newline="") as stream:
            if ".csv" in name:
                yield from _table(stream)
            elif ".jsonl" in name:
                yield from _lines(stream)
            else:
                yield from _whole(file, stream.read())
    except (OSError, EOFError, csv.Error, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def state(file: Path) -> list[Any]:
    """What changes when the rows of a file may have changed: its name, size and time; for names of MADE, their makers."""
    if str(file) in MADE and not file.exists():
        source = Path(importlib.import_module(MADE[file.name].partition(":")[0]).__file__ or "").read_bytes()
        return [file.name, platform.python_version(), hashlib.blake2b(source, digest_size=8).hexdigest()]
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def _made(name: str) -> Any:
    module, _, function = MADE[name].partition(":")
    return getattr(importlib.import_module(module), function)


def _table(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    csv.field_size_limit(1 << 30)
    reader, number = csv.DictReader(lines, strict=True), 0  # not strict, an open quote takes in the rest of the file
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for number, row in enumerate(reader, start=1):
            if None in row:
                yield number, "a row with more fields than the header: put quotes around texts with commas"
            elif any(ESCAPED.search(value) for value in row.values() if value):
                yield number, NO_UTF8
            else:
                yield number, row
    except csv.Error as error:
        raise csv.Error(f'row {number + 1}: {error}; within quotes write a quote twice, ""') from error


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(lines, start=1):
        text = line.lstrip("\ufeff")  # of files that were joined
        if not text.strip():
            continue
        if ESCAPED.search(text):
            yield number, NO_UTF8
            continue
        try:
            made = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, f"no JSON: {error}"
            continue
        yield number, made if isinstance(made, dict) else f"no JSON object but {_kind(made)}"


def _whole(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """A JSON file: a list of rows, or, as some are, lines of JSON after all."""
    try:
        made = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n{" in text:
            yield from _lines(io.StringIO(text))  # `splitlines` would cut at U+2028 too, which JSON allows in a text
            return
        raise UserError(f"{file} is no JSON: {error}") from error
    spoilt = ESCAPED.search(text) is not None
    for number, row in enumerate(made if isinstance(made, list) else [made], start=1):
        if not isinstance(row, dict):
            yield number, f"no JSON object but {_kind(row)}"
        elif spoilt and ESCAPED.search(json.dumps(row, ensure_ascii=False)):
            yield number, NO_UTF8
        else:
            yield number, row


def _parquet(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: _value(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _value(value: Any) -> Any:
    """A value of Parquet as JSON would have it.

    Every struct of a column has the fields of all others there, null where its own row had none. Texts may be bytes, as
    Spark writes them.
    """
    if isinstance(value, dict):
        return {name: _value(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and all(isinstance(one, tuple) and len(one) == 2 for one in value):  # a map
        return {str(name): _value(inner) for name, inner in value}
    if isinstance(value, list):
        return [_value(inner) for inner in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
