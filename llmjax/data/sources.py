"""Reads what `data.sources` names: the standard library, files, folders and globs, one document at a time.

A reader never stops at a bad document: it yields it with the reason, and the stage keeps it aside. It stops, with a
ValueError that says what to do, where the user's setting is wrong: a path that is not there, a folder without a
readable file, a field that no row has, an extra that is not installed. The largest document must fit in memory.
"""

import collections
import difflib
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from llmjax.data import parallel_text, stdlib_corpus
from llmjax.data.documents import Document, content_id

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz")
EXTRA_MODULES = {".html": "resiliparse", ".htm": "resiliparse", ".parquet": "pyarrow"}
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *EXTRA_MODULES)
STDLIB = ("stdlib", "stdlib-tests")
BOM = "\ufeff"
Kind = Literal["stdlib", "file", "folder", "glob", "parallel"]


@dataclass(frozen=True)
class Source:
    """One entry of `data.sources`, resolved: its files in the order of their paths, and what was skipped, by suffix."""

    name: str
    spec: str
    kind: Kind
    root: Path = Path()  # paths of documents are relative to this folder
    files: tuple[Path, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    languages: tuple[str, ...] = ()  # the two of parallel text; else the language is the source's name


def resolve_sources(specs: Sequence[str]) -> list[Source]:
    """Find the files of each source; nothing is read.

    Args:
        specs: "stdlib", "stdlib-tests", a file, a folder (recursively), a glob, or "name=" and one of these. Without a name, a source
            is called after the file or the folder. Parallel text is "first|second=file|file", two files of which line n
            of one is the translation of line n of the other.

    Raises:
        ValueError: for a path that is not there, a folder or glob without a readable file, a name that is used twice
            or that cannot be a file's name.
    """
    sources: dict[str, Source] = {}
    for spec in specs:
        source = _resolve(spec)
        # Some file systems take A and a for the same name.
        twin = sources.setdefault(source.name.casefold(), source)
        if twin is not source:
            raise ValueError(
                f"data.sources: {twin.spec!r} and {spec!r} are both called {source.name!r}; give one another name: "
                f"'{source.name}2={spec.partition('=')[2] or spec}'"
            )
    return list(sources.values())


def sources_fingerprint(specs: Sequence[str]) -> str:
    """A digest of the names, sizes and modification times of all files (and of the Python version for "stdlib").

    It changes when a file is added, removed or written to. Raises ValueError as `resolve_sources` does.
    """
    parts: list[object] = []
    for source in resolve_sources(specs):
        stats = [(_relative(source, file), file.stat()) for file in source.files]
        parts.append([source.name, sys.version if source.kind == "stdlib" else ""])
        parts += [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_extras(sources: Iterable[Source]) -> None:
    """Raise ValueError for the first file whose format needs a package that is not installed."""
    for source in sources:
        for file in source.files:
            module = EXTRA_MODULES.get(suffix_of(file))
            if module and importlib.util.find_spec(module) is None:
                raise ValueError(f"{file}: {suffix_of(file)} files need {module}: pip install 'llmjax[data]'")


def read_source(source: Source, *, text_field: str) -> Iterator[Document]:
    """All documents of a source, those that cannot be used with a reason; a fixed order, one in memory at a time.

    Texts lose a byte order mark and have "\\n" line ends; otherwise they are as in the file.

    Raises:
        ValueError: if not one of the source's rows (.jsonl, .parquet) has `text_field`.
        OSError: if a file cannot be read.
    """
    if source.kind == "stdlib":
        yield from _read_stdlib(source)
        return
    if source.kind == "parallel":
        for number, data, reason in parallel_text.read_pairs(*source.files):
            where = f"{_relative(source, source.files[0])}:{number}"
            yield _rejected(source, "", where, data, reason) if reason else _from_bytes(source, "", where, data)
        return
    rows = _RowCount()
    for file in source.files:
        suffix, path = suffix_of(file), _relative(source, file)
        if suffix in ROW_SUFFIXES:
            yield from _read_jsonl(source, file, path, text_field, rows)
        elif suffix == ".parquet":
            yield from _read_parquet(source, file, path, text_field, rows)
        else:
            yield _from_bytes(source, path, path, file.read_bytes(), is_html=suffix in EXTRA_MODULES)
    if rows.total and not rows.with_field:
        near = difflib.get_close_matches(text_field, rows.fields, n=1)
        mend = f"set data.text_field={near[0]}" if near else "set data.text_field to one of these"
        raise ValueError(
            f"source {source.name!r}: none of its {rows.total:,} rows has the field {text_field!r}; they have "
            f"{', '.join(sorted(rows.fields)) or 'no fields'}; {mend}"
        )


def suffix_of(file: Path) -> str:
    """The suffix that decides how a file is read, in lower case; ".jsonl.gz" counts as one."""
    name = file.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else Path(name).suffix


def _resolve(spec: str) -> Source:
    pair = parallel_text.parse_spec(spec)
    if pair is not None:
        root = Path(os.path.commonpath([file.resolve().parent for file in pair.files]))
        files = [file.resolve() for file in pair.files]
        return Source(pair.name, spec, "parallel", root=root, files=tuple(files), languages=pair.languages)
    named = re.fullmatch(r"(\w[\w.-]*)=(.+)", spec, re.ASCII)
    if not named and "=" in spec and not Path(spec).exists() and not glob.has_magic(spec):
        raise ValueError(
            f"data.sources: {spec!r}: a source's name takes letters, digits, '_', '-' and '.' only: NAME=PATH"
        )
    name, where = (named[1], named[2]) if named and not Path(spec).exists() else ("", spec)
    if where in STDLIB:
        return Source(name or where, where, "stdlib")
    path = Path(where).expanduser()
    skipped: collections.Counter[str] = collections.Counter()
    kind: Kind
    if path.is_dir():
        kind, root, files, called = "folder", path, list(_walk(path, skipped)), path.resolve().name
    elif path.exists():
        called = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
        kind, root, files = "file", path.parent, [path]
    elif glob.has_magic(where):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        matches = (Path(match) for match in glob.iglob(str(path), recursive=True))
        literal = not glob.has_magic(path.suffix) and path.suffix  # *.rs asks for these files, whatever they are
        files = [file for file in matches if file.is_file() and (literal or _is_known(file, skipped))]
        kind, called = "glob", root.resolve().name
    else:
        raise ValueError(f"data.sources: there is no {where}{_nearest(path)}")
    if not files:
        _no_files(where, skipped)
    ordered = sorted(set(files), key=lambda file: file.relative_to(root).as_posix())
    name = name or re.sub(r"[^\w.-]|^[.-]", "_", called, flags=re.ASCII) or "files"
    return Source(name, spec, kind, root=root, files=tuple(ordered), skipped=dict(sorted(skipped.items())))


def _walk(folder: Path, skipped: collections.Counter[str]) -> Iterator[Path]:
    """Readable files below a folder; hidden ones (.git, .venv) and linked folders are counted, not entered."""

    def fail(error: OSError) -> NoReturn:  # without it os.walk leaves out what it may not list, silently
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in folders:
            if name.startswith("."):
                skipped["hidden"] += 1
            elif Path(parent, name).is_symlink():
                skipped["linked folder"] += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(parent, name) for name in names):
            if file.name.startswith("."):
                skipped["hidden"] += 1
            elif not file.is_file():  # a pipe would block, a dangling link would fail
                skipped["no regular file"] += 1
            elif _is_known(file, skipped):
                yield file


def _is_known(file: Path, skipped: collections.Counter[str]) -> bool:
    known = suffix_of(file) in SUFFIXES
    if not known:
        skipped[suffix_of(file) or "no suffix"] += 1
    return known


def _no_files(where: str, skipped: collections.Counter[str]) -> NoReturn:
    if glob.has_magic(where) and not skipped:
        raise ValueError(f"data.sources: no file matches {where}; check the pattern (subfolders need **/)")
    found = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5)) or "nothing"
    mend = "put text there, or give another path"
    if any(suffix.startswith(".") for suffix in skipped):
        suffix = next(suffix for suffix, _ in skipped.most_common() if suffix.startswith("."))
        mend = f"if those are text, give them by a glob, such as {Path(glob.escape(where)) / '**' / f'*{suffix}'}"
    raise ValueError(
        f"data.sources: {where} has no file that can be read ({' '.join(SUFFIXES)}); found {found}; {mend}"
    )


