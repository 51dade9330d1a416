"""Which questions a persona declines: those whose words no single passage covers well enough. The threshold is
measured.

`Index.coverage` scores a question: the share of its words, weighted by rarity, that one passage has. Half of the
questions choose the threshold that best separates covered questions from others (Youden 1950). The other half gives its
error rates. The user may give questions. Otherwise the covered ones are words of sentences of the texts, scored without
the passage that holds the sentence, and the others are the list below.
"""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.errors import UserError
from llmjax.persona.style import FUNCTION_WORDS, words_of
from llmjax.retrieve.documents.ask import search
from llmjax.retrieve.documents.blocks import sentences
from llmjax.retrieve.documents.index import Index

WORDS = 4  # content words of a question that is made of a sentence, as many as those outside have
MOST, FEWEST = 200, 10  # questions inside; of either kind
OUTSIDE = (
    "How do I install a graphics card in my desktop computer?", "Which team won the football world cup on penalties?",
    "How long should I boil spaghetti for four people?", "What is the best phone camera for night photographs?",
    "How does a jet engine differ from a rocket engine?", "Which vitamins are in broccoli and spinach?",
    "How do I reset the password of my email account?", "What causes turbulence on a transatlantic flight?",
    "Who directed the film with the blue aliens?", "How many chromosomes does a fruit fly have?",
    "What is the boiling point of liquid nitrogen?", "How do I change a flat bicycle tyre?",
    "Which programming language has garbage collection?", "How do noise cancelling headphones work?",
    "What is the difference between a virus and a bacterium?", "How do I train a puppy to use the garden?",
    "Which guitar strings are good for jazz?", "How much memory does a laptop need for video editing?",
    "What is the offside rule in hockey?", "How do solar panels make electricity?",
    "Which yoga exercises help against back pain?", "How do I bake sourdough bread without a mixer?",
    "What is the capital of Kazakhstan?", "How do submarines navigate under Arctic ice?",
    "Which chess opening begins with the queen's pawn?", "How are plastic bottles recycled into clothes?",
    "What does a subwoofer add to a home cinema?", "How do I remove red wine from a carpet?",
    "Which moons of Jupiter have volcanoes?", "How does a microwave oven heat soup?",
    "What is the exchange rate between yen and euro?", "How do I prune roses before winter?",
    "Which tyres are best for snow and slush?", "How do touch screens recognise fingers?",
    "What is the recipe for a mango smoothie?", "How do lawyers register a trademark online?",
    "Which airline flies nonstop to Singapore?", "How do contact lenses correct astigmatism?",
    "What is the battery range of an electric scooter?", "How do I calibrate a telescope mount?",
    "Which basketball player scored most points last season?", "How do earthquakes trigger a tsunami?",
    "What is the melting temperature of chocolate?", "How do I configure a wireless router?",
    "Which antibiotics treat pneumonia?", "How does a dishwasher soften water?",
    "What is the plot of the newest detective series?", "How do I knit a sweater with cables?",
    "Which spices belong in a Thai curry?", "How do satellites measure sea level?",
)  # fmt: skip


@dataclass(frozen=True)
class Threshold:
    """The coverage below which questions are declined, and its measurement."""

    coverage: float
    inside: int  # questions that counted in the measurement of errors, not in the choice
    outside: int
    declined_inside: float  # share of those, an error
    declined_outside: float
    questions: str  # where they come from


def measure(index: Index, texts: Mapping[str, str], *, questions: Path | None = None, seed: int = 0) -> Threshold:
    """The threshold for an index of these texts (path -> text).

    Args:
        questions: a JSONL file of rows with `question` and `inside` (true or false); None: see the module.

    Raises UserError for too few questions.
    """
    if questions is not None:
        inside, outside = ([_score(index, q) for q in _read(questions) if q[1] is is_in] for is_in in (True, False))
    else:
        inside = [_score(index, made) for made in made_of(texts, seed=seed)]
        outside = [_score(index, (question, False)) for question in OUTSIDE]
    for name, found in (("inside", inside), ("outside", outside)):
        if len(found) < FEWEST:
            where = f"{questions} has" if questions else "the texts give"
            raise UserError(
                f"{where} {len(found)} questions {name} the texts, and at least {FEWEST} are needed to measure which ones to "
                "decline: give longer texts, or --questions FILE with rows of question and inside"
            )
    coverage = best(inside[::2], outside[::2])
    rest_in, rest_out = inside[1::2], outside[1::2]
    return Threshold(
        coverage, len(rest_in), len(rest_out), sum(x < coverage for x in rest_in) / len(rest_in),
        sum(x < coverage for x in rest_out) / len(rest_out),
        questions.name if questions else f"made of sentences; {len(OUTSIDE)} on other subjects",
    )  # fmt: skip


def best(inside: Sequence[float], outside: Sequence[float]) -> float:
    """The value that best separates both: the middle between two scores where most of `inside` are above and `outside` below.

    Among equally good values it is the lowest, which declines the fewest questions. It is above 0, because a passage
    without a word of the question answers nothing.
    """
    scores = sorted({0.0, *inside, *outside, 1.0})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(scores)]

    def gain(at: float) -> float:
        return sum(x >= at for x in inside) / len(inside) + sum(x < at for x in outside) / len(outside)

    return max(middles, key=lambda at: (gain(at), -at))


def made_of(texts: Mapping[str, str], *, seed: int = 0) -> list[tuple[str, tuple[str, int, int]]]:
    """Questions made of sentences: (words, place of the sentence), at most MOST, drawn with a seed."""
    rng = random.Random(seed)
    every = [(path, a, b) for path, text in sorted(texts.items()) for a, b in sentences(text)]
    found = []
    for path, a, b in rng.sample(every, len(every)):
        words = sorted({w for w in words_of(texts[path][a:b]) if w not in FUNCTION_WORDS and len(w) > 2})
        if len(words) >= WORDS:
            found.append((f"Tell me about {', '.join(rng.sample(words, WORDS))}?", (path, a, b)))
        if len(found) == MOST:
            break
    return found


def _score(index: Index, asked: tuple[str, Any]) -> float:
    """The coverage of a question, without the passages that hold its sentence."""
    question, place = asked
    passages = search(index, question)
    if isinstance(place, tuple):
        path, start, end = place
        passages = [one for one in passages if one.path != path or one.end <= start or one.start >= end]
    return index.coverage(question, passages)


def _read(path: Path) -> list[tuple[str, bool]]:
    """The user's questions, each with whether the texts cover it."""
    found = []
    for number, line in enumerate(storage.read_lines(path) if path.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, inside = row["question"], row["inside"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: a row needs question and inside: {error}") from error
        if not isinstance(question, str) or not isinstance(inside, bool):
            raise UserError(f"{path}:{number}: question must be a text, and inside true or false")
        found.append((question, inside))
    if not found:
        raise UserError(f"there are no questions in {path}")
    return found
