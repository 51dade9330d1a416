"""MT-Bench (Zheng et al. 2023): answers to 80 requests of two turns, rated by a judge; and how well a judge agrees with people.

`mt_bench` rates each answer from 1 to 10, beside the reference answer where there is one; with other answers to compare with
(`eval.judge_against`) it also has the share of them that are worse, each pair judged in both orders. `mt_bench_human` asks the model
itself to judge pairs that people judged.

Files, in the folders of `eval.data`: mt_bench_questions.jsonl (question_id, category, turns), mt_bench_reference.jsonl
(question_id, choices or turns), mt-bench_human.json or .json.gz (input, output_1, output_2, label 1 or 2).
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax.data.chat import chat_ids
from llmjax.errors import UserError
from llmjax.eval import judge, local_data
from llmjax.eval.judge import Ask
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.likelihood import context_length
from llmjax.eval.ratings import Pair
from llmjax.eval.statistics import mean
from llmjax.infer.language_model import LanguageModel
from llmjax.infer.request import PLAIN

TASK, HUMAN = "mt_bench", "mt_bench_human"
QUESTIONS, REFERENCES, VOTES = "mt_bench_questions.jsonl", "mt_bench_reference.jsonl", "mt-bench_human.json"
NEW_TOKENS = 512
Row = dict[str, Any]


def evaluate(
    model: LanguageModel, folders: Sequence[str | Path], *, where: str, against: str = "", limit: int = 0
) -> TaskScore:
    """The ratings of a model's greedy answers.

    Args:
        where: the judge, see `judge.ask_of`.
        against: a file of other answers (question_id, turns or choices) to compare with; "": none.

    Raises:
        UserError: without questions, judge or chat template.
    """
    if not where:
        raise UserError(
            f"{TASK} needs a judge: set --config.eval.judge to a run, a module:function or a file of what a judge said"
        )
    questions = read(folders, limit=limit)
    ask = judge.ask_of(where)
    others = _turns_by_question(Path(against)) if against else None
    return score(questions, answers(model, [row["turns"] for row in questions]), ask, others=others)


def read(folders: Sequence[str | Path], *, limit: int = 0) -> list[Row]:
    """The questions, each with "reference", the right answers to its turns, where there are any."""
    rows = local_data.read(_file(QUESTIONS, folders))
    known = [Path(folder) / REFERENCES for folder in folders]
    references = next((_turns_by_question(path) for path in known if path.is_file()), {})
    rows = [{**row, "reference": references.get(row["question_id"]) or row.get("reference") or []} for row in rows]
    return rows[:limit] if limit else rows


def answers(model: LanguageModel, turns: Sequence[Sequence[str]]) -> list[list[str]]:
    """The model's answers to the turns of each conversation, one turn after another, greedily."""
    room = context_length(model.config) - NEW_TOKENS
    chats: list[list[dict[str, Any]]] = [[] for _ in turns]
    for number in range(max(map(len, turns), default=0)):
        asked = [i for i, texts in enumerate(turns) if number < len(texts)]
        for i in asked:
            chats[i].append({"role": "user", "content": turns[i][number]})
        ids = [chat_ids(model.tokenizer, chats[i])[-max(room, 1) :] for i in asked]
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, stop=[], **{**PLAIN, "temperature": 0.0})
        for i, completion in zip(asked, made, strict=True):
            chats[i].append({"role": "assistant", "content": completion.text})
    return [[message["content"] for message in chat if message["role"] == "assistant"] for chat in chats]


def score(
    questions: Sequence[Row], given: Sequence[Sequence[str]], ask: Ask, *, others: dict[Any, list[str]] | None = None
) -> TaskScore:
    """The score of answers by a judge. What it gives no verdict on is counted, and is in no mean.

    Args:
        given: the answers to the turns of each question.
        others: question_id -> answers to compare with.
    """
    asked = [
        (row, turn, judge.rating_prompt(row["turns"][: turn + 1], texts[: turn + 1], _at(row["reference"], turn)))
        for row, texts in zip(questions, given, strict=True)
        for turn in range(len(texts))
    ]
    said = list(ask([prompt for _, _, prompt in asked]))
    if len(said) != len(asked):
        raise UserError(f"the judge gave {len(said)} answers to {len(asked)} questions")
    items: list[Row] = [
        {"id": f"{row['question_id']}/{turn + 1}", "task": row["category"], "turn": turn + 1, "prompt": prompt, "text": text,
         "rating": judge.rating(text)}
        for (row, turn, prompt), text in zip(asked, said, strict=True)
    ]  # fmt: skip
    rated = [item for item in items if item["rating"] is not None]
    if not rated:
        raise UserError(
            "the judge gave no rating ([[1]] to [[10]]) on any answer: use a model that follows instructions"
        )
    metrics = {"rating": mean([float(item["rating"]) for item in rated])}
    for turn in sorted({item["turn"] for item in rated}):
        metrics[f"rating_turn_{turn}"] = mean([float(item["rating"]) for item in rated if item["turn"] == turn])
    notes = [f"{TASK}: the judge gave no rating on {len(items) - len(rated)} of {len(items)} answers"]
    if others is not None:
        wins, missing = _compared(questions, given, ask, others)
        metrics["win_rate"] = mean(wins)
        notes.append(f"{TASK}: the judge gave no verdict on {missing} of {len(wins) + missing} pairs")
    return TaskScore(TASK, 0, "rating", metrics, items, tuple(notes))


