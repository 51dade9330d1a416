"""A needle in a haystack: does a model find a fact again, wherever it stands in a text that fills its context?

A number is told at five depths of texts of a quarter, a half and all of the context. `acc` is the share of places where the
model finds the right one of eight numbers likeliest, `exact` where it writes it greedily, `acc_LENGTH` those of one length.
The haystack is `haystack.txt` of a folder of `eval.data`; without it, plain sentences.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.eval.leaderboard import TaskScore
from llmjax.eval.likelihood import ScoringRequest, context_length, score_requests
from llmjax.eval.statistics import mean
from llmjax.infer.language_model import LanguageModel

TASK = "needle"
SHARES, DEPTHS, TRIALS, CHOICES = (0.25, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), 4, 8
NAMES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quebec", "Dakar", "Perth")
PLAIN = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACT, QUESTION = " The secret number of {name} is {number}. ", " The secret number of {name} is"
SEED = 0


def evaluate(model: LanguageModel, folders: Sequence[str | Path], *, limit: int = 0) -> TaskScore:
    """The scores of a model; `limit`: texts for each length and depth (4).

    Raises UserError for a context too short for a fact and a question.
    """
    tokenizer, longest = model.tokenizer, context_length(model.config)
    rng = np.random.default_rng(SEED)
    file = next((path for folder in folders if (path := Path(folder) / "haystack.txt").is_file()), None)
    hay = tokenizer.encode(file.read_text(encoding="utf-8") if file else PLAIN)
    cases: list[dict[str, Any]] = []
    requests: list[ScoringRequest] = []
    for length in sorted({int(longest * share) for share in SHARES}):
        for depth in DEPTHS * (limit or TRIALS):
            name, numbers = rng.choice(NAMES), rng.choice(np.arange(1000, 10000), CHOICES, replace=False)
            gold = int(rng.integers(CHOICES))
            ends = [tokenizer.encode(f" {number}") for number in numbers]
            fact = tokenizer.encode(FACT.format(name=name, number=numbers[gold]))
            asked = tokenizer.encode(QUESTION.format(name=name))
            room = length - len(tokenizer.prefix_ids) - len(fact) - len(asked) - max(map(len, ends))
            if room < 0:
                raise UserError(
                    f"{TASK} asks at {length} tokens, too few for a fact and a question: raise model.max_length"
                )
            start = int(rng.integers(len(hay)))
            around = [hay[(start + i) % len(hay)] for i in range(room)]
            at = round(depth * room)
            context = [*tokenizer.prefix_ids, *around[:at], *fact, *around[at:], *asked]
            requests += [ScoringRequest(context, end) for end in ends]
            cases.append({"id": len(cases), "length": length, "depth": depth, "gold": gold})
    found = score_requests(model, requests, max_length=longest)
    for case in cases:
        own = found[case["id"] * CHOICES : (case["id"] + 1) * CHOICES]
        case["acc"] = float(int(np.argmax([one.sum for one in own])) == case["gold"])
        case["exact"] = float(own[case["gold"]].greedy)
    metrics = {name: mean([case[name] for case in cases]) for name in ("acc", "exact")}
    for length in dict.fromkeys(case["length"] for case in cases):
        metrics[f"acc_{length}"] = mean([case["acc"] for case in cases if case["length"] == length])
    return TaskScore(TASK, 0, "acc", metrics, cases)