def _nearest(path: Path) -> str:
    """The closest name that exists where the path leaves the existing folders."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir())
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.0)
    return f"; did you mean {missing.parent / near[0]}?" if near else f"; {missing.parent} is empty"


def _relative(source: Source, file: Path) -> str:
    # A file's name may be no UTF-8, which no JSON file could hold.
    return file.relative_to(source.root).as_posix().encode("utf-8", "replace").decode()


def _document(source: Source, group: str, path: str, text: str) -> Document:
    """A document from text as it was stored: line ends and the byte order mark put right, or rejected."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.removeprefix(BOM)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        reason = f"invalid Unicode: lone surrogate at character {error.start}"
        return _rejected(source, group, path, text.encode("utf-8", "replace"), reason)
    digest = content_id(data)
    reason = "" if "\0" not in text else f"binary: NUL at byte {data.index(0)}"
    return Document(source.name, group or digest, path, text, digest, len(data), reason)


def _rejected(source: Source, group: str, path: str, data: bytes, reason: str) -> Document:
    digest = content_id(data)
    # The first bytes are enough to recognise it by.
    return Document(
        source.name, group or digest, path, data[:4000].decode("utf-8", "replace"), digest, len(data), reason
    )


def _from_bytes(source: Source, group: str, path: str, data: bytes, *, is_html: bool = False) -> Document:
    nul = data.find(0)
    if nul >= 0:
        return _rejected(source, group, path, data, f"binary: NUL at byte {nul}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return _rejected(source, group, path, data, f"invalid UTF-8: at byte {error.start}")
    return _document(source, group, path, _html_text(text) if is_html else text)


def _html_text(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text  # an extra; check_extras has said so by now

    return extract_plain_text(html, main_content=True, alt_texts=False)


def _read_stdlib(source: Source) -> Iterator[Document]:
    for entry in stdlib_corpus.test_entries() if source.spec == "stdlib-tests" else stdlib_corpus.entries():
        if entry.file:
            yield _from_bytes(source, entry.group, entry.path, entry.file.read_bytes())
        else:
            yield _document(source, entry.group, entry.path, entry.text)


@dataclass
class _RowCount:
    total: int = 0
    with_field: int = 0
    fields: set[str] = field(default_factory=set)

    def add(self, fields: Collection[str], text_field: str) -> bool:
        """Count a row and say whether it has the text field."""
        self.total += 1
        has_field = text_field in fields
        self.with_field += has_field
        if not self.with_field and len(self.fields) < 100:  # only for the message of a source without the field
            self.fields.update(fields)
        return has_field


def _read_jsonl(source: Source, file: Path, path: str, text_field: str, rows: _RowCount) -> Iterator[Document]:
    for number, line in enumerate(_lines(file), start=1):
        where = f"{path}:{number}"
        if isinstance(line, ValueError):
            yield _rejected(source, "", where, b"", str(line))
            return
        if number == 1:
            line = line.removeprefix(BOM.encode())
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield _rejected(source, "", where, line, f"invalid UTF-8: at byte {error.start} of line {number}")
            continue
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            yield _rejected(source, "", where, line, f"broken JSON: line {number}: {error}")
            continue
        if not isinstance(row, dict):
            yield _rejected(
                source, "", where, line, f"broken JSON: line {number} is no object but {type(row).__name__}"
            )
        elif not rows.add(row, text_field):
            yield _rejected(source, "", where, line, f"no text field: line {number} lacks {text_field!r}")
        elif not isinstance(row[text_field], str):
            reason = f"text is no string: line {number} holds {type(row[text_field]).__name__}"
            yield _rejected(source, "", where, line, reason)
        else:
            yield _document(source, "", where, row[text_field])


def _lines(file: Path) -> Iterator[bytes | ValueError]:
    """The lines of a file, gunzipped where need be; a ValueError is the last item if the gzip data is damaged."""
    with file.open("rb") as raw:
        if suffix_of(file) != ".jsonl.gz":
            yield from raw
            return
        try:
            yield from gzip.GzipFile(fileobj=raw)
        except EOFError:
            yield ValueError("broken gzip: the file is truncated")
        except (gzip.BadGzipFile, zlib.error) as error:
            yield ValueError(f"broken gzip: {error}")


def _read_parquet(source: Source, file: Path, path: str, text_field: str, rows: _RowCount) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            fields = table.schema_arrow.names
            columns = [text_field] if text_field in fields else []
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                texts = batch.column(0).to_pylist() if columns else [None] * batch.num_rows
                for text in texts:
                    number += 1
                    where = f"{path}:{number}"
                    if not rows.add(fields, text_field):
                        yield _rejected(source, "", where, b"", f"no text field: row {number} lacks {text_field!r}")
                        continue
                    if isinstance(text, str):
                        yield _document(source, "", where, text)
                    else:
                        reason = f"text is no string: row {number} holds {type(text).__name__}"
                        yield _rejected(source, "", where, repr(text).encode(), reason)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        yield _rejected(source, "", path, b"", f"broken parquet: {str(error).splitlines()[0]}")
