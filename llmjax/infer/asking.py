"""Conversations in which one request depends on the answer to another: written as generators, run together on an engine.

    def conversation() -> Conversation[int]:
        text = yield Ask("a number", ([{"role": "user", "content": "Give a number."}],), regex="[0-9]+")
        return int(text)

`run` keeps several conversations in the slots of an engine. Each leaves a transcript of what was asked and written, with
which `replay` goes through it again without a model.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmjax import storage
from llmjax.data.chat import Message, chat_ids
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer import filters
from llmjax.infer.engine import Engine
from llmjax.infer.request import Request, prompt_ids

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ask:
    """A text to write. Of the prompts, which go from the fullest to the shortest, the first that fits is used."""

    purpose: str
    prompts: tuple[Sequence[Message], ...]
    max_new_tokens: int = 256
    json_schema: str = ""
    regex: str = ""
    grammar: str | tuple[str, ...] = ""  # one, or one for each prompt
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    adapter: str = ""  # of the engine, that writes it


Conversation = Generator[Ask, str, Result]


@dataclass
class Finished(Generic[Result]):
    """A conversation that has ended: its result, or its error; and its transcript."""

    key: Any
    result: Result | None = None
    error: str = ""
    transcript: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0  # read and written


@dataclass
class _Live(Generic[Result]):
    conversation: Conversation[Result]
    finished: Finished[Result]
    record: dict[str, Any] = field(default_factory=dict)


def run(
    engine: Engine,
    conversations: Iterable[tuple[Any, Callable[[], Conversation[Result]]]],
    *,
    on_text: Callable[[str, str], None] | None = None,
    rules: Sequence[filters.Rule] = (),
    log: Path | None = None,
) -> Iterator[Finished[Result]]:
    """Run conversations, each with its key, and yield each when it has ended.

    Args:
        on_text: told the purpose and each piece of text while it is written.
        rules, log: filters of what the model reads, but for system messages, and of what it writes. A text that is
            blocked ends its conversation with an error.
    """
    todo = iter(conversations)
    live: dict[int, _Live[Result]] = {}
    ended: list[Finished[Result]] = []
    left = True

    def go_on(one: _Live[Result], text: str | None) -> None:
        """Give a conversation its text (None: it begins), and submit what it asks next."""
        while True:
            try:
                asked = next(one.conversation) if text is None else one.conversation.send(text)
                kept, ids = fitting(engine.tokenizer, engine.limit, asked)
                settings = {name: value for name, value in kept.items() if name != "messages"}
                request = Request(ids=tuple(ids), **settings)
                for message in kept["messages"]:
                    if rules and message["role"] != "system":
                        _passed(filters.check(rules, str(message["content"]), "input", log=log))
                one.record = {"purpose": asked.purpose, "asked": kept}
                one.finished.tokens += len(ids)
                live[engine.submit(request)] = one
            except StopIteration as stop:
                one.finished.result = stop.value
                ended.append(one.finished)
            except UserError as error:
                one.finished.error = str(error)
                ended.append(one.finished)
            return

    while left or live or ended:
        while left and len(live) < engine.count:
            key, start = next(todo, (None, None))
            if start is None:
                left = False
            else:
                go_on(_Live(start(), Finished(key)), None)
        yield from ended
        ended.clear()
        for event in engine.step() if live else ():
            one = live[event.number]
            if on_text is not None and event.piece:
                on_text(one.record["purpose"], event.piece)
            if event.completion is None:
                continue
            del live[event.number]
            done = event.completion
            one.finished.tokens += len(done.tokens)
            try:
                if done.error:
                    raise UserError(done.error)
                text = _passed(filters.check(rules, done.text, "output", log=log))
            except UserError as error:
                one.finished.error = str(error)
                ended.append(one.finished)
                continue
            one.finished.transcript.append({**one.record, "text": text, "finish": done.finish})
            go_on(one, text)


def replay(conversation: Conversation[Result], transcript: Sequence[Mapping[str, Any]]) -> Result:
    """The result of a conversation whose texts are those of a transcript.

    Raises UserError if the conversation asks something else than the transcript has.
    """
    text: str | None = None
    for number, record in enumerate(transcript, start=1):
        try:
            asked = next(conversation) if text is None else conversation.send(text)
        except StopIteration as stop:
            raise UserError(f"the transcript goes on after the answer, with text {number}") from stop
        if record["asked"] not in [_kept(asked, i) for i in range(len(asked.prompts))]:
            raise UserError(f"text {number} ({asked.purpose}) was asked for in another way than the transcript has it")
        text = str(record["text"])
    try:
        _ = next(conversation) if text is None else conversation.send(text)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    raise UserError("the transcript ends before the answer")


def check_rows(transcript: Path, rows: int) -> None:
    """Raise UserError for a transcript without rows, of which nothing can be made again."""
    if not rows:
        raise UserError(f"{transcript} has no row of a transcript: give the file that a command kept with --transcript")


def run_of(transcript: Path) -> Path | None:
    """The run whose model wrote a transcript; None: it does not say, as those of servers and of earlier versions.

    Raises UserError for a transcript that is missing, has no row, is of several runs, or whose run is gone.
    """
    if not transcript.is_file():
        raise UserError(f"there is no transcript {transcript}")
    found, rows = set(), 0
    for line in storage.read_lines(transcript):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the replay says which row is none
            setting = json.loads(line)["setting"]
            rows += 1
            found.add(Path(setting["workdir"]))
    check_rows(transcript, rows)
    if len(found) > 1:
        raise UserError(
            f"{transcript} has answers of several runs, {', '.join(map(str, sorted(found)))}: give --workdir RUN"
        )
    for run in found:
        if not (run / "config.json").is_file():
            raise UserError(
                f"{transcript} is of the run {run}, which is gone: put it back, or give --workdir with another run"
            )
        return run
    return None


def scripted(conversation: Conversation[Result], write: Callable[[Ask], str]) -> tuple[Result, list[dict[str, Any]]]:
    """The result and the transcript of a conversation whose texts a function writes."""
    transcript: list[dict[str, Any]] = []
    text: str | None = None
    while True:
        try:
            asked = next(conversation) if text is None else conversation.send(text)
        except StopIteration as stop:
            return stop.value, transcript
        text = write(asked)
        transcript.append({"purpose": asked.purpose, "asked": _kept(asked, 0), "text": text, "finish": "script"})  # fmt: skip


def _passed(verdict: filters.Verdict) -> str:
    """The text that filters let through. Raises UserError for one that they block."""
    if verdict.blocked:
        raise UserError(f"the filter {verdict.blocked!r} blocks the text")
    return verdict.text


def ids_of(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of messages: by the chat template, or for a model without one as paragraphs of plain text."""
    if tokenizer.chat_template:
        return chat_ids(tokenizer, messages)
    return prompt_ids(tokenizer, ["\n\n".join(str(message["content"]) for message in messages) + "\n"])[0]


def fitting(tokenizer: Tokenizer, limit: int, asked: Ask) -> tuple[dict[str, Any], list[int]]:
    """What is asked with the first prompt that fits `limit` tokens with the text, and the prompt's ids.

    Raises UserError if none does.
    """
    for number, messages in enumerate(asked.prompts):
        ids = ids_of(tokenizer, messages)
        if len(ids) + asked.max_new_tokens <= limit:
            return _kept(asked, number), ids
    raise UserError(
        f"the shortest prompt ({asked.purpose}) has {len(ids)} tokens, which with {asked.max_new_tokens} to write is more "
        f"than the {limit} of the engine: set infer.length, or use a model with a longer context"
    )


def _kept(asked: Ask, number: int) -> dict[str, Any]:
    """What a transcript keeps of a request with one of its prompts: all that decides the text."""
    grammar = asked.grammar if isinstance(asked.grammar, str) else asked.grammar[number]
    left_out = {"purpose", "prompts"} | ({"adapter"} if not asked.adapter else set())  # older transcripts have none
    kept = {name: value for name, value in vars(asked).items() if name not in left_out}
    messages = [dict(message) for message in asked.prompts[number]]
    return {**kept, "grammar": grammar, "stop": list(asked.stop), "messages": messages}
