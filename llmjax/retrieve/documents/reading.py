"""The texts of files, by the readers of prepare: text, Markdown, code, HTML, PDF, mail, rows of JSONL and Parquet."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmjax.errors import UserError
from llmjax.prepare import reading, sources
from llmjax.prepare.documents import well_formed
from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.extraction import Options, text_of
from llmjax.prepare.formats.rows import Fields
from llmjax.prepare.formats.text import line_ends
from llmjax.prepare.parts import Item, Part

OPTIONS = Options(encodings=("utf-8", "detect"))
HASHED_BYTES = 1 << 20  # at a time


@dataclass(frozen=True)
class File:
    """A file: its path within the folder that was given, and where it lies."""

    path: str
    place: str

    @property
    def stamp(self) -> str:
        """Size and time of the last change: a file of the same stamp is not read again."""
        found = Path(self.place).stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def digest(self) -> str:
        """A hash of its bytes."""
        made = hashlib.blake2b(digest_size=16)
        with open(self.place, "rb") as opened:
            while data := opened.read(HASHED_BYTES):
                made.update(data)
        return made.hexdigest()


def files_of(path: Path) -> list[File]:
    """The readable files of a folder, or one file, in the order of their paths.

    Raises UserError for a path without a readable file, and for a format whose package is not installed.
    """
    try:
        (source,) = sources.resolve_sources([f"docs={path}"])
        sources.check_extras([source])
    except UserError as error:
        raise UserError(str(error).removeprefix("data.sources: ")) from error
    return [File(_written(sources.relative(source, file)), file) for file in source.files]


def _written(path: str) -> str:
    """The path in UTF-8. Bytes of a name that are none become escapes, so that different names differ."""
    return path.encode("utf-8", "backslashreplace").decode()


def texts_of(file: File) -> Iterator[tuple[str, str, str]]:
    """(path, text, reason) of each document of a file; a document without a text has the reason."""
    part = Part(0, 0, "docs", "folder", (Item(file.place, file.path),), 0)
    for batch in reading.read_part(part, text_field="text", max_bytes=OPTIONS.max_document_bytes, fields=Fields()):
        for row in batch.to_pylist():
            text, reason = row["text"], row["reason"]
            if not reason and row["format"]:
                try:
                    text, _ = text_of(row["data"] or b"", row["format"], OPTIONS)
                except RejectedError as rejected:
                    reason = str(rejected)
            yield row["path"], "" if reason else line_ends(well_formed(text or "")), reason
