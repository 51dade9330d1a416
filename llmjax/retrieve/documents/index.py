"""The index of a folder of documents: their texts, blocks, words and vectors, in one SQLite file.

SQLite's FTS5 ranks blocks by BM25 (Robertson and Zaragoza 2009; k1 1.2, b .75) over words stemmed by Porter's rules. An
update is one transaction: a process that is killed leaves the index as it was. Only files whose size, time and content
changed are read again. Vectors belong to an encoder and are made for the blocks that have none of it yet.
"""

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.retrieve.documents import blocks as cutting
from llmjax.retrieve.documents import reading
from llmjax.retrieve.documents.blocks import Block
from llmjax.retrieve.documents.reading import File
from llmjax.retrieve.documents.words import ASKING_WORDS, query_words

FILE = "index.sqlite"
VERSION = "1"  # of the tables and of how texts are cut: an index of another version is made anew
TOKENS = "porter unicode61 remove_diacritics 2"
RRF = 60  # Cormack et al. 2009
DEPTH = 100  # blocks of each ranking that are fused
TABLES = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT, digest TEXT);
CREATE TABLE documents (id INTEGER PRIMARY KEY, file TEXT, path TEXT, text TEXT);
CREATE INDEX documents_of ON documents (file);
CREATE TABLE blocks (id INTEGER PRIMARY KEY, document INTEGER, start INTEGER, stop INTEGER, heading TEXT);
CREATE INDEX blocks_of ON blocks (document);
CREATE VIRTUAL TABLE words USING fts5 (title, body, tokenize = '{TOKENS}');
CREATE TABLE vectors (encoder TEXT, block INTEGER, data BLOB, PRIMARY KEY (encoder, block)) WITHOUT ROWID;
"""
Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> unit vectors float32 (texts, D)


@dataclass(frozen=True)
class Passage:
    """A block that was found."""

    block: int
    document: int
    path: str  # of its document within the folder
    start: int
    end: int
    heading: str
    text: str
    score: float


@dataclass
class Changes:
    """What an update did, in files, documents and blocks."""

    read: int = 0
    unchanged: int = 0
    removed: int = 0
    documents: int = 0
    blocks: int = 0
    unreadable: int = 0
    why: str = ""  # the first that could not be read, and the reason


class _Connection(sqlite3.Connection):
    """A connection to an index. What a user can mend is a UserError."""

    place: Path

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        try:
            return super().execute(sql, parameters)
        except sqlite3.DatabaseError as error:
            if why := _mend(error):
                raise UserError(f"{self.place} {why}") from error
            raise


def _mend(error: sqlite3.DatabaseError) -> str:
    """What is wrong with an index, and how to mend it; "" for a mistake of this module."""
    said = str(error)
    if "fts5" in said and "module" in said:
        return "cannot be made, because this Python's SQLite has no FTS5: use a Python of python.org, Debian or conda"
    if "full" in said:
        return "cannot be written, because the disk is full: free some space, or give another --index; it is as it was"
    if "locked" in said:
        return "is being written by another process: wait for its end, or give another --index"
    if any(mark in said for mark in ("readonly", "unable to open", "disk")):
        return f"cannot be read or written ({said}): give another --index, or mend its folder"
    damaged = type(error) is sqlite3.DatabaseError  # its subclasses are of single statements
    return f"is damaged ({said}): remove it, and it is made anew" if damaged else ""


class Index:
    """An index, opened for searching. Close it, or use it in `with`."""

    def __init__(self, folder: Path) -> None:
        """Open the index in a folder, or begin an empty one there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"the index {folder} is a file: give a folder with --index") from error
        self.path = folder / FILE
        self._vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, factory=_Connection)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self.path} cannot be opened ({error}): give another --index, or mend its folder"
            ) from error
        self._db.place = self.path
        self._db.execute("PRAGMA trusted_schema=OFF")
        if self._version != VERSION:  # so that an index is read while another process writes it
            with self._writing():
                if self._version != VERSION:
                    self._begin()

    @property
    def _version(self) -> str | None:
        made = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone()
        known = made and self._db.execute("SELECT value FROM about WHERE name = 'version'").fetchone()
        return str(known[0]) if known else None

    def _begin(self) -> None:
        for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name in ("about", "files", "documents", "blocks", "words", "vectors"):
                self._db.execute(f"DROP TABLE {name}")
        for statement in filter(str.strip, TABLES.split(";")):
            self._db.execute(statement)
        self._db.execute("INSERT INTO about VALUES ('version', ?)", (VERSION,))

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction: all of its changes are kept, or none."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself goes back when the disk is full
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Searches that see one state of the index, whatever another process writes meanwhile."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:
                self._db.execute("COMMIT")

    # ------------------------------------------------------------------ updates

    def update(self, path: Path, *, tell: Callable[[int, int], None] | None = None) -> Changes:
        """Make the index that of a folder, or of a file: new and changed files are read, missing ones removed.

        Args:
            tell: called with the numbers of files that are done and of all.

        Raises UserError for a path without a readable file; the index then stays as it was.
        """
        files = reading.files_of(path)
        changes = Changes()
        with self._writing():
            known = {p: (stamp, digest) for p, stamp, digest in self._db.execute("SELECT * FROM files")}
            for file in known.keys() - {file.path for file in files}:
                self._remove(file)
                changes.removed += 1
            for number, file in enumerate(files, start=1):
                self._update_file(file, known.get(file.path), changes)
                if tell is not None:
                    tell(number, len(files))
            if not self.counts()[0]:
                why = f" ({changes.why})" if changes.why else ""
                raise UserError(f"none of the {len(files):,} files of {path} can be read{why}: give others")
        self._vectors.clear()
        return changes

    def _update_file(self, file: File, known: tuple[str, str] | None, changes: Changes) -> None:
        try:
            stamp = file.stamp
            digest = "" if known is not None and known[0] == stamp else file.digest()
        except FileNotFoundError:  # it was there when the folder was listed
            self._remove(file.path)
            changes.removed += known is not None
            return
        if known is not None and known[0] == stamp:
            changes.unchanged += 1
            return
        if known is not None and known[1] == digest:
            changes.unchanged += 1
        else:
            changes.read += 1
            self._remove(file.path)
            for path, text, reason in reading.texts_of(file):
                changes.unreadable += bool(reason)
                changes.why = changes.why or (f"{path}: {reason}" if reason else "")
                if not reason:
                    changes.documents += 1
                    changes.blocks += self._add(file.path, path, text, cutting.cut(text), title=path)
        self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (file.path, stamp, digest))

    def add(self, documents: Iterable[tuple[str, str, str]]) -> None:
        """Add documents (path, title, text) of no file, each as one block: collections with a known division."""
        with self._writing():
            for path, title, text in documents:
                self._add("", path, text, [Block(0, len(text), title)], title="")
        self._vectors.clear()

    def add_texts(self, texts: Iterable[tuple[str, str]]) -> None:
        """Add texts (path, text) of no file, cut as files are."""
        with self._writing():
            for path, text in texts:
                self._add("", path, text, cutting.cut(text), title=path)
        self._vectors.clear()

    def _add(self, file: str, path: str, text: str, found: Sequence[Block], *, title: str) -> int:
        document = self._db.execute("INSERT INTO documents VALUES (NULL, ?, ?, ?)", (file, path, text)).lastrowid
        name = re.sub(r"\.\w+(:\d+)?$", "", title) if file else title
        for block in found:
            row = (document, block.start, block.end, block.heading)
            number = self._db.execute("INSERT INTO blocks VALUES (NULL, ?, ?, ?, ?)", row).lastrowid
            above = f"{name} {block.heading}".replace("/", " ").replace("_", " ")
            self._db.execute(
                "INSERT INTO words (rowid, title, body) VALUES (?, ?, ?)",
                (number, above, text[block.start : block.end]),
            )
        return len(found)

    def _remove(self, file: str) -> None:
        inner = "SELECT b.id FROM blocks b JOIN documents d ON d.id = b.document WHERE d.file = ?"
        for table, column in (("words", "rowid"), ("vectors", "block"), ("blocks", "id")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} IN ({inner})", (file,))
        self._db.execute("DELETE FROM documents WHERE file = ?", (file,))
        self._db.execute("DELETE FROM files WHERE path = ?", (file,))

    def embed(
        self, encoder: str, encode: Encode, *, rows: int = 256, tell: Callable[[int, int], None] | None = None
    ) -> int:
        """Make the vectors of an encoder for the blocks that have none: their number. Each batch is kept when it is made."""
        lacking = self._db.execute(
            "SELECT b.id, w.title, w.body FROM blocks b JOIN words w ON w.rowid = b.id "
            "WHERE b.id NOT IN (SELECT block FROM vectors WHERE encoder = ?)", (encoder,),
        ).fetchall()  # fmt: skip
        for first in range(0, len(lacking), rows):
            some = lacking[first : first + rows]
            vectors = encode([f"{title.strip()}\n{body}" for _, title, body in some]).astype(np.float32)
            with self._writing():
                for row, vector in zip(
                    some, vectors, strict=True
                ):  # of those that no other process has changed meanwhile
                    self._db.execute(
                        "INSERT OR REPLACE INTO vectors SELECT ?, rowid, ? FROM words WHERE rowid = ? AND title = ? AND body = ?",
                        (encoder, vector.tobytes(), *row),
                    )
            if tell is not None:
                tell(min(first + rows, len(lacking)), len(lacking))
        self._vectors.clear()
        return len(lacking)

    # ------------------------------------------------------------------ searches

    def counts(self) -> tuple[int, int]:
        """The numbers of documents and blocks."""
        sql = "SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM blocks)"
        documents, found = self._db.execute(sql).fetchone()
        return documents, found

    def content(self) -> list[tuple[str, str]]:
        """The path and the hash of every file that was read."""
        return [(path, digest) for path, digest in self._db.execute("SELECT path, digest FROM files ORDER BY path")]

    def lexical(self, question: str, *, k: int = DEPTH) -> list[tuple[int, float]]:
        """(block, BM25) of the best blocks, the best first."""
        words = query_words(question)
        if not words:
            return []
        # Every word is a quoted string: the text of a user is never part of FTS5's own notation.
        match = " OR ".join(f'"{word}"' for word in words)
        rows = self._db.execute(
            "SELECT rowid, -rank FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?", (match, k)
        )
        return [(block, score) for block, score in rows]

    def semantic(self, encoder: str, vector_D: np.ndarray, *, k: int = DEPTH) -> list[tuple[int, float]]:
        """(block, cosine) of the blocks nearest to a unit vector, the nearest first: the exact product with all of them."""
        if encoder not in self._vectors:
            rows = self._db.execute("SELECT block, data FROM vectors WHERE encoder = ?", (encoder,)).fetchall()
            ids = np.array([row[0] for row in rows], np.int64)
            self._vectors[encoder] = (
                ids,
                np.stack([np.frombuffer(row[1], np.float32) for row in rows]) if rows else np.zeros((0, 1)),
            )
        ids, vectors_ND = self._vectors[encoder]
        if not len(ids):
            return []
        scores_N = vectors_ND @ vector_D.astype(np.float32)
        best = np.lexsort((ids, -scores_N))[:k]
        return [(int(ids[i]), float(scores_N[i])) for i in best]

    def path_of(self, block: int) -> str:
        """The path of a block's document."""
        sql = "SELECT d.path FROM blocks b JOIN documents d ON d.id = b.document WHERE b.id = ?"
        (path,) = self._db.execute(sql, (block,)).fetchone()
        return str(path)

    def passages(self, found: Sequence[tuple[int, float]]) -> list[Passage]:
        """The blocks of a ranking with their texts."""
        made = []
        for block, score in found:
            document, start, end, heading, path, text = self._db.execute(
                "SELECT b.document, b.start, b.stop, b.heading, d.path, substr(d.text, b.start + 1, b.stop - b.start) "
                "FROM blocks b JOIN documents d ON d.id = b.document WHERE b.id = ?", (block,),
            ).fetchone()  # fmt: skip
            made.append(Passage(block, document, path, start, end, heading, text, score))
        return made

    def coverage(self, question: str, passages: Sequence[Passage]) -> float:
        """The largest share of a question's words, weighted by their rarity, that one of the passages has.

        Words that ask are left out.
        """
        total = self.counts()[1]
        weights = {}
        for word in query_words(question):
            if word in ASKING_WORDS:
                continue
            (have,) = self._db.execute("SELECT count(*) FROM words WHERE words MATCH ?", (f'"{word}"',)).fetchone()
            have = max(have, 1)  # a word that occurs nowhere says no more than one that occurs once
            weights[word] = float(np.log((total - have + 0.5) / (have + 0.5) + 1))
        whole = sum(weights.values())
        if not whole:
            return 0.0
        best = 0.0
        for passage in passages:
            rows = (
                weight
                for word, weight in weights.items()
                if self._db.execute("SELECT 1 FROM words WHERE rowid = ? AND words MATCH ?", (passage.block, f'"{word}"')).fetchone()
            )  # fmt: skip
            best = max(best, sum(rows) / whole)
        return best


def fused(*rankings: Sequence[tuple[int, float]], k: int = RRF) -> list[tuple[int, float]]:
    """Rankings as one by reciprocal ranks: the sum of 1 / (k + rank) (Cormack, Clarke and Buettcher 2009)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (item, _) in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
