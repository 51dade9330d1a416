"""The text of one answer while it grows: bytes to characters, stop strings, and what may be shown already."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Text:
    """Tokens come in by `add`, characters that are certain go out by `take`."""

    piece_bytes: Sequence[bytes]
    eos_ids: Sequence[int]
    stops: Sequence[str]
    stop_ids: Sequence[int] = ()
    text: str = ""
    finish: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)  # log-probabilities in what was sampled from
    shown: int = 0  # characters that `take` has returned
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: int, log_probability: float, sampled: float = 0.0) -> None:
        """Append a token; without effect once the text has ended."""
        if self.finish:
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.sampled.append(sampled)
        if token in self.eos_ids or token in self.stop_ids:
            self.end("eos" if token in self.eos_ids else "stop")
            return
        before = len(self.text)
        # Rows that only pad the embedding stand for nothing.
        self.text += self.decoder.decode(self.piece_bytes[token] if token < len(self.piece_bytes) else b"")
        starts = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self.stops]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.end("stop")

    def end(self, finish: str) -> None:
        """End the text unless it has ended. A character of which bytes are missing is left out."""
        self.finish = self.finish or finish

    def take(self) -> str:
        """The characters that are certain and were not taken before."""
        held = 0 if self.finish else held_back(self.text, self.stops)
        piece = self.text[self.shown : len(self.text) - held]
        self.shown += len(piece)
        return piece


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
