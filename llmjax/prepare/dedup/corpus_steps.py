"""The steps over all documents at once, and the two short ones: exact and caps."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from llmjax import human
from llmjax.errors import UserError
from llmjax.prepare.dedup.keys import keys_of, live_index
from llmjax.prepare.documents import INDEX
from llmjax.prepare.state import REMOVED, State

OVERALL = ("exact", "paragraphs", "lines", "near", "substring", "caps")
ALL_BUT_FIRST = """
SELECT ordinal, stays FROM (
    SELECT ordinal, first_value(ordinal) OVER (PARTITION BY id ORDER BY ordinal) AS stays FROM keys
) AS documents WHERE ordinal <> stays
"""


def run(state: State, name: str) -> dict[str, float]:
    """Run one of OVERALL and note its decisions in `state`. Returns the numbers to report."""
    state.number += 1
    if name == "exact":
        return exact(state)
    if name == "caps":
        return caps(state)
    from llmjax.prepare.dedup import near, passages  # compile

    if name == "near":
        return near.near(state)
    return passages.substring(state) if name == "substring" else passages.units(state, unit=name.removesuffix("s"))


def exact(state: State) -> dict[str, float]:
    """Remove documents whose text an earlier document has."""
    found = state.query("exact", ALL_BUT_FIRST, keys=keys_of(state, "exact-keys", "id"))
    columns = [found["ordinal"], ["duplicate"] * found.num_rows, found["stays"], [""] * found.num_rows]
    state.remove("exact", pa.table(columns, schema=REMOVED))
    return {"removed": found.num_rows}


def caps(state: State) -> dict[str, float]:
    """Remove documents of a language or a source beyond its bytes. The first in the order of the ids stay."""
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
