"""Cutting spans of bytes out of texts."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def remove_spans(
    texts: pa.LargeStringArray, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> pa.LargeStringArray:
    """The texts without some byte spans, which may overlap and come in any order.

    Around a cut the wider of the white space on its two sides stays: as many line ends (at most two) and the indentation
    of what follows, or one space.

    Args:
        rows, starts, stops: int64 (spans,); bytes within the text of the row, at the borders of characters.
    """
    rows, starts, stops = (np.asarray(x, np.int64) for x in (rows, starts, stops))
    if not len(rows):
        return texts
    order = np.lexsort((stops, starts, rows))
    changed: dict[int, list[tuple[int, int]]] = {}
    for row, start, stop in zip(rows[order].tolist(), starts[order].tolist(), stops[order].tolist(), strict=True):
        spans = changed.setdefault(row, [])
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    pieces, at = [], 0
    for row, spans in sorted(changed.items()):
        text = texts[row].as_py()
        pieces.append(texts.slice(at, row - at))
        pieces.append(pa.array([None if text is None else _cut(text.encode(), spans).decode()], pa.large_string()))
        at = row + 1
    pieces.append(texts.slice(at))
    return pa.concat_arrays(pieces)


def _cut(text: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """The text without spans that are sorted and apart."""
    result: list[bytes] = []
    blanks: list[bytes] = []  # white space since the last characters that stay, a piece for each side of each cut
    at = 0
    for start, stop in [*spans, (len(text), len(text))]:
        piece = text[at:start]
        at = stop
        left = piece.lstrip()
        core = left.rstrip()
        blanks.append(piece[: len(piece) - len(left)])
        if not core:
            continue
        if result:
            lines = min(2, max(blank.count(b"\n") for blank in blanks))
            spaced = any(blanks) or (result[-1][-1:].isalnum() and core[:1].isalnum())
            result.append(b"\n" * lines + _indentation(blanks) if lines else b" " * spaced)
        elif len(blanks) == 1:
            result.append(blanks[0])  # nothing was cut before it
        else:
            result.append(_indentation(blanks))
        result.append(core)
        blanks = [left[len(core) :]]
    return b"".join(result) + (b"\n" if result and text.endswith(b"\n") else b"")


def _indentation(blanks: Sequence[bytes]) -> bytes:
    """The white space after the last line end in the last piece that has one."""
    for blank in reversed(blanks):
        if b"\n" in blank:
            return blank[blank.rfind(b"\n") + 1 :]
    return b""
