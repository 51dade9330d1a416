"""The texts of an answer while they grow: what is new to tell of each after an event."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmjax.infer.request import Completion, Event
from llmjax.serve.log_probs import Names, Placed
from llmjax.serve.tools import Call, Parser, news


@dataclass
class Delta:
    """What an event adds to a text."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)  # as streams tell them
    places: range = range(0)  # of the tokens whose log-probabilities are to be told

    def __bool__(self) -> bool:
        return bool(self.content or self.calls or self.places)


@dataclass
class Written:
    """One text of an answer. Streams and whole answers are made of it, so that they say the same."""

    names: Names
    parser: Parser | None = None  # where the answer may have calls
    every_token: bool = False  # tell all tokens, also those that add nothing to the text (completions)
    start: int = 0  # characters before the text, of a prompt that is repeated
    text: str = ""
    completion: Completion | None = None
    placed: Placed = field(init=False)
    _told: int = 0  # characters of the content

    def __post_init__(self) -> None:
        self.placed = Placed(self.names, self.start)

    def take(self, event: Event) -> Delta:
        """Take the news of the text, and return what is new to tell."""
        self.placed.add(event.tokens, event.log_p, event.likeliest)
        self.text += event.piece
        self.completion = event.completion or self.completion
        places = self.placed.take(len(self.text), all_of_them=bool(event.finish) and self.every_token)
        if self.parser is None:
            return Delta(event.piece, [], places)
        self.parser.feed(event.piece, last=bool(event.finish))
        content, self._told = self.parser.content[self._told :], len(self.parser.content)
        return Delta(content, news(self.parser.calls), places)

    @property
    def content(self) -> str:
        """The text without calls."""
        return self.text if self.parser is None else self.parser.content

    @property
    def calls(self) -> Sequence[Call]:
        """The calls; the last one may be cut."""
        return self.parser.calls if self.parser is not None else ()

    @property
    def finish_reason(self) -> str:
        """Why the text ended, as clients read it. A call that was cut is no call."""
        finish = self.completion.finish if self.completion else "length"
        if finish in ("length", "cancelled"):
            return "length"
        return "tool_calls" if self.calls and all(call.whole for call in self.calls) else "stop"


def usage(prompts: Sequence[int], written: Sequence[Written]) -> dict[str, Any]:
    """The tokens of an answer. Tokens that ended a text count, and their text is not in the answer.

    Args:
        prompts: tokens of each prompt, counted once for all of its samples.
    """
    done = [one.completion for one in written if one.completion is not None]
    asked, made = sum(prompts), sum(len(one.tokens) for one in done)
    cached = min(max((one.cached for one in done), default=0), asked)
    return {
        "prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
