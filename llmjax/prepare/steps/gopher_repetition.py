"""Gopher's repetition rules: repeated paragraphs and lines, one frequent run of words, repeated runs of words."""

import functools

import numpy as np
from ml_collections import ConfigDict

from llmjax.prepare import rules
from llmjax.prepare.records import Step
from llmjax.prepare.rules import Check, share


def make(settings: ConfigDict) -> Step:
    """The step for the words of `settings.words`; reasons such as "gopher_repetition: characters in lines 0.31"."""
    find = functools.partial(checks, rule=rules.GopherRepetition())
    return functools.partial(rules.reject_broken, kind="gopher_repetition", find=find, words=settings.words)


def checks(found: dict[str, np.ndarray], rule: rules.GopherRepetition) -> list[Check]:
    """The rules in their order, for what `kernels.statistics.statistics` found."""
    characters = found["characters"]
    result = [Check("characters", characters, characters == 0)]

    def add(name: str, value: np.ndarray, most: float) -> None:
        result.append(Check(name, value, value > most))

    add("repeated paragraphs", share(found["repeated_paragraphs"], found["paragraphs"]), rule.paragraphs)
    in_paragraphs = share(found["repeated_paragraph_characters"], characters)
    add("characters in repeated paragraphs", in_paragraphs, rule.paragraph_characters)
    add("repeated lines", share(found["repeated_pieces"], found["pieces"]), rule.lines)
    add("characters in repeated lines", share(found["repeated_piece_characters"], characters), rule.line_characters)
    for n, most in rule.top.items():
        add(f"characters in the top {n}-gram", share(found[f"top_{n}"], characters), most)
    for n, most in rule.repeated.items():
        add(f"characters in repeated {n}-grams", share(found[f"repeated_{n}"], characters), most)
    return result
