"""Log-probabilities as clients read them, and which tokens belong to the text that was sent so far."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmjax.data.tokenizer import Tokenizer

LOWEST = -9999.0  # in place of minus infinity, which JSON lacks

Likeliest = Sequence[tuple[int, float]]  # ids and nats, the likeliest first


@dataclass(frozen=True)
class Names:
    """The texts and the bytes of ids, as clients see them."""

    tokenizer: Tokenizer

    @cached_property
    def _controls(self) -> dict[int, str]:
        return {i: text for text, i in self.tokenizer.control_ids.items()}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""
        pieces = self.tokenizer.piece_bytes
        return pieces[token] if token < len(pieces) else b""

    def name(self, token: int) -> str:
        """A token's text. One that is no whole text is written as its bytes, so that different ids differ."""
        piece = self.bytes_of(token)
        if not piece:
            return self._controls.get(token, f"<{token}>")
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


@dataclass
class Placed:
    """The tokens of a text with the numbers of characters before them, and how many of them were told."""

    names: Names
    start: int = 0  # of the first token, in characters
    before: list[int] = field(default_factory=list)
    tokens: list[tuple[int, float, Likeliest]] = field(default_factory=list)
    told: int = 0
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False)
    _at: int = 0

    def add(self, tokens: Sequence[int], nats: Sequence[float], likeliest: Sequence[Likeliest]) -> None:
        """Append tokens with their log-probabilities."""
        for i, token in enumerate(tokens):
            self.before.append(self.start + self._at)
            self.tokens.append((token, nats[i], likeliest[i] if i < len(likeliest) else ()))
            self._at += len(self._decoder.decode(self.names.bytes_of(token)))

    def take(self, characters: int, *, all_of_them: bool = False) -> range:
        """The places of the tokens that begin within so many characters of the text, and were not taken before."""
        first = self.told
        while self.told < len(self.tokens) and (all_of_them or self.before[self.told] < self.start + characters):
            self.told += 1
        return range(first, self.told)


def _finite(nats: float) -> float:
    return max(nats, LOWEST)


def chat_form(placed: Placed, places: range, top: int) -> list[dict[str, Any]]:
    """The log-probabilities of tokens in the form of chat completions."""

    def one(token: int, nats: float) -> dict[str, Any]:
        names = placed.names
        return {"token": names.name(token), "logprob": _finite(nats), "bytes": list(names.bytes_of(token))}

    found = []
    for place in places:
        token, nats, likeliest = placed.tokens[place]
        found.append({**one(token, nats), "top_logprobs": [one(*other) for other in likeliest[:top]]})
    return found


def completion_form(placed: Placed, places: range, top: int) -> dict[str, list[Any]]:
    """The log-probabilities of tokens in the form of completions. The first token of a text has none (NaN)."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for place in places:
        token, nats, likeliest = placed.tokens[place]
        name, known = placed.names.name(token), nats == nats
        others: dict[str, float] = {}
        for other, value in [*likeliest[:top], (token, nats)]:
            others.setdefault(placed.names.name(other), _finite(value))
        found["tokens"].append(name)
        found["token_logprobs"].append(_finite(nats) if known else None)
        found["top_logprobs"].append(others if known else None)
        found["text_offset"].append(placed.before[place])
    return found
