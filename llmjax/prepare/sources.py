"""Finds what `data.sources` names: the standard library, files, folders, globs, parallel text and fsspec URLs.

Nothing is read here. A wrong setting (a path that is not there, a folder without a readable file, an extra that is not
installed) is a UserError that says what to do. `reading.py` reads, and never stops at a bad document.
"""

import collections
import difflib
import functools
import glob
import hashlib
import importlib.util
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from llmjax.data import parallel_text
from llmjax.errors import UserError

CODE_SUFFIXES = (
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go",
    ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".swift", ".m", ".sh", ".bash", ".ps1", ".sql", ".tex",
)  # fmt: skip
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", *CODE_SUFFIXES)
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
WARC_SUFFIXES = (".warc", ".wet")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys(HTML_SUFFIXES, "html"),
    **dict.fromkeys(ROW_SUFFIXES, "rows"),
    **dict.fromkeys(WARC_SUFFIXES, "warc"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".ipynb": "notebook",
    ".pdf": "pdf",
    ".eml": "mail",
    ".mbox": "mailbox",
}
# Among the files of a folder these are mostly settings and figures: they are read where a source names them, or packed.
NAMED = (".json", ".csv", ".tsv")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", *(f".tar{end}" for end in COMPRESSED))
TABLES = ("parquet", "arrow")  # read from several places at once, so not while they are unpacked
CACHES = ("cache-", "tmp")  # beginnings of the names of files that `datasets` makes beside those of a saved data set
MODULES = {"html": "resiliparse", "warc": "fastwarc", "pdf": "pypdfium2"}  # of the extra `data`
STDLIB = ("stdlib", "stdlib-tests")
Kind = Literal["stdlib", "file", "folder", "glob", "parallel", "url", "earlier"]


@dataclass(frozen=True)
class Source:
    """One entry of `data.sources`: its files in the order of their paths, and the number of skipped files by suffix."""

    name: str
    spec: str
    kind: Kind
    root: str = ""  # paths of documents are relative to this folder
    files: tuple[str, ...] = ()  # local paths or URLs
    skipped: dict[str, int] = field(default_factory=dict)
    languages: tuple[str, ...] = ()  # the two of parallel text; else the language is the source's name


def resolve_sources(specs: Sequence[str]) -> list[Source]:
    """Find the files of each source. Nothing is read.

    Args:
        specs: "stdlib", "stdlib-tests", a file, a folder (recursively), a glob, a URL that fsspec knows (gs://, s3://,
            https:// of a file, a folder or a glob), or "name=" and one of these. Without a name, a source is called
            after the file or the folder. Parallel text is "first|second=file|file", two files of which line n of one is
            the translation of line n of the other.

    Raises:
        UserError: for a path that is not there, a folder or glob without a readable file, a name that is used twice
            or that cannot be a file's name.
    """
    sources: dict[str, Source] = {}
    for spec in specs:
        source = _resolve(spec)
        # Some file systems take A and a for the same name.
        twin = sources.setdefault(source.name.casefold(), source)
        if twin is not source:
            raise UserError(
                f"data.sources: {twin.spec!r} and {spec!r} are both called {source.name!r}; give one another name: "
                f"'{source.name}2={spec.partition('=')[2] or spec}'"
            )
    return list(sources.values())


def earlier_runs(runs: Sequence[str]) -> list[Source]:
    """The output of other runs, as sources before all others: new documents must not repeat it.

    Raises UserError for a folder without finished preparation.
    """
    found = []
    for run in runs:
        folder = Path(run).expanduser() / "prepare"
        if not (folder / "manifest.json").is_file():
            raise UserError(
                f"prepare.earlier: {run} is no run whose preparation was finished: {folder} has no manifest.json"
            )
        files = sorted(str(file) for split in ("train", "heldout") for file in (folder / split).glob("*.jsonl"))
        found.append(Source(f"earlier:{Path(run).name}", run, "earlier", root=str(folder), files=tuple(files)))
    return found


def sources_fingerprint(specs: Sequence[str]) -> str:
    """A digest of the names, sizes and modification times of all files (and of the Python version for "stdlib").

    It changes when a file is added, removed or written to. Raises UserError as `resolve_sources` does.
    """
    return fingerprint(resolve_sources(specs))


