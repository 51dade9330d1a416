"""A small n-gram language model of bytes. It measures how much a text is like a trusted corpus.

Interpolated modified Kneser-Ney (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language
Modeling") over the UTF-8 bytes of a document, up to 6 bytes at a time. It needs no tokenizer, works for any language, and
gives a probability for every byte, so the measure is bits per byte. An n-gram of bytes takes 48 bits and its cost 16: both
are one 64-bit entry of an open hash table, so most bytes cost one look-up in memory.

Costs are multiples of 1/2048 bit, rounded up. Their sums are exact, so a document's score does not depend on its batch,
and the probabilities of all next bytes sum to at most 1.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import storage
from llmjax.errors import UserError

MAX_ORDER = 6  # 48 bits of an entry; the other 16 are its cost
UNITS_PER_BIT = 2048
FORMAT = 1
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's --discount_fallback, for orders with too few n-grams to estimate from
BLOCK = 1 << 16  # bytes scored at once: the temporary arrays stay in the cache
TRAIN_BLOCK = 1 << 23
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)  # as a 6-gram: six bytes 0xFF, which UTF-8 never has
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Table:
    """A map from numbers below 2^48 to costs, by open addressing with linear probing at a load of at most one half.

    Attributes:
        entries: uint64, key << 16 | cost; EMPTY where there is none, as at the end of the array.
        shift: the home of a key is (key x MULTIPLIER) >> shift.
    """

    entries: np.ndarray
    shift: int

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which keys are there, bool, and their costs, int64, both of the shape of `keys`; 0 for those that are not."""
        slots = ((keys * MULTIPLIER) >> np.uint64(self.shift)).astype(np.int64)
        entries = self.entries[slots]
        found = (entries >> np.uint64(16)) == keys
        again = np.flatnonzero(~found & (entries != EMPTY))
        while len(again):
            slots[again] += 1
            next_entries = self.entries[slots[again]]
            entries[again] = next_entries
            hit = (next_entries >> np.uint64(16)) == keys[again]
            found[again] = hit
            again = again[~hit & (next_entries != EMPTY)]
        return found, np.where(found, entries & np.uint64(0xFFFF), 0).astype(np.int64)


@dataclass(frozen=True)
class Level:
    """The n-grams of one order of 3 or more.

    Attributes:
        keys: uint64 [n-grams], sorted: the bytes as a big-endian number. costs: uint16 [n-grams], -log2 p x 2048.
        contexts: uint64 [contexts], sorted: the n-grams less their last byte.
        backoffs: uint16 [contexts], the cost of leaving each for the order below.
    """

    keys: np.ndarray
    costs: np.ndarray
    contexts: np.ndarray
    backoffs: np.ndarray


@dataclass(frozen=True)
class Model:
    """A fitted model.

    Attributes:
        order: the longest n-gram, 2 to 6 bytes.
        bigrams: uint16 [65536], the cost of every byte after every byte.
        levels: of order 3, 4 and so on. tables: for each, the look-up of its n-grams and that of its contexts.
        settings: what it was trained with and on, JSON.
    """

    order: int
    bigrams: np.ndarray
    levels: tuple[Level, ...]
    tables: tuple[tuple[Table, Table], ...]
    settings: Mapping[str, Any]


def _make_table(keys: np.ndarray, costs: np.ndarray) -> Table:
    bits = max(4, math.ceil(math.log2(max(2 * len(keys), 2))))
    shift = 64 - bits
    homes = ((keys * MULTIPLIER) >> np.uint64(shift)).astype(np.int64)
    order = np.argsort(homes, kind="stable")
    # Each entry, in the order of homes, goes to its home or, where that is taken, just behind the one before it.
    index = np.arange(len(keys))
    slots = index + np.maximum.accumulate(homes[order] - index) if len(keys) else index
    size = max(1 << bits, int(slots[-1]) + 1 if len(keys) else 0) + 1
    entries = np.full(size, EMPTY, np.uint64)
    entries[slots] = (keys[order] << np.uint64(16)) | costs[order].astype(np.uint64)
    return Table(entries, shift)


