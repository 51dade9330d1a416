"""The space of a search: for each setting a range or a list of values, and its place between 0 and 1.

optimizer.learning_rate=log(1e-3,1e-1)    even in the logarithm
model.dropout=linear(0,0.3)
model.layers=integer(2,8)
train.batch_size=8,16                     one of these
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmjax import config
from llmjax.config.values import literal
from llmjax.errors import UserError

KINDS = ("log", "linear", "integer")


@dataclass(frozen=True)
class Dimension:
    """A setting and its values."""

    key: str
    kind: str  # log, linear, integer or choice
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def value(self, place: float) -> Any:
        """The value at a place between 0 and 1."""
        if self.kind == "choice":
            return self.choices[min(int(place * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "integer":
            return min(int(self.low + place * (self.high - self.low + 1)), int(self.high))
        if self.kind == "log":
            found = math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + place * (self.high - self.low)
        return float(f"{found:.4g}")  # no more digits than anybody reads

    def place(self, value: Any) -> float:
        """The place of a value between 0 and 1; of choices: the middle of its part."""
        if self.kind == "choice":
            return (self.choices.index(value) + 0.5) / len(self.choices)
        if self.kind == "log":
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    @property
    def ordered(self) -> bool:
        """Whether places say which value is larger."""
        numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in self.choices)
        return self.kind != "choice" or (numbers and list(self.choices) == sorted(self.choices))


def read_space(texts: Sequence[str]) -> tuple[Dimension, ...]:
    """The dimensions of "key=range" texts. Raises UserError for unknown keys and for ranges that are none."""
    space = tuple(_dimension(text) for text in texts)
    keys = [one.key for one in space]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep names {key} twice: give all of its values at once")
    return space


def _dimension(text: str) -> Dimension:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--sweep {text!r}: write KEY=VALUES, such as 'optimizer.learning_rate=log(1e-3,1e-1)'")
    if key == "seed":
        raise UserError("--sweep seed: give --seeds N, with which every point runs so often")
    config.set_key(config.base(), key, config.flatten(config.base().to_dict()).get(key))  # the key exists
    match = re.fullmatch(r"([a-z]+)\((.*),(.*)\)", values.replace(" ", ""))
    if match is None:
        choices = literal(f"({values},)")
        if isinstance(choices, str):  # words without quotes
            choices = tuple(literal(part.strip()) for part in values.split(","))
        if len(set(map(str, choices))) < max(len(choices), 2):
            raise UserError(f"--sweep {text!r}: give two or more different values, or a range such as log(1e-3,1e-1)")
        return Dimension(key, "choice", choices=tuple(choices))
    kind, low, high = match[1], literal(match[2]), literal(match[3])
    if kind not in KINDS:
        raise UserError(f"--sweep {text!r}: {kind} is not known; ranges are {', '.join(KINDS)}")
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (low, high))
    if not numbers or not low < high or (kind == "log" and low <= 0):
        raise UserError(f"--sweep {text!r}: write {kind}(LOW,HIGH) with {'0 < ' if kind == 'log' else ''}LOW < HIGH")
    return Dimension(key, kind, float(low), float(high))


def as_json(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    return [asdict(one) for one in space]


def from_json(tree: Sequence[dict[str, Any]]) -> tuple[Dimension, ...]:
    return tuple(Dimension(**{**one, "choices": tuple(one["choices"])}) for one in tree)
