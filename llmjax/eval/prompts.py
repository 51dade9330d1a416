"""Multiple-choice questions as (context, continuation) texts, word for word as in lm-evaluation-harness 0.4.

The harness is not needed here. A test compares every prompt with the harness's.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmjax.errors import UserError
from llmjax.eval.leaderboard import Setting
from llmjax.eval.local_data import MMLU, Doc, TaskData

SHOT_SEED = 1234  # of the examples, as in the harness
TRUTHFUL_PREAMBLE = (
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\nA: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\nA: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."
)


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        context: the text before the choices, without examples; one for all choices, or one for each.
        continuations: the texts to score, without the space in front.
        choices: the texts whose lengths normalise the scores, mostly the continuations.
        gold: the index of the right choice.
        shot: the question with its right answer, as an example.
        labels: whether each choice is true, where several may be (TruthfulQA's mc2).
    """

    context: str | tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    shot: str = ""
    labels: tuple[int, ...] = ()


def _arc(doc: Doc) -> Question:
    context, choices = f"Question: {doc['question']}\nAnswer:", tuple(doc["choices"]["text"])
    gold = doc["choices"]["label"].index(doc["answerKey"])
    return Question(context, choices, choices, gold, f"{context} {choices[gold]}")


def _hellaswag(doc: Doc) -> Question:
    context = clean_wikihow(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    choices = tuple(map(clean_wikihow, doc["endings"]))
    gold = int(doc["label"])
    return Question(context, choices, choices, gold, f"{context} {choices[gold]}")


def clean_wikihow(text: str) -> str:
    """The text without the markup of HellaSwag's WikiHow texts."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _mmlu(doc: Doc) -> Question:
    lettered = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    context = f"{doc['question'].strip()}{lettered}\nAnswer:"
    choices, gold = ("A", "B", "C", "D"), int(doc["answer"])
    return Question(context, choices, choices, gold, f"{context} {choices[gold]}")


def _truthful(doc: Doc, which: str) -> Question:
    context = f"{TRUTHFUL_PREAMBLE}\n\nQ: {doc['question']}\nA:"
    choices, labels = tuple(doc[which]["choices"]), tuple(doc[which]["labels"])
    return Question(context, choices, choices, 0, labels=labels if which == "mc2_targets" else ())


def _winogrande(doc: Doc) -> Question:
    before, _, after = doc["sentence"].partition("_")
    contexts = (before + doc["option1"], before + doc["option2"])
    gold, rest = {"1": 0, "2": 1}[doc["answer"]], after.strip()
    return Question(contexts, (rest, rest), contexts, gold, f"{contexts[gold]} {rest}")


MAKERS: dict[str, Callable[[Doc], Question]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "truthfulqa_mc1": lambda doc: _truthful(doc, "mc1_targets"),
    "truthfulqa_mc2": lambda doc: _truthful(doc, "mc2_targets"),
    "winogrande": _winogrande,
}


def maker(task: str) -> Callable[[Doc], Question] | None:
    """The function that makes the questions of a task or a subject of MMLU; None for tasks that only the harness has."""
    return MAKERS.get(MMLU if task.startswith(f"{MMLU}_") else task)


def description(task: str) -> str:
    """The text before the examples."""
    if not task.startswith(f"{MMLU}_"):
        return ""
    subject = task.removeprefix(f"{MMLU}_").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def prompts(
    task: str, data: TaskData, setting: Setting, *, limit: int = 0
) -> list[tuple[Question, list[tuple[str, str]]]]:
    """Each question with its (context, continuation) texts. Contexts include the examples.

    One sequence of random numbers draws the examples of all questions, so they depend on the order of the questions.
    MMLU takes the first examples.

    Args:
        limit: the most questions; 0: all.

    Raises:
        UserError: if there are fewer examples than the setting asks for.
    """
    make = MAKERS[MMLU if task.startswith(f"{MMLU}_") else task]
    asked = data.splits[data.asked]
    pool = data.splits[data.shots]
    available = len(pool) - data.leave_one_out
    if available < setting.shots:
        raise UserError(
            f"{task} takes {setting.shots} examples from its {data.shots} split, which has {available} to spare: "
            "add rows to its file, or lower the shots"
        )
    rng, first = random.Random(SHOT_SEED), task.startswith(f"{MMLU}_")
    made = []
    for doc in asked[:limit] if limit else asked:
        shots = _choose(doc, pool, setting.shots, rng, first=first, exclude=data.leave_one_out)
        before = description(task) + "".join(f"{make(shot).shot}\n\n" for shot in shots)
        question = make(doc)
        many = (question.context,) * len(question.choices) if isinstance(question.context, str) else question.context
        pairs = [(before + c, f" {rest}") for c, rest in zip(many, question.continuations, strict=True)]
        made.append((question, pairs))
    return made


def _choose(
    doc: Doc, pool: Sequence[Doc], count: int, rng: random.Random, *, first: bool, exclude: bool
) -> Sequence[Doc]:
    """The examples of a question, drawn as in the harness (its samplers.py)."""
    if not count:
        return ()
    if first:
        return [other for other in pool if not exclude or other != doc][:count]
    if not exclude:
        return rng.sample(pool, count)
    drawn = [other for other in rng.sample(pool, count + 1) if other != doc][:count]
    if len(drawn) < count:  # the same row is in the file twice, and both were drawn
        drawn = rng.sample([other for other in pool if other != doc], count)
    return drawn