def _model(bigrams: np.ndarray, levels: Sequence[Level], settings: Mapping[str, Any]) -> Model:
    tables = tuple((_make_table(a.keys, a.costs), _make_table(a.contexts, a.backoffs)) for a in levels)
    return Model(len(levels) + 2, bigrams, tuple(levels), tables, settings)


def _join(texts: Iterable[bytes], pad: int) -> bytes:
    """The documents one after another, with `pad` zero bytes, the start of a document, before each."""
    start = bytes(pad)
    return b"".join(part for text in texts for part in (start, text))


def _keys(data: np.ndarray, order: int) -> np.ndarray:
    """The n-gram that ends at each byte but the first order - 1: uint64 [len(data) - order + 1]."""
    count = len(data) - order + 1
    keys = data[order - 1 :].astype(np.uint64)
    for back in range(1, order):
        start = order - 1 - back
        keys |= data[start : start + count].astype(np.uint64) << np.uint64(8 * back)
    return keys


def _mask(order: int) -> np.uint64:
    return np.uint64((1 << (8 * order)) - 1)


def _merge(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, inverse = np.unique(keys, return_inverse=True)
    return unique, np.bincount(inverse, weights=counts, minlength=len(unique)).astype(np.int64)


def _count(texts: Iterable[str], order: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Distinct n-grams of the order, how often each occurs, and the documents and bytes counted."""
    keys, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
    documents = total = 0
    block: list[bytes] = []
    size = 0

    def flush() -> None:
        nonlocal keys, counts, block, size
        if size:
            data = np.frombuffer(_join(block, order - 1), np.uint8)
            lengths = np.array([len(text) for text in block])
            ends = np.cumsum(lengths + order - 1)
            # Position p of `_keys` ends at byte p + order - 1: a document's own bytes are those not in its padding.
            mine = np.zeros(len(data) + 1, np.int64)
            np.add.at(mine, ends - lengths, 1)
            np.add.at(mine, ends, -1)
            new, new_counts = np.unique(
                _keys(data, order)[np.cumsum(mine)[order - 1 : len(data)] > 0], return_counts=True
            )
            keys, counts = _merge(np.concatenate([keys, new]), np.concatenate([counts, new_counts]))
        block, size = [], 0

    for text in texts:
        raw = text.encode(errors="replace")
        documents += 1
        total += len(raw)
        # A document of any length is cut, so that memory is bounded by the distinct n-grams; pieces begin anew.
        for begin in range(0, len(raw), TRAIN_BLOCK):
            piece = raw[begin : begin + TRAIN_BLOCK]
            block.append(piece)
            size += len(piece)
            if size >= TRAIN_BLOCK:
                flush()
    flush()
    return keys, counts, documents, total


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Chen and Goodman's discounts of counts of 1, 2 and 3 or more; KenLM's fallback where they cannot be estimated."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < discount <= k for k, discount in enumerate(found, start=1)) else FALLBACK_DISCOUNTS


def _costs(probabilities: np.ndarray) -> np.ndarray:
    """-log2 p in units of 1/2048 bit, rounded up; the small amount allows for the rounding of the logarithm."""
    units = np.ceil(-np.log2(probabilities) * UNITS_PER_BIT - 1e-7)
    return np.clip(units, 0, 0xFFFF).astype(np.uint16)


def train(texts: Iterable[str], *, order: int = 6, min_count: int = 2) -> Model:
    """Fit a model to documents.

    Args:
        texts: the documents; read once. Their order does not change the model, unless one is longer than 8 MiB (it is
            cut).
        order: bytes of the longest n-gram, 2 to 6.
        min_count: n-grams of four bytes or more that occur less often are left out; shorter ones get their mass. 2
            halves the file. Text of the same kind then costs 2% more bits after 1 MB of training text, 0.1% after 7.

    Memory is about 100 bytes for each distinct n-gram of the longest order, whatever the size of the documents.

    Raises:
        UserError: for an order or count out of range, or no text.
    """
    if not 2 <= order <= MAX_ORDER:
        raise UserError(f"the order of an n-gram model of bytes must be from 2 to {MAX_ORDER}, not {order}")
    if min_count < 1:
        raise UserError(f"min_count must be at least 1, not {min_count}")
    keys, raw, documents, size = _count(texts, order)
    if not size:
        raise UserError("no text to train an n-gram model on: give at least one document that is not empty")
    orders = {order: (keys, raw, raw)}
    for n in range(order - 1, 0, -1):
        longer, longer_raw, _ = orders[n + 1]
        shorter, inverse = np.unique(longer & _mask(n), return_inverse=True)
        raw = np.bincount(inverse, weights=longer_raw).astype(np.int64)
        # The same bytes precede every document, so the number of distinct predecessors says nothing there.
        at_start = (shorter >> np.uint64(8 * (n - 1))) == 0
        orders[n] = (shorter, raw, np.where(at_start, raw, np.bincount(inverse)))

    lower = np.full(256, 1 / 256)  # probabilities of the suffixes of the n-grams of the level being made
    suffix_keys = np.arange(256, dtype=np.uint64)
    bigrams = np.empty(0, np.uint16)
    levels = []
    for n in range(1, order + 1):
        keys, raw, counts = orders.pop(n)
        contexts, inverse = np.unique(keys >> np.uint64(8), return_inverse=True)
        discounts = np.array((0.0, *estimate_discounts(counts)))
        left = counts - discounts[np.minimum(counts, 3)]
        stays = raw >= min_count if n > 3 else np.ones(len(keys), bool)
        totals = np.bincount(inverse, weights=counts)
        own = np.where(stays, left, 0.0)
        backoffs = np.maximum(1 - np.bincount(inverse, weights=own) / totals, 1e-9)
        if n <= 2:  # for every context and byte, seen or not
            dense = np.tile(lower, 256) if n == 2 else lower
            weight = np.ones(256 if n == 2 else 1)
            weight[contexts.astype(np.int64)] = backoffs
            dense = dense * np.repeat(weight, 256)
            dense[keys.astype(np.int64)] += own / totals[inverse]
            lower, suffix_keys = dense, np.arange(len(dense), dtype=np.uint64)
            bigrams = _costs(lower)
            continue
        keys, inverse, own = keys[stays], inverse[stays], own[stays]
        suffixes = np.searchsorted(suffix_keys, keys & _mask(n - 1))
        lower = own / totals[inverse] + backoffs[inverse] * lower[suffixes]
        suffix_keys = keys
        used = np.unique(inverse)  # a context without n-grams is as if never seen
        levels.append(Level(keys, _costs(lower), contexts[used], _costs(backoffs[used])))
    settings = {"order": order, "min_count": min_count, "documents": documents, "bytes": size}
    return _model(bigrams, levels, settings)


def byte_costs(model: Model, data: np.ndarray) -> np.ndarray:
    """The cost of each byte given those before it, int64 [len(data) - order + 1], in units of 1/2048 bit.

    Args:
        data: uint8; the first order - 1 bytes are only context (zeros: the start of a document).
    """
    keys = _keys(data, model.order)
    costs = np.zeros(len(keys), np.int64)
    left = np.arange(len(keys))
    for n in range(model.order, 2, -1):
        ngrams, contexts = model.tables[n - 3]
        keys = keys & _mask(n)
        found, cost = ngrams.find(keys)
        costs[left] += cost
        left, keys = left[~found], keys[~found]
        costs[left] += contexts.find(keys >> np.uint64(8))[1]
    costs[left] += model.bigrams[(keys & np.uint64(0xFFFF)).astype(np.int64)]
    return costs


def score(model: Model, texts: Sequence[str]) -> np.ndarray:
    """Bits per byte of UTF-8 of every document, float64 [documents]; 0 for an empty one."""
    results = np.zeros(len(texts))
    pad = model.order - 1
    raw = [text.encode(errors="replace") for text in texts]
    begin = 0
    while begin < len(raw):
        end, size = begin, 0
        while end < len(raw) and (end == begin or size + len(raw[end]) <= BLOCK):
            size += len(raw[end])
            end += 1
        data = np.frombuffer(_join(raw[begin:end], pad), np.uint8)
        ends = np.cumsum([len(text) + pad for text in raw[begin:end]])
        starts = ends - [len(text) for text in raw[begin:end]]
        totals = np.zeros(end - begin, np.int64)
        for low in range(pad, len(data), BLOCK):  # more than one only where a document is longer than a block
            high = min(low + BLOCK, len(data))
            sums = np.concatenate([[0], np.cumsum(byte_costs(model, data[low - pad : high]))])
            totals += sums[np.clip(ends, low, high) - low] - sums[np.clip(starts, low, high) - low]
        lengths = np.maximum(ends - starts, 1)
        results[begin:end] = totals / UNITS_PER_BIT / lengths
        begin = end
    return results


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to one .npz file, whole or not at all. The same model gives the same bytes."""
    arrays = {"bigrams": model.bigrams}
    for n, level in enumerate(model.levels, start=3):
        # Sorted keys as differences compress to a third; the hash tables are made again when the model is read.
        arrays[f"keys{n}"] = np.diff(level.keys, prepend=np.uint64(0))
        arrays[f"costs{n}"] = level.costs
        arrays[f"contexts{n}"] = np.diff(level.contexts, prepend=np.uint64(0))
        arrays[f"backoffs{n}"] = level.backoffs
    write_arrays(path, "ngram", FORMAT, arrays, dict(model.settings))


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model that `save` wrote.

    Raises:
        UserError: if the file is not there, cut off, damaged, of another kind or of another version.
    """
    arrays, settings = read_arrays(path, "ngram", FORMAT)
    try:
        levels = [
            Level(
                np.cumsum(arrays[f"keys{n}"], dtype=np.uint64),
                arrays[f"costs{n}"],
                np.cumsum(arrays[f"contexts{n}"], dtype=np.uint64),
                arrays[f"backoffs{n}"],
            )
            for n in range(3, settings["order"] + 1)
        ]
        return _model(arrays["bigrams"], levels, settings)
    except KeyError as error:
        raise UserError(f"{path}: an n-gram model without {error}: train and save it again") from error


def write_arrays(
    path: str | os.PathLike[str], kind: str, version: int, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> None:
    """Write arrays and JSON settings to one .npz file, whole or not at all. No pickles: reading it runs no code."""
    header = json.dumps({"kind": kind, "version": version, "settings": settings}, sort_keys=True)
    buffer = io.BytesIO()
    columns: dict[str, Any] = {"header": np.frombuffer(header.encode(), np.uint8), **arrays}
    np.savez_compressed(buffer, **columns)
    storage.write_bytes(Path(path), buffer.getvalue())


def read_arrays(path: str | os.PathLike[str], kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and settings of a file that `write_arrays` wrote.

    Raises:
        UserError: if the file is not there, cut off, damaged, of another kind or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        found, found_version, settings = header["kind"], header["version"], header["settings"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such model file: train one, or mend the path in the config") from error
    except (
        OSError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(
            f"{path}: not a saved model, or cut off or damaged ({error}): copy it again or train it again"
        ) from error
    if found != kind:
        raise UserError(f"{path}: holds a model of kind {found!r}, not {kind!r}: give the right file in the config")
    if found_version != version:
        mend = "update llmjax" if found_version > version else "train it again with llmjax classify"
        raise UserError(f"{path}: version {found_version} of the {kind} format, this llmjax reads {version}: {mend}")
    return arrays, settings
