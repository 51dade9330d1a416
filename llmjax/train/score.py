"""How well text was predicted: nats over tokens and bytes, and the numbers made of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Nats over a number of tokens that stand for a number of UTF-8 bytes; all three weighted, if tokens have weights."""

    nats: float
    tokens: float
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else 0.0

    @property
    def perplexity(self) -> float:
        """exp of the loss; depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes if self.bytes else 0.0


def total_score(scores: Iterable[Score]) -> Score:
    """The score of several texts together."""
    scores = list(scores)
    return Score(
        nats=sum(s.nats for s in scores), tokens=sum(s.tokens for s in scores), bytes=sum(s.bytes for s in scores)
    )