def _compared(
    questions: Sequence[Row], given: Sequence[Sequence[str]], ask: Ask, others: dict[Any, list[str]]
) -> tuple[list[float], int]:
    """1, .5 or 0 for each conversation that is better, as good or worse than the other; and those without a verdict."""
    pairs = [
        Pair(_numbered(row["turns"]), (_numbered(texts), _numbered(others[row["question_id"]])), ("a", "b"))
        for row, texts in zip(questions, given, strict=True)
        if row["question_id"] in others
    ]  # fmt: skip
    choices = [made.choice for made in judge.judge(pairs, ask, rater="judge")]
    wins = [{0: 1.0, "tie": 0.5, 1: 0.0}[choice] for choice in choices if choice is not None]
    if not wins:
        raise UserError(
            "the judge compared no pair: eval.judge_against must have answers to these questions (question_id), and the judge "
            "must reply with [[A]], [[B]] or [[C]]"
        )
    return wins, len(choices) - len(wins)


def human(model: LanguageModel, folders: Sequence[str | Path], *, limit: int = 0) -> TaskScore:
    """The agreement of the model, as a judge, with people's votes."""
    path = next((p for folder in folders for p in _votes(Path(folder)) if p.is_file()), None)
    if path is None:
        raise UserError(f"no votes for {HUMAN}: give --data DIR, a folder with {VOTES} or {VOTES}.gz")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = json.loads(data)
    return agreement(rows[:limit] if limit else rows, judge.ask_model(model))


def agreement(rows: Sequence[Row], ask: Ask) -> TaskScore:
    """How often a judge prefers what people prefer.

    agreement: over all pairs with a verdict, a tie being half right. consistent: the share of pairs with the same verdict in
    both orders. missing: the share without a verdict, which is in neither.
    """
    pairs = [Pair(row["input"], (row["output_1"], row["output_2"]), ("1", "2")) for row in rows]
    choices = [made.choice for made in judge.judge(pairs, ask, rater="judge")]
    found = [(choice, int(row["label"]) - 1) for choice, row in zip(choices, rows, strict=True)]
    judged = [(choice, label) for choice, label in found if choice is not None]
    if not judged:
        raise UserError(
            "the judge gave no verdict ([[A]], [[B]] or [[C]]) on any pair: use a model that follows instructions"
        )
    metrics = {
        "agreement": mean([0.5 if choice == "tie" else float(choice == label) for choice, label in judged]),
        "consistent": mean([float(choice != "tie") for choice, _ in judged]),
        "missing": mean([float(choice is None) for choice in choices]),
    }
    items = [{"id": number, "choice": choice, "label": label} for number, (choice, label) in enumerate(found)]
    return TaskScore(HUMAN, 0, "agreement", metrics, items)


def _at(texts: Sequence[str], turn: int) -> str:
    return texts[turn] if turn < len(texts) else ""


def _numbered(texts: Sequence[str]) -> str:
    """Several turns as one text."""
    return texts[0] if len(texts) == 1 else "\n\n".join(f"({i}) {text}" for i, text in enumerate(texts, 1))


def _turns_by_question(path: Path) -> dict[Any, list[str]]:
    """question_id -> answers, of a file with turns or choices[0].turns."""
    rows = local_data.read(path)
    return {row["question_id"]: list(row["turns"] if "turns" in row else row["choices"][0]["turns"]) for row in rows}


def _votes(folder: Path) -> tuple[Path, Path]:
    return folder / VOTES, folder / f"{VOTES}.gz"


def _file(name: str, folders: Sequence[str | Path]) -> Path:
    for folder in folders:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(f"{TASK} needs its questions: give --data DIR, a folder with {name}")
