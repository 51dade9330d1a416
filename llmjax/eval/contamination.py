"""Contamination: questions of a task in the run's training text, printed beside the score.

A question counts as seen if it has 13 words in a row in common with a document (Brown et al. 2020, appendix C). The search
is for the question alone, and for the question with its answer (`prepare/decontaminate.py`). A question that is not found
may still have been seen: in other words, in another language, or by the model that this run started from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmjax.eval import local_data
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.local_data import MMLU
from llmjax.eval.statistics import Estimate, mean

WORDS = 13
BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Contamination:
    """The result for one task: its number of questions, the rows that were seen, and how many are too short to tell."""

    task: str
    count: int
    seen: frozenset[int]
    too_short: int

    def __str__(self) -> str:
        short = f" ({self.too_short} are too short to tell)" if self.too_short else ""
        return f"{len(self.seen)} of {self.count} questions have 13 words in a row of the training text{short}"


def check(tasks: Sequence[str], folders: Sequence[str | Path], run: Path) -> dict[str, Contamination]:
    """Task -> its questions in the training text of a run; {} for a run without text, such as an imported model.

    Raises UserError for missing or damaged data.
    """
    prepared = run / "prepare"
    if not (prepared / "train").is_dir():
        return {}
    import pyarrow as pa

    from llmjax.prepare import decontaminate

    items = {task: decontaminate.read_benchmark(local_data.asked_file(task, folders)) for task in tasks}
    # By row number, because ids in the files may repeat.
    numbered = {
        task: [decontaminate.Item(str(row), item.fields) for row, item in enumerate(rows)]
        for task, rows in items.items()
    }
    index = decontaminate.index(numbered, words=WORDS)
    seen: dict[str, set[int]] = {task: set() for task in tasks}
    for texts in _batches(prepared):
        for found in decontaminate.overlaps(pa.array(texts, pa.large_string()), index).to_pylist():
            if found["run"] >= WORDS or found["share"] == 1:  # a shorter question counts if all of it is there
                seen[found["benchmark"]].add(int(found["item"]))
    return {
        task: Contamination(task, len(rows), frozenset(seen[task]), index.left_out.get(task, 0))
        for task, rows in items.items()
    }


def clean_score(score: TaskScore, found: Contamination, folders: Sequence[str | Path]) -> Estimate | None:
    """The score over the questions that were not seen. None if all or none were, or if the score is not a mean."""
    if not found.seen or any(score.main not in item for item in score.items):
        return None
    rows = local_data.read(local_data.asked_file(score.task, folders))
    counts: dict[str, int] = {}
    row_of: dict[tuple[str, int], int] = {}
    for number, row in enumerate(rows):
        part = f"{MMLU}_{row['subject']}" if score.task == MMLU else score.task
        row_of[part, counts.get(part, 0)] = number
        counts[part] = counts.get(part, 0) + 1
    kept = [
        item[score.main]
        for place, item in enumerate(score.items)
        if row_of[item.get("task", score.task), item["id"] if isinstance(item["id"], int) else place] not in found.seen
    ]
    return mean(kept) if kept else None


def _batches(prepared: Path) -> Iterator[list[str]]:
    from llmjax.data.documents import read_texts, shard_files

    texts: list[str] = []
    for source in shard_files(prepared / "train"):
        for text in read_texts(prepared, "train", source):
            texts.append(text)
            if len(texts) == BATCH_DOCUMENTS:
                yield texts
                texts = []
    if texts:
        yield texts
