"""Who may wait: places for texts on the engine and in its queue. What finds no place is answered with 429 at once."""

from collections import Counter
from dataclasses import dataclass, field

from llmjax.serve.refusals import Refusal


@dataclass
class Admission:
    """Counts texts that are written or wait. Only the event loop calls it.

    Args:
        places: texts that may be written and wait, together.
        tokens: of the prompts of all these texts.
        per_key: texts of one API key; 0: no limit.
    """

    places: int
    tokens: int
    per_key: int = 0
    taken: int = 0
    prompts: int = 0  # tokens
    refused: int = 0
    by_key: Counter[str] = field(default_factory=Counter)

    def enter(self, count: int, key: str) -> "Place":
        """A place for so many texts, before their prompts are tokenized. Raises Refusal if there is none."""
        if count > self.places:
            raise Refusal(
                400, f"the request asks for {count} texts, and {self.places} may be written and wait at a time"
            )
        if self.taken + count > self.places:
            raise self._full(f"{self.taken} texts are being written or wait, and {self.places} may")
        if self.per_key and self.by_key[key] + count > self.per_key:
            raise self._full(f"this key has {self.by_key[key]} texts at a time, and {self.per_key} may be")
        self.taken += count
        self.by_key[key] += count
        return Place(self, count, key)

    def _full(self, message: str) -> Refusal:
        self.refused += 1
        return Refusal(429, f"the server is busy: {message}; try again", code="queue_full", again=True)


@dataclass
class Place:
    """Places that were taken, to be left once."""

    admission: Admission
    count: int
    key: str
    tokens: int = 0

    def hold(self, tokens: int) -> None:
        """Count the tokens of the prompts, in place of those before. Raises Refusal if those that wait have too many already."""
        admission = self.admission
        others = admission.prompts - self.tokens
        if others and others + tokens > admission.tokens:
            raise admission._full(f"prompts of {others} tokens are read or wait")
        admission.prompts = others + tokens
        self.tokens = tokens

    def leave(self) -> None:
        """Give the places back."""
        self.admission.taken -= self.count
        self.admission.prompts -= self.tokens
        self.admission.by_key[self.key] -= self.count
        if self.admission.by_key[self.key] <= 0:
            del self.admission.by_key[self.key]
        self.count = self.tokens = 0
