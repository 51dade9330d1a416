"""A model as the judge of two answers (Zheng et al. 2023), asked twice, with the answers in either order.

If the verdict depends on the order, it counts as a tie. If the judge gives no verdict, the judgement is missing, and does
not count.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from llmjax.data.chat import chat_ids
from llmjax.errors import UserError
from llmjax.eval.likelihood import context_length
from llmjax.eval.ratings import Choice, Pair, Rating, rate
from llmjax.infer.language_model import LanguageModel
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
TOGETHER = 16  # pairs that are judged in one call
VERDICT = re.compile(r"\[\[([ABC])\]\]")
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


def ask_model(model: LanguageModel, *, max_new_tokens: int = 256) -> Ask:
    """A function that asks a chat model, greedily. Its answer is None to a question longer than the model reads."""
    room = context_length(model.config) - max_new_tokens

    def ask(prompts: Sequence[str]) -> list[str | None]:
        ids = [chat_ids(model.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
        fits = [row for row in ids if len(row) <= room]
        made = iter(model.generate(fits, max_new_tokens=max_new_tokens, stop=[], **{**PLAIN, "temperature": 0.0}))
        return [next(made).text if len(row) <= room else None for row in ids]

    return ask
