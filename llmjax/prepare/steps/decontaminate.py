"""Step "decontaminate": documents that hold questions of the benchmarks named in settings.decontaminate are rejected.

The reason names the benchmark and the item, and quotes the common text, so prepare/rejected/ lists every match. Smaller
overlaps are only counted ("leak.touched").
"""

from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.prepare.documents import Step, add_facts, kept, reject

QUOTED = 200  # characters of the common text in a reason


def make(settings: Any) -> Step:
    """The step. Reads settings.decontaminate, .decontaminate_words and .decontaminate_characters.

    Raises:
        UserError: for no file, a file that is not there or that holds no items, or two of the same name.
    """
    from llmjax.prepare import decontaminate as leaks

    paths = [Path(path).expanduser() for path in settings.decontaminate]
    if not paths:
        raise UserError(
            "the step decontaminate needs the benchmarks' files: prepare.decontaminate='[\"arc_test.jsonl\", ...]'"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"prepare.decontaminate: there is no file {path}")
    names = [path.name.split(".")[0] for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"prepare.decontaminate: two files of one name among {', '.join(names)}: rename one of them")
    benchmarks = {name: leaks.read_benchmark(path) for name, path in zip(names, paths, strict=True)}
    index = leaks.index(benchmarks, words=settings.decontaminate_words)

    def step(batch: Any) -> Any:
        import pyarrow.compute as pc

        found = leaks.overlaps(pc.fill_null(batch["text"], ""), index)
        if not found.num_rows:
            return batch
        rows = found["row"].to_numpy()
        live = kept(batch)
        touched, counts = np.unique(rows[live[rows]], return_counts=True)
        facts = {int(row): {"leak.touched": int(count)} for row, count in zip(touched, counts, strict=True)}
        gone = leaks.leaked(found, characters=settings.decontaminate_characters)
        reasons = {}
        for row in gone.tolist():
            hits = list(found.filter(found_rows(rows, row)).to_pylist())
            worst = max(hits, key=lambda hit: (hit["characters"], hit["share"]))
            more = f" and {len(hits) - 1} more" if len(hits) > 1 else ""
            reasons[row] = (
                f"leak: {worst['field']} of {worst['benchmark']} {worst['item']}{more}, {worst['characters']} "
                f"characters in common: {worst['text'][:QUOTED]!r}"
            )
        return reject(add_facts(batch, facts), reasons)

    return step


def found_rows(rows: np.ndarray, row: int) -> Any:
    """A mask of the table's rows about one document."""
    import pyarrow as pa

    return pa.array(rows == row)
