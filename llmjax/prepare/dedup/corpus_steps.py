"""The steps that look at all documents at once: which there are, and the two that decide by little."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from llmjax import human
from llmjax.errors import UserError
from llmjax.prepare.dedup import near, passages
from llmjax.prepare.dedup.keys import keys_of, live_index
from llmjax.prepare.documents import INDEX
from llmjax.prepare.engine import key_starts
from llmjax.prepare.state import REMOVED, State

OVERALL = ("exact", "paragraphs", "lines", "near", "substring", "caps")


def run(state: State, name: str) -> dict[str, float]:
    """Run one of OVERALL and note its decisions in `state`; the numbers to report."""
    state.number += 1
    functions: dict[str, Callable[[State], dict[str, float]]] = {
        "exact": exact,
        "near": near.near,
        "paragraphs": functools.partial(passages.units, unit="paragraph"),
        "lines": functools.partial(passages.units, unit="line"),
        "substring": passages.substring,
        "caps": caps,
    }
    return functions[name](state)


def exact(state: State) -> dict[str, float]:
    """Of documents with the same text the first stays."""
    found = state.group("exact", keys_of(state, "exact-keys", "id"), first_of_equal, key=["id"], order=["ordinal"])
    columns = [found["ordinal"], pa.array(["duplicate"] * found.num_rows), found["of"], pa.array([""] * found.num_rows)]
    state.remove("exact", pa.table(columns, schema=REMOVED))
    return {"removed": found.num_rows}


def first_of_equal(table: pa.Table) -> pa.Table:
    """(ordinal, of): every row but the first of its id, and that first."""
    starts = key_starts(table, ["id"])
    ordinals = table["ordinal"].to_numpy()
    first = ordinals[np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))] if len(starts) else ordinals
    return pa.table({"ordinal": ordinals[~starts], "of": first[~starts]})


def caps(state: State) -> dict[str, float]:
    """Of a language or a source with more bytes than its cap stays what comes first in the order of the ids."""
    limits = parse_caps(state.settings["caps"], sources=[part.name for part in state.parts])
    live = [
        live_index(state.documents, part.number, state.removed) for part in state.parts if part.source >= state.earlier
    ]
    table = pa.concat_tables(live) if live else INDEX.empty_table()
    names = {part.source: part.name for part in state.parts}
    table = table.sort_by([("id", "ascending"), ("ordinal", "ascending")])
    sizes, ordinals = table["size"].to_numpy(), table["ordinal"].to_numpy()
    columns = {
        "language": np.array(table["language"].to_pylist(), object),
        "source": np.array([names[number] for number in table["source"].to_pylist()], object),
    }
    gone: dict[int, str] = {}
    for (kind, name), limit in limits.items():
        rows = np.flatnonzero(columns[kind] == name)
        rows = rows[np.fromiter((int(ordinals[row]) not in gone for row in rows), bool, len(rows))]
        over = rows[np.cumsum(sizes[rows]) > limit]
        gone |= {int(ordinals[row]): f"{kind} {name} has its {limit:,} bytes" for row in over}
    found = sorted(gone.items())
    columns_of = [[o for o, _ in found], ["cap"] * len(found), [-1] * len(found), [detail for _, detail in found]]
    state.remove(
        "caps", pa.table([pa.array(c, f.type) for c, f in zip(columns_of, REMOVED, strict=True)], schema=REMOVED)
    )
    return {"removed": len(found)}


def parse_caps(given: Sequence[str], *, sources: Sequence[str]) -> dict[tuple[str, str], int]:
    """(kind, name) -> bytes of "language:de=2GB" or "source:web=10GB".

    Raises UserError for anything else, a source that is not there, or no cap at all.
    """
    limits: dict[tuple[str, str], int] = {}
    if not given:
        raise UserError('the step caps needs prepare.caps, such as \'["language:de=2GB", "source:web=10GB"]\'')
    for text in given:
        what, _, size = text.partition("=")
        kind, _, name = what.partition(":")
        if kind not in ("language", "source") or not name or not size:
            raise UserError(f"prepare.caps: {text!r} is not understood: write language:de=2GB or source:web=10GB")
        if kind == "source" and name not in sources:
            raise UserError(f"prepare.caps: there is no source {name!r}; there are {', '.join(dict.fromkeys(sources))}")
        limits[kind, name] = human.parse_size(size)
    return limits
