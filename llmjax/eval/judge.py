"""A model as the judge of answers (Zheng et al. 2023): of two, asked twice, with the answers in either order, or of one.

If the verdict on two answers depends on the order, it counts as a tie. If the judge gives no verdict, the judgement is
missing, and does not count. A judge is a function from questions to its answers: a model, a function of yours, or a file
of what a judge said before (`ask_of`).
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmjax.data.chat import chat_ids
from llmjax.errors import UserError
from llmjax.eval import local_data
from llmjax.eval.likelihood import context_length
from llmjax.eval.ratings import Choice, Pair, Rating, rate
from llmjax.infer.language_model import LanguageModel, load
from llmjax.infer.request import PLAIN

PROMPT = """\
Two assistants answered the same request. Judge which answer is better: more helpful, correct, relevant and clear. Neither \
the order in which they stand here nor their length should count.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which one is better? Reply with [[A]], [[B]], or [[C]] if they are equally good."""
SINGLE = """\
An assistant answered the request below. Rate the answer from 1 to 10: is it helpful, correct, relevant, deep enough and clear? \
Its length alone should not count.{reference}

{conversation}

Explain shortly, then give the rating as [[N]], such as [[5]]."""
REFERENCE = """ Compare it with the reference answer, and look for mistakes first.

[Reference answer]
{reference}"""
TOGETHER = 16  # pairs that are judged in one call
VERDICT = re.compile(r"\[\[([ABC])\]\]")
RATING = re.compile(r"\[\[(10|[1-9])(?:\.0)?\]\]")
Ask = Callable[[Sequence[str]], Sequence[str | None]]  # prompts -> the judge's answers; None: it failed


def judge(pairs: Sequence[Pair], ask: Ask, *, rater: str) -> Iterator[Rating]:
    """A rating of every pair, as soon as it is known. `choice` is None if either verdict is missing."""
    for start in range(0, len(pairs), TOGETHER):
        part = pairs[start : start + TOGETHER]
        asked = [
            PROMPT.format(prompt=p.prompt, first=p.answers[i], second=p.answers[1 - i]) for p in part for i in (0, 1)
        ]
        said = list(ask(asked))
        if len(said) != len(asked):
            raise UserError(f"the judge gave {len(said)} answers to {len(asked)} questions")
        for pair, text, other in zip(part, said[::2], said[1::2], strict=True):
            one, two = verdict(text, first=0), verdict(other, first=1)
            choice: Choice = None if one is None or two is None else one if one == two else "tie"
            yield rate(pair, rater=rater, choice=choice, order=(0, 1))


def verdict(text: str | None, *, first: int) -> Choice:
    """The better answer, 0 or 1, or "tie"; None if the text has no verdict or several.

    Args:
        first: the index of the answer that was shown as A.
    """
    found = set(VERDICT.findall(text or ""))
    if len(found) != 1:
        return None
    [letter] = found
    return "tie" if letter == "C" else first if letter == "A" else 1 - first


def rating_prompt(turns: Sequence[str], answers: Sequence[str], reference: str = "") -> str:
    """The question for a rating of the last answer of a conversation. `reference`: the right answer to its last turn."""
    said = [f"[Request]\n{turn}\n\n[Answer]\n{answer}" for turn, answer in zip(turns, answers, strict=True)]
    told = REFERENCE.format(reference=reference) if reference else ""
    last = " Rate the last answer; the others are its context." if len(said) > 1 else ""
    return SINGLE.format(reference=last + told, conversation="\n\n".join(said))


def rating(text: str | None) -> int | None:
    """The rating from 1 to 10 in what a judge said; None if there is none or there are several."""
    found = set(RATING.findall(text or ""))
    return int(found.pop()) if len(found) == 1 else None


def ask_of(where: str) -> Ask:
    """The judge that a setting names: the folder of a run, a function (module:function), or a file of earlier answers.

    The file is JSON Lines with prompt and text; a question that it lacks has no answer. Raises UserError for a name that is
    none of these.
    """
    if Path(where).suffix == ".jsonl":
        known = {row["prompt"]: row["text"] for row in local_data.read(Path(where))}
        return lambda prompts: [known.get(prompt) for prompt in prompts]
    if (Path(where) / "config.json").is_file():
        return ask_model(load(where))
    module, colon, name = where.partition(":")
    try:
        if colon:
            found: Ask = getattr(importlib.import_module(module), name)
            return found
    except (ImportError, AttributeError) as error:
        raise UserError(f"the judge {where!r} cannot be imported: {error}") from error
    raise UserError(f"the judge {where!r} is no run, no module:function and no .jsonl file of earlier answers")


def ask_model(model: LanguageModel, *, max_new_tokens: int = 256) -> Ask:
    """A function that asks a chat model, greedily. Its answer is None to a question longer than the model reads."""
    room = context_length(model.config) - max_new_tokens

    def ask(prompts: Sequence[str]) -> list[str | None]:
        ids = [chat_ids(model.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
        fits = [row for row in ids if len(row) <= room]
        made = iter(model.generate(fits, max_new_tokens=max_new_tokens, stop=[], **{**PLAIN, "temperature": 0.0}))
        return [next(made).text if len(row) <= room else None for row in ids]

    return ask
