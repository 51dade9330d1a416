"""Gopher's quality rules: too short or long, odd words, symbols, bullets, ellipses, no letters, no stop words."""

import functools

import numpy as np
from ml_collections import ConfigDict

from llmjax.prepare import rules
from llmjax.prepare.records import Step
from llmjax.prepare.rules import Check, share


def make(settings: ConfigDict) -> Step:
    """The step for the words of `settings.words`; reasons such as "gopher_quality: mean word length 2.1"."""
    find = functools.partial(checks, rule=rules.GopherQuality())
    return functools.partial(rules.reject_broken, kind="gopher_quality", find=find, words=settings.words)


def checks(found: dict[str, np.ndarray], rule: rules.GopherQuality) -> list[Check]:
    """The rules in their order, for what `kernels.statistics.statistics` found."""
    words, plain = found["words"], found["plain_words"]
    length = share(found["plain_characters"], plain)
    hashes, ellipses = share(found["hashes"], words), share(found["ellipses"], words)
    bullets, ends = share(found["bullet_lines"], found["lines"]), share(found["ellipsis_lines"], found["lines"])
    alphabetic = share(found["alphabetic_words"], words)
    return [
        Check("words", plain, (plain < rule.words[0]) | (plain > rule.words[1])),
        Check("mean word length", length, (length < rule.mean_word_length[0]) | (length > rule.mean_word_length[1])),
        Check("hash signs a word", hashes, hashes > rule.hashes),
        Check("ellipses a word", ellipses, ellipses > rule.ellipses),
        Check("lines with a bullet", bullets, bullets > rule.bullet_lines),
        Check("lines ending in an ellipsis", ends, ends > rule.ellipsis_lines),
        Check("words with a letter", alphabetic, alphabetic < rule.alphabetic_words),
        Check("different stop words", found["stop_words"], found["stop_words"] < rule.stop_words),
    ]
