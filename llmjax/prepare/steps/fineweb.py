"""FineWeb's own rules: too few lines that end a sentence, short lines, repeated lines, lists."""

import functools

import numpy as np
from ml_collections import ConfigDict

from llmjax.prepare import rules
from llmjax.prepare.records import Step
from llmjax.prepare.rules import Check, share


def make(settings: ConfigDict) -> Step:
    """The step for the words of `settings.words`; reasons such as "fineweb: short lines 0.8"."""
    rule = rules.FineWeb()
    find = functools.partial(checks, rule=rule)
    return functools.partial(
        rules.reject_broken, kind="fineweb", find=find, words=settings.words, short_line=rule.short_line
    )


def checks(found: dict[str, np.ndarray], rule: rules.FineWeb) -> list[Check]:
    """The rules in their order, for what `kernels.statistics.statistics` found."""
    lines = found["full_lines"]
    terminal, short = share(found["terminal_lines"], lines), share(found["short_lines"], lines)
    repeated = share(found["repeated_full_characters"], found["characters"] - found["line_feeds"])
    ends = share(found["line_feeds"], found["words"])
    return [
        Check("lines", lines, lines == 0),
        Check("lines ending a sentence", terminal, terminal < rule.terminal_lines),
        Check("short lines", short, short > rule.short_lines),
        Check("characters in repeated lines", repeated, repeated > rule.repeated_characters),
        Check("line ends a word", ends, ends > rule.line_ends),
    ]
