"""Token shards: documents as streams of ids, which the tokenizer stage writes and training reads from anywhere.

A stream, one per split and source, is <bos> document <eos> <bos> document <eos> ... in prepare's order, cut into
ArrayRecord records of `data.record_tokens` ids. Records are only the unit of storage: `Stream.read` takes any range.
Where the tokenizer has one id for both, as GPT-2's, it stands once between documents.
"""

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from llmjax import progress, storage
from llmjax.data import parallel_text
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError

BATCH_BYTES = 4_000_000  # text that is encoded at once
FILE_TOKENS = 1 << 26  # a new file is begun after this many tokens
# group_size:1 is what makes single records readable at random; zstd nearly halves the files.
WRITER_OPTIONS = "group_size:1,zstd:3"


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16, or uint32 if the vocabulary needs it."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_stream(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    folder: Path,
    record_tokens: int,
    languages: Sequence[str] = ("",),
    label: str = "encoding",
) -> dict[str, Any]:
    """Encode texts into folder/00000.array_record ... and return the stream's entry for index.json.

    Holds BATCH_BYTES of text and its ids at a time. Two `languages` mean that texts are pairs, the first and the second
    of each by turns; then folder/pairs.npy says where pairs begin. Raises OSError that names the file, such as for a
    full disk.
    """
    folder.mkdir(parents=True)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {"tokens": 0, "text_bytes": 0, "documents": 0}
    files: list[dict[str, Any]] = []
    records_per_file = max(1, FILE_TOKENS // record_tokens)
    writer = None
    rest = np.empty(0, dtype)
    bos = np.array([tokenizer.start_id], dtype)
    eos = np.array([tokenizer.end_id] if tokenizer.end_id != tokenizer.start_id else [], dtype)
    starts: list[np.ndarray] = []

    def write(ids: np.ndarray) -> None:
        nonlocal writer
        if writer is None or files[-1]["records"] == records_per_file:
            close()
            files.append({"file": f"{len(files):05d}.array_record", "records": 0})
            path = folder / files[-1]["file"]
            with _naming(path):
                writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        with _naming(folder / files[-1]["file"]):
            writer.write(ids.tobytes())
        files[-1]["records"] += 1

    def close() -> None:
        if writer is not None:
            with _naming(folder / files[-1]["file"]):
                writer.close()

    for batch, size in _watched(_batches(texts), label):
        parts = [rest]
        for ids in tokenizer.encode_batch(batch):
            parts += [bos, np.fromiter(ids, dtype, len(ids)), eos]
        if len(languages) == 2:
            sizes = np.array([len(part) for part in parts[1:]], np.uint64).reshape(-1, 3).sum(1)
            starts.append(np.cumsum(sizes) - sizes + np.uint64(counts["tokens"]))
        counts["tokens"] += sum(map(len, parts[1:]))
        counts["text_bytes"] += size
        counts["documents"] += len(batch)
        stream = np.concatenate(parts)
        whole = len(stream) - len(stream) % record_tokens
        for start in range(0, whole, record_tokens):
            write(stream[start : start + record_tokens])
        rest = stream[whole:]
    if len(rest):
        write(rest)
    close()
    if len(languages) == 2:
        begins = np.concatenate([np.empty(0, np.uint64), *starts])[::2]
        with storage.writing(folder / parallel_text.PAIRS_FILE) as file:
            np.save(file, np.append(begins, np.uint64(counts["tokens"])))
    return {**counts, "languages": list(languages), "files": files}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what ArrayRecord raises when the system refuses a write
        raise OSError(f"cannot write {path}: {error}") from error


def _batches(texts: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _watched(batches: Iterator[tuple[list[str], int]], label: str) -> Iterator[tuple[list[str], int]]:
    """The same batches, with a progress line while they pass if a person watches."""
    with progress.bar(label) as advance:
        for batch, size in batches:
            yield batch, size
            advance(size)


@dataclass(frozen=True)
class Index:
    """index.json of a folder of token shards."""

    folder: Path
    dtype: np.dtype
    record_tokens: int
    vocab_size: int
    tokenizer: str  # fingerprint
    start_id: int  # what documents begin with
    end_id: int  # and end with
    splits: dict[str, dict[str, dict[str, Any]]]  # split -> source -> tokens, text_bytes, documents, languages, files

    @property
    def language_numbers(self) -> dict[str, int]:
        """The number of each language, in the order of their names: its row of the language embedding."""
        entries = (entry for split in self.splits.values() for entry in split.values())
        return {name: i for i, name in enumerate(sorted({name for entry in entries for name in entry["languages"]}))}


def load_index(tokens_folder: str | Path) -> Index:
    """Read index.json. Raises UserError if it is missing or damaged; the message names the stage to run."""
    folder = Path(tokens_folder)
    file = folder / "index.json"
    if not file.is_file():
        raise UserError(f"there are no token shards in {folder}: run `llmjax tokenizer` first")
    try:
        values = {"start_id": 1, "end_id": 2} | json.loads(file.read_text(encoding="utf-8"))  # older ones lack these
        for sources in values["splits"].values():
            for source, entry in sources.items():
                entry.setdefault("languages", [source])
        return Index(**{**values, "folder": folder, "dtype": np.dtype(values["dtype"]).newbyteorder("<")})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {_rerun(folder)}") from error


class Stream:
    """Random access to the tokens of one split and source."""

    def __init__(self, index: Index, split: str, source: str) -> None:
        """Raises UserError for a source that is not there, and for a shard that is missing, truncated or damaged."""
        import grain  # it imports jax, which most of this room does without

        if source not in index.splits.get(split, {}):
            known = ", ".join(index.splits.get(split, {})) or "none"
            raise UserError(f"there is no {split} stream of source {source!r} in {index.folder}; there are: {known}")
        entry = index.splits[split][source]
        self.tokens: int = entry["tokens"]
        self.text_bytes: int = entry["text_bytes"]
        self.languages: tuple[str, ...] = tuple(entry["languages"])
        self.folder = index.folder / split / source
        self._index = index
        self._files = [index.folder / split / source / file["file"] for file in entry["files"]]
        self._ends = list(itertools.accumulate(file["records"] for file in entry["files"]))
        self._readers = []
        for path, file in zip(self._files, entry["files"], strict=True):
            if not path.is_file():
                raise UserError(f"the token shard {path} is missing: {_rerun(index.folder)}")
            try:
                reader = grain.sources.ArrayRecordDataSource(str(path))
                records = len(reader)
            except (RuntimeError, ValueError, OSError) as error:
                raise _damaged(path, index) from error
            if records != file["records"]:
                raise _damaged(path, index)
            self._readers.append(reader)

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), uint16 or uint32. Raises UserError for a damaged shard."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        if start == stop:
            return np.empty(0, self._index.dtype)
        size = self._index.record_tokens
        first, last = start // size, (stop - 1) // size
        parts = [self._record(record) for record in range(first, last + 1)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids[start - first * size : stop - first * size]

    def _record(self, record: int) -> np.ndarray:
        file = bisect.bisect_right(self._ends, record)
        try:
            data = self._readers[file][record - (self._ends[file - 1] if file else 0)]
        except (RuntimeError, ValueError, OSError) as error:
            raise _damaged(self._files[file], self._index) from error
        size = self._index.record_tokens
        if len(data) != min(size, self.tokens - record * size) * self._index.dtype.itemsize:
            raise _damaged(self._files[file], self._index)
        return np.frombuffer(data, self._index.dtype)


def read_stream(tokens_folder: str | Path, split: str, source: str) -> np.ndarray:
    """A whole stream, uint16 or uint32. Raises UserError as `load_index` and `Stream` do."""
    stream = Stream(load_index(tokens_folder), split, source)
    return stream.read(0, stream.tokens)


def _damaged(path: Path, index: Index) -> UserError:
    return UserError(f"the token shard {path} is truncated or damaged: {_rerun(index.folder)}")


def _rerun(folder: Path) -> str:
    return f"remove {folder.parent} and run `llmjax tokenizer` again"
