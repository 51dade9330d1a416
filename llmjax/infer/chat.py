"""A conversation in the terminal. Answers appear while they are written. The history is cut to what the model can read."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.data.chat import chat_ids
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.request import CONSTRAINTS, NUMBERS, check_number, read_constraint

SHORT = 1024  # tokens of the first engine: clearing the cache of 8,192 takes seconds
GROWTH = 4  # factor between engines, large because each of them has other programs
HELP = """\
/help                 show this help
/reset                forget the conversation, but not the system prompt
/system TEXT          set the system prompt (without TEXT: remove it) and forget the conversation
/save FILE            write the conversation to FILE as JSON
/load FILE            go on with a saved conversation
/temperature VALUE    set it (without VALUE: show it); also /top_k, /top_p, /min_p, /typical_p, /max_new_tokens, /seed,
                      /repetition_penalty, /frequency_penalty, /presence_penalty
/regex EXPRESSION     answers match EXPRESSION; without it they are free again
/json_schema FILE     answers are JSON of the schema in FILE
/grammar FILE         answers are sentences of the grammar in FILE, in Lark's notation
/quit                 end the conversation, like the end of the input"""


@dataclass
class Chat:
    """A conversation with a chat model through an engine."""

    engine: Engine
    settings: dict[str, Any]  # of `Request`
    show: Callable[[str], None]
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    longer: Callable[[int], Engine] | None = None  # makes an engine for a conversation of so many tokens
    longest: int = 0  # the most tokens of such an engine

    @property
    def limit(self) -> int:
        """The most tokens of a conversation."""
        return max(self.engine.limit, self.longest)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def prompt(self) -> list[int]:
        """The ids of the conversation, without the oldest turns if it is too long.

        Raises UserError if the last message alone is too long, or the tokenizer has no chat template.
        """
        first = [{"role": "system", "content": self.system}] if self.system else []
        room = self.limit - self.settings["max_new_tokens"]
        kept = list(self.messages)
        while True:
            ids = chat_ids(self.tokenizer, [*first, *kept])
            if len(ids) <= room:
                return ids
            if len(kept) == 1:
                raise UserError(
                    f"the message is too long: {len(ids)} tokens with the system prompt, where {room} fit beside "
                    f"max_new_tokens={self.settings['max_new_tokens']}"
                )
            kept = kept[2:]  # without the oldest message and its answer

    def say(self, text: str) -> str:
        """Answer a message and show the answer while it is written. A message that cannot be answered is forgotten."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.prompt()
            self._make_room(len(ids) + self.settings["max_new_tokens"])
            answer = self._answer(self.engine.submit({**self.settings, "ids": ids}))
        except UserError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _make_room(self, tokens: int) -> None:
        """Change to a larger engine if the conversation does not fit this one."""
        length = self.engine.limit
        while length < tokens:
            length *= GROWTH
        if length > self.engine.limit and self.longer is not None:
            self.engine = self.longer(min(length, self.longest))

    def _answer(self, number: int) -> str:
        while True:
            try:
                for event in self.engine.step():
                    if event.number != number:
                        continue
                    self.show(event.piece)
                    if event.error:
                        raise UserError(event.error)
                    if event.completion is not None:
                        return event.completion.text
            except KeyboardInterrupt:  # the answer ends here
                self.engine.cancel(number)

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with "/": the text to show, or None to end. Raises UserError for a wrong command."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit"):
            return None
        if name == "help":
            return HELP
        if name in ("reset", "system"):
            self.messages.clear()
            if name == "system":
                self.system = rest
            return "a new conversation"
        if name in ("save", "load") and rest:
            return self._save(Path(rest)) if name == "save" else self._load(Path(rest))
        if name in NUMBERS and name != "number":
            return self._set(name, rest)
        if name in CONSTRAINTS:
            form = read_constraint(name, rest) if rest else ""
            self.settings |= {**dict.fromkeys(CONSTRAINTS, ""), name: form}
            return f"{name} = {form or 'off'}"
        raise UserError(f"there is no /{name}{' without a file' if name in ('save', 'load') else ''}; see /help")

    def _set(self, name: str, rest: str) -> str:
        if rest:
            try:
                value = check_number(name, NUMBERS[name][0](rest))
            except (ValueError, OverflowError) as error:
                raise (
                    error if isinstance(error, UserError) else UserError(f"{rest!r} is not a number for {name}")
                ) from error
            if name == "max_new_tokens" and value >= self.limit:
                raise UserError(f"max_new_tokens={value} must be from 1 to {self.limit - 1}")
            self.settings[name] = value
        return f"{name} = {self.settings.get(name, 'off')}"

    def _save(self, path: Path) -> str:
        storage.write_json(path, {"system": self.system, "messages": self.messages})
        return f"saved in {path}"

    def _load(self, path: Path) -> str:
        try:
            saved = json.loads(storage.read_text(path))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in saved["messages"]]
            self.system, self.messages = str(saved["system"]), messages
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a conversation: {error}") from error
        return f"{len(self.messages)} messages"


def talk(chat: Chat, lines: Iterable[str], *, sign: Callable[[], None] = lambda: None) -> None:
    """Answer lines until their end or /quit. Errors are shown and do not end the conversation.

    Args:
        sign: called before each line is read, to show that the user may type.
    """
    reading = iter(lines)
    while True:
        sign()
        line = next(reading, None)
        if line is None:
            return
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return
                chat.show(said)
            else:
                chat.say(line)
        except UserError as error:
            chat.show(f"({error})")
        chat.show("\n")
