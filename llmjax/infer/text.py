"""The text of one answer while it grows: bytes become characters, and stop strings end it."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Text:
    """`add` appends a token, `take` returns the new characters that are certain."""

    piece_bytes: Sequence[bytes]
    eos_ids: Sequence[int]
    stops: Sequence[str]
    stop_ids: Sequence[int] = ()
    text: str = ""
    finish: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)  # log-probabilities in the distribution sampled from
    shown: int = 0  # characters that `take` has returned
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: int, log_probability: float, sampled: float = 0.0) -> None:
        """Append a token. Without effect after the end of the text."""
        if self.finish:
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.sampled.append(sampled)
        if token in self.eos_ids or token in self.stop_ids:
            self.end("eos" if token in self.eos_ids else "stop")
            return
        before = len(self.text)
        # Rows that only pad the embedding have no bytes.
        self.text += self.decoder.decode(self.piece_bytes[token] if token < len(self.piece_bytes) else b"")
        starts = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self.stops]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.end("stop")

    def end(self, finish: str) -> None:
        """End the text, unless it has ended. A character with missing bytes is left out."""
        self.finish = self.finish or finish

    def take(self) -> str:
        """The characters that are certain and were not returned before."""
        held = 0 if self.finish else held_back(self.text, self.stops)
        piece = self.text[self.shown : len(self.text) - held]
        self.shown += len(piece)
        return piece


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` are the longest possible beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
