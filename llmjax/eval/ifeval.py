"""IFEval (Zhou et al. 2023): does a model follow instructions that a program can check?

Four scores, as lm-evaluation-harness's `ifeval`: of prompts whose constraints are all followed and of single constraints,
each strictly and loosely (`constraints.follows_loosely`). The prompts are in `ifeval_prompts.jsonl`, `ifeval.jsonl` or
`ifeval_test.jsonl` of a folder of `eval.data`, with key, prompt, instruction_id_list and kwargs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.data.chat import chat_ids
from llmjax.errors import UserError
from llmjax.eval import constraints, local_data
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.likelihood import context_length
from llmjax.eval.statistics import mean
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import PLAIN

TASK = "ifeval"
FILES = ("ifeval_prompts.jsonl", "ifeval.jsonl", "ifeval_test.jsonl")
COLUMNS = ("prompt", "instruction_id_list", "kwargs")
NEW_TOKENS = 1280  # as in the harness


@dataclass(frozen=True)
class Followed:
    """Whether each constraint of a prompt is followed, strictly and loosely."""

    strict: list[bool]
    loose: list[bool]


def find(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The prompts. Raises UserError if no folder has them, or a row lacks a column."""
    for path in (Path(folder) / name for folder in folders for name in FILES):
        if path.is_file():
            rows = local_data.read(path)
            for number, row in enumerate(rows, 1):
                if missing := [name for name in COLUMNS if name not in row]:
                    raise UserError(
                        f"{path}, row {number} has no {missing[0]}: IFEval's rows have {', '.join(COLUMNS)}"
                    )
            return rows
    raise UserError(f"no prompts of {TASK}: give --data DIR, a folder with {FILES[0]}")


def score(row: dict[str, Any], answer: str) -> Followed:
    """The constraints of a prompt's row that an answer follows."""
    asked = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    return Followed(
        [constraints.follows(answer, name, arguments) for name, arguments in asked],
        [constraints.follows_loosely(answer, name, arguments) for name, arguments in asked],
    )


def scores(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> TaskScore:
    """The task's scores for an answer to each row."""
    found = [score(row, answer) for row, answer in zip(rows, answers, strict=True)]
    items = [
        {
            "id": row.get("key", number),
            "prompt_level_strict_acc": float(all(one.strict)),
            "prompt_level_loose_acc": float(all(one.loose)),
            "strict": one.strict,
            "loose": one.loose,
            "text": answer,
        }
        for number, (row, answer, one) in enumerate(zip(rows, answers, found, strict=True))
    ]
    metrics = {
        "prompt_level_strict_acc": mean([item["prompt_level_strict_acc"] for item in items]),
        "inst_level_strict_acc": mean([float(one) for f in found for one in f.strict]),
        "prompt_level_loose_acc": mean([item["prompt_level_loose_acc"] for item in items]),
        "inst_level_loose_acc": mean([float(one) for f in found for one in f.loose]),
    }
    return TaskScore(TASK, 0, "prompt_level_strict_acc", metrics, items)


def evaluate(
    model: LanguageModel,
    folders: Sequence[str | Path],
    *,
    limit: int = 0,
    max_new_tokens: int = NEW_TOKENS,
    on_written: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """The scores of a model's greedy answers; prompts are messages of a user where it has a chat template.

    Raises UserError for prompts and data that are missing, and where the new tokens fill the model's context.
    """
    rows = find(folders)
    rows = rows[:limit] if limit else rows
    constraints.find_data(folders)
    for row in rows:  # what cannot be checked is said before the model writes for an hour
        score(row, "A word, and ANOTHER one. A second sentence.")
    made = model.generate(
        prompts(model, [row["prompt"] for row in rows], max_new_tokens=max_new_tokens),
        max_new_tokens=max_new_tokens, stop=[], on_done=on_written, **{**PLAIN, "temperature": 0.0},
    )  # fmt: skip
    return scores(rows, [completion.text for completion in made])


def prompts(model: LanguageModel, texts: Sequence[str], *, max_new_tokens: int) -> list[list[int]]:
    """The ids of prompts, whose beginning is cut where they leave no room for so many new tokens."""
    room = context_length(model.config) - max_new_tokens
    if room < 1:
        raise UserError(
            f"{max_new_tokens} new tokens leave nothing of the model's {context_length(model.config)} for the prompt: use a "
            "model that reads more"
        )
    tokenizer = model.tokenizer
    if tokenizer.chat_template:
        ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    else:
        ids = [[*tokenizer.prefix_ids, *tokenizer.encode(text)] for text in texts]
    return [row[-room:] or [tokenizer.start_id] for row in ids]
