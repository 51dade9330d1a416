"""Questions from a file, answers to another, and the transcript from which each answer can be made again."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmjax import storage
from llmjax.errors import UserError
from llmjax.infer import asking
from llmjax.infer.asking import Conversation
from llmjax.infer.engine import Engine
from llmjax.infer.filters import Rule
from llmjax.infer.resuming import MADE_FROM, MadeFrom, digest, resuming
from llmjax.progress import counter

LONGEST = 20_000  # characters of a question


class Answer(Protocol):
    """What a conversation about a question ends with."""

    def row(self) -> dict[str, Any]:
        """The answer as a row of a file."""


@dataclass(frozen=True)
class Question:
    """A question with its id: that of its row, else the number of its line."""

    id: Any
    text: str


def read(path: Path) -> list[Question]:
    """The questions of a JSONL file whose rows have "question" and maybe "id"; other fields are left alone.

    Raises UserError, with the number of the line, for a row without a question and for an id that comes twice; and for a
    file without questions.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} with questions")
    found: dict[str, Question] = {}
    for number, line in enumerate(storage.read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: this is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
            raise UserError(f"{path}:{number}: a row must be an object with a text in question")
        check_length(row["question"], f"{path}:{number}: the question")
        question = Question(row.get("id", number), row["question"])
        if str(question.id) in found:
            raise UserError(f"{path}:{number}: the id {question.id!r} comes twice")
        found[str(question.id)] = question
    if not found:
        raise UserError(f"{path} has no questions: write a row with question for each")
    return list(found.values())


def check_length(text: str, where: str) -> None:
    """Raise UserError for a question that is too long to be one."""
    if len(text) > LONGEST:
        raise UserError(
            f"{where} has {len(text):,} characters, and a question may have {LONGEST:,}: shorten it, or ask several"
        )


Start = Callable[[str], Conversation[Answer]]  # of a question's text


def answers(
    engine: Engine,
    questions: Sequence[Question],
    start: Start,
    *,
    transcript: Path,
    setting: dict[str, Any],
    rules: Sequence[Rule] = (),
) -> Iterator[tuple[Question, dict[str, Any], Answer | None]]:
    """The questions, each when it is answered, with the row of its answer (or of its error) and the answer itself.

    Args:
        transcript: what each answer is made from is appended here, see `replay`.
        setting: what decides the prompts beside the question, kept in the transcript.
        rules: filters of what the model reads and writes; their log is beside the transcript.
    """
    log = transcript.with_name("filters.jsonl")
    with storage.appending(transcript) as kept:
        jobs = ((question, functools.partial(start, question.text)) for question in questions)
        for one in asking.run(engine, jobs, rules=rules, log=log):
            own = {"id": one.key.id, "question": one.key.text}
            made = {"error": one.error} if one.result is None else one.result.row()
            kept.write(json.dumps({**own, "setting": setting, "asked": one.transcript, "answer": made}) + "\n")
            yield one.key, {**own, **made}, one.result


def answer_file(
    engine: Engine,
    questions: Sequence[Question],
    start: Start,
    *,
    out: Path,
    common: MadeFrom | None = None,
    **settings: Any,
) -> dict[str, int]:
    """Answer the questions that have no answer in `out`, and write each when it is finished: counts of what was done.

    `common` is what all answers are made from, see `infer.resuming`; `settings` are those of `answers`.
    """
    wanted = {str(question.id): {"question": digest(question.text), **(common or {})} for question in questions}
    show = counter("answering", " questions")
    with resuming(out, wanted) as (done, file):
        todo = [question for question in questions if str(question.id) not in done]
        counts = {"answered before": len(questions) - len(todo), "answered": 0, "refused": 0, "failed": 0}
        made = answers(engine, todo, start, **settings)
        for number, (question, row, result) in enumerate(made, start=1):
            file.write(json.dumps({**row, MADE_FROM: wanted[str(question.id)]}) + "\n")
            counts["failed" if result is None else "refused" if row.get("refused") else "answered"] += 1
            if show is not None:
                show(number, len(todo))
    return counts


def replay(path: Path, start: Callable[[str, dict[str, Any]], Conversation[Answer]]) -> Iterator[tuple[Any, str]]:
    """Make the answers of a transcript again without a model: the id of each, and how it differs ("": not at all).

    Raises UserError for a file that is no transcript.
    """
    if not path.is_file():
        raise UserError(f"there is no transcript {path}")
    number = 0
    for number, line in enumerate(storage.read_lines(path), start=1):
        try:
            row = json.loads(line)
            own, question, setting, asked, before = (row[k] for k in ("id", "question", "setting", "asked", "answer"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number} is no row of a transcript: {error}") from error
        if "error" in before:
            continue
        try:
            now = json.loads(json.dumps(asking.replay(start(question, setting), asked).row()))
        except UserError as error:
            yield own, str(error)
            continue
        yield own, "" if now == before else f"the answer is {now} and was {before}"
    asking.check_rows(path, number)
