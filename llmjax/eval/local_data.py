"""Benchmarks as JSON Lines in local folders, with the field names of lm-evaluation-harness. Nothing is downloaded.

Files are called TASK_SPLIT.jsonl or TASK.jsonl: arc_challenge_train.jsonl, hellaswag_val.jsonl, mmlu_test.jsonl (all
subjects, each row with its `subject`), truthfulqa_mc.jsonl. If the split with the examples of a task is missing, other
questions are the examples, never the asked one, and a note beside the score says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError

Doc = dict[str, Any]

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",), "dev": ("dev",)}
FILES = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}  # tasks whose file has another name
MMLU = "mmlu"


@dataclass(frozen=True)
class TaskData:
    """The questions of a task, and the source of its few-shot examples.

    Attributes:
        asked: the split with the questions.
        shots: the split with the examples. If it is `asked`, the other questions are the examples.
        splits: name -> rows, for every file that was found.
    """

    asked: str
    shots: str
    splits: dict[str, list[Doc]]

    @property
    def leave_one_out(self) -> bool:
        """Whether other questions of the same split are the examples."""
        return self.asked == self.shots


def find(task: str, folders: Sequence[str | Path], *, shots_from: str = "train") -> TaskData:
    """The data of a task; of "mmlu_SUBJECT" the rows of that subject.

    Args:
        shots_from: the split with the examples of the task.

    Raises:
        UserError: if no folder has a file of the task, or a file is damaged.
    """
    if not folders:
        raise UserError(f"{task} needs its questions: give --data DIR, a folder with {_base(task)}_test.jsonl")
    base = _base(task)
    splits = {split: read(path) for split in SPLITS if (path := _file(base, split, folders)) is not None}
    if "test" not in splits and "validation" not in splits:
        splits["validation"] = read(asked_file(task, folders))
    if base == MMLU and task != MMLU:
        subject = task.removeprefix(f"{MMLU}_")
        splits = {name: [row for row in rows if row.get("subject") == subject] for name, rows in splits.items()}
        splits = {name: rows for name, rows in splits.items() if rows}
        if "test" not in splits and "validation" not in splits:
            raise UserError(f"the data has no questions of the subject {subject!r}")
    asked = "test" if "test" in splits else "validation"
    return TaskData(asked, shots_from if shots_from in splits else asked, splits)


def asked_file(task: str, folders: Sequence[str | Path]) -> Path:
    """The file with the questions of a task (of all subjects of MMLU). Raises UserError if there is none."""
    base = _base(task)
    named = [Path(folder) / f"{base}.jsonl" for folder in folders]
    found = _file(base, "test", folders) or _file(base, "validation", folders)
    found = found or next((path for path in named if path.is_file()), None)
    if found is None:
        wanted = f"{base}_test.jsonl, {base}_validation.jsonl or {base}.jsonl"
        raise UserError(f"no questions of {task}: none of {', '.join(map(str, folders)) or '--data'} has {wanted}")
    return found


def _file(base: str, split: str, folders: Sequence[str | Path]) -> Path | None:
    paths = (Path(folder) / f"{base}_{name}.jsonl" for folder in folders for name in SPLITS[split])
    return next((path for path in paths if path.is_file()), None)


def subjects(folders: Sequence[str | Path]) -> list[str]:
    """The subjects of MMLU in the data, sorted."""
    found = find(MMLU, folders)
    return sorted({row["subject"] for row in found.splits[found.asked]})


def read(path: Path) -> list[Doc]:
    """The rows of a file of JSON Lines. Raises UserError with the number of a wrong line."""
    rows = []
    for number, line in enumerate(storage.read_lines(path), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON ({error}): get the file again") from error
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}, line {number} is no object but {type(rows[-1]).__name__}: get the file again")
    if not rows:
        raise UserError(f"{path} is empty: get the file again")
    return rows


def _base(task: str) -> str:
    return MMLU if task.startswith(f"{MMLU}_") else FILES.get(task, task)