def fingerprint(sources: Iterable[Source]) -> str:
    """The digest of `sources_fingerprint`, of sources that are resolved already."""
    parts: list[object] = []
    for source in sources:
        parts.append([source.name, sys.version if source.kind == "stdlib" else ""])
        parts += [[relative(source, file), *_version(file)] for file in source.files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_extras(sources: Iterable[Source]) -> None:
    """Raise UserError for the first file whose format needs a package that is not installed."""
    first: dict[str, str] = {}  # file of each module
    for file in (file for source in sources for file in source.files):
        kind, compression = format_of(file)
        for module in filter(None, (MODULES.get(kind, ""), "zstandard" if compression == ".zst" else "")):
            first.setdefault(module, file)
    for module, file in first.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{file}: {suffix_of(file)} files need {module}: pip install 'llmjax[data]'")


def suffix_of(file: str) -> str:
    """The suffix that decides how a file is read, in lower case. ".jsonl.gz" is one suffix."""
    stem, last = posixpath.splitext(posixpath.basename(file.lower()))
    return posixpath.splitext(stem)[1] + last if last in COMPRESSED else last


def format_of(file: str) -> tuple[str, str]:
    """A value of FORMATS, "" for an unknown suffix; and one of COMPRESSED or ""."""
    suffix = suffix_of(file)
    compression = next((end for end in COMPRESSED if suffix.endswith(end)), "")
    return FORMATS.get(suffix.removesuffix(compression), ""), compression


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a local path."""
    return "://" in location


def size_of(file: str) -> int:
    """Bytes of a file; 0 where a server does not say."""
    return int(_file_system(file).info(file).get("size") or 0) if is_url(file) else os.stat(file).st_size


def open_file(file: str) -> Any:
    """Open a local path or URL for reading bytes. OSError if it cannot be read."""
    return _file_system(file).open(file, "rb") if is_url(file) else open(file, "rb")


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Name the file in errors of reading. Those of a disk that fails in the middle do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, file) from error


def relative(source: Source, file: str) -> str:
    """A file's path within its source, with forward slashes."""
    if is_url(file):
        return posixpath.relpath(file, source.root)
    return _within(file, source.root)


def _within(file: str, root: str) -> str:
    """The path of a local file within a folder. Of a million files `pathlib` would take a minute."""
    start = root if root.endswith(os.sep) else root + os.sep
    if os.sep == "/" and file.startswith(start):
        return file[len(start) :]
    return Path(file).relative_to(root).as_posix()


def _file_system(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"data.sources: {url}: {error}") from error


def _version(file: str) -> list[object]:
    if not is_url(file):
        stat = os.stat(file)
        return [stat.st_size, stat.st_mtime_ns]
    info = _file_system(file).info(file)
    return [info.get("size"), *(str(info[key]) for key in ("etag", "ETag", "mtime", "generation") if key in info)]


def _resolve(spec: str) -> Source:
    pair = parallel_text.parse_spec(spec)
    if pair is not None:
        folder = os.path.commonpath([file.resolve().parent for file in pair.files])
        pair_files = tuple(str(file.resolve()) for file in pair.files)
        return Source(pair.name, spec, "parallel", root=folder, files=pair_files, languages=pair.languages)
    named = re.fullmatch(r"(\w[\w.-]*)=(.+)", spec, re.ASCII)
    if not named and "=" in spec and not is_url(spec) and not Path(spec).exists() and not glob.has_magic(spec):
        raise UserError(
            f"data.sources: {spec!r}: a source's name takes letters, digits, '_', '-' and '.' only: NAME=PATH"
        )
    name, where = (named[1], named[2]) if named and not Path(spec).exists() else ("", spec)
    if where in STDLIB:
        return Source(name or where, where, "stdlib")
    if is_url(where):
        return _resolve_url(spec, name, where)
    path = Path(where).expanduser()
    skipped: collections.Counter[str] = collections.Counter()
    kind: Kind
    files: Sequence[str | Path]
    if path.is_dir():
        kind, root, files, called = "folder", path, list(_walk(path, skipped)), path.resolve().name
    elif path.exists():
        called = path.name.removesuffix(format_of(path.name)[1]).rpartition(".")[0] or path.name
        kind, root, files = "file", path.parent, [path]
    elif glob.has_magic(where):
        parts = path.parts
        root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        matches = (Path(match) for match in glob.iglob(str(path), recursive=True))
        literal = not glob.has_magic(path.suffix) and path.suffix  # *.log asks for these files, whatever they are
        found = [file for file in matches if file.is_file() and (literal or _is_known(file.name, skipped))]
        files = [file for file in found if not _is_in_loop(file.parent)]
        kind, called = "glob", root.resolve().name
    else:
        raise UserError(f"data.sources: there is no {where}{_nearest(path)}")
    if not files:
        _no_files(where, skipped)
    names = set(map(str, files))
    _check_archives(names)
    ordered = sorted(names, key=lambda file: _within(file, str(root)))
    return Source(
        name or _name(called), spec, kind, root=str(root), files=tuple(ordered), skipped=dict(sorted(skipped.items()))
    )


def _resolve_url(spec: str, name: str, where: str) -> Source:
    system = _file_system(where)
    protocol = where.partition("://")[0]
    skipped: collections.Counter[str] = collections.Counter()
    bare = where.rstrip("/")
    if glob.has_magic(where.partition("://")[2]) and not protocol.startswith("http"):
        parts = where.split("/")
        root = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        found = [system.unstrip_protocol(file) for file in system.glob(where)]
        files = [file for file in found if format_of(where)[0] or _is_known(file, skipped)]
    elif not protocol.startswith("http") and system.isdir(where):
        root = system.unstrip_protocol(system._strip_protocol(bare))
        files = [f for f in map(system.unstrip_protocol, system.find(where)) if _is_known(f, skipped)]
    elif system.exists(where):
        root, files = posixpath.dirname(bare), [bare]
    else:
        raise UserError(f"data.sources: there is no {where}: check the address, and that you may read it")
    if not files:
        _no_files(where, skipped)
    _check_archives(files)
    called = posixpath.basename(root if len(files) > 1 else posixpath.splitext(bare)[0])
    return Source(
        name or _name(called), spec, "url", root=root, files=tuple(sorted(set(files))),
        skipped=dict(sorted(skipped.items())),
    )  # fmt: skip


def _name(called: str) -> str:
    return re.sub(r"[^\w.-]|^[.-]", "_", called, flags=re.ASCII) or "files"


def _walk(folder: Path, skipped: collections.Counter[str]) -> Iterator[str]:
    """Readable files below a folder. Hidden folders (.git, .venv) and linked ones are counted, not entered."""

    def fail(error: OSError) -> NoReturn:  # os.walk is silent about folders that it may not list
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in folders:
            if name.startswith("."):
                skipped["hidden"] += 1
            elif Path(parent, name).is_symlink():
                skipped["linked folder"] += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = os.path.join(parent, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not os.path.isfile(file):  # a pipe would block, a dangling link would fail
                skipped["no regular file"] += 1
            elif _is_known(name, skipped):
                yield file


@functools.lru_cache(maxsize=1 << 16)
def _is_in_loop(folder: Path) -> bool:
    """Whether the way to a folder goes through a link to a folder that the link is in."""
    if folder.is_symlink() and folder.absolute().parent.resolve().is_relative_to(folder.resolve()):
        return True
    return folder.parent != folder and _is_in_loop(folder.parent)


def _check_archives(files: Iterable[str]) -> None:
    for file in files:
        if suffix_of(file) in ARCHIVES:
            raise UserError(f"data.sources: {file}: archives are not read: unpack it, and give the folder")
        kind, compression = format_of(file)
        if kind in TABLES and compression:
            raise UserError(f"data.sources: {file}: a packed {kind} file is not read: unpack it")


def _is_known(file: str, skipped: collections.Counter[str]) -> bool:
    kind, compression = format_of(file)
    if kind == "arrow" and posixpath.basename(file).startswith(CACHES):
        skipped["cache"] += 1
        return False
    is_known = bool(kind) and suffix_of(file) not in NAMED and not (kind in TABLES and compression)
    if not is_known:
        skipped[suffix_of(file) or "no suffix"] += 1
    return is_known


def _no_files(where: str, skipped: collections.Counter[str]) -> NoReturn:
    if glob.has_magic(where) and not skipped:
        raise UserError(f"data.sources: no file matches {where}; check the pattern (subfolders need **/)")
    found = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5)) or "nothing"
    mend = "put text there, or give another path"
    if any(suffix.startswith(".") for suffix in skipped):
        suffix = next(suffix for suffix, _ in skipped.most_common() if suffix.startswith("."))
        pattern = Path(glob.escape(where)) / "**" / f"*{suffix}"
        mend = f"if those are text, give them by a glob, such as {pattern}"
        if suffix in ARCHIVES:
            mend = "unpack those, and give the folder"
    kinds = " ".join(kind for kind in FORMATS if kind not in NAMED)
    raise UserError(
        f"data.sources: {where} has no file that can be read ({kinds}, and all with {', '.join(COMPRESSED)}); found "
        f"{found}; {mend}"
    )


def _nearest(path: Path) -> str:
    """A hint: the closest name in the last folder of the path that exists."""
    missing = path.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir())
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.0)
    return f"; did you mean {missing.parent / near[0]}?" if near else f"; {missing.parent} is empty"
