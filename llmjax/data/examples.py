"""Conversations as ids with weights: which tokens a model is taught to write.

The weights are exact by construction. A turn of the assistant begins where the prompt before it ends, as the chat
template writes that prompt for generation, and ends behind its stop token. No mark is searched for in a text, so what a
user writes moves no mask. The ids of a turn are those that follow the ids of its prompt when the model is used.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llmjax.data.chat import Message, chat_text
from llmjax.data.conversations import Row, RowError, Text
from llmjax.data.templates import one_moment
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.written import GENERATED, TEMPLATE, Written, flags_of
from llmjax.errors import UserError

ASSISTANT = ("assistant", "model")
LONGEST_SHARED = 16  # the most characters that a token can share with another one, as "<" of "<think>" and "<b>"


class Example(NamedTuple):
    """A text of n tokens: ids (n,) int32, and weights (n,) float32, 1 for each token that is to be learnt."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def prompt_tokens(self) -> int:
        """The tokens before the first that is to be learnt."""
        return int(np.argmax(self.weights > 0)) if self.weights.any() else len(self.ids)


@one_moment()
def examples_of(tokenizer: Tokenizer, row: Row, *, turns: str = "all") -> list[Example]:
    """What a row teaches: a conversation's turns, or the first answer to its prompt.

    Args:
        turns: "all" turns of the assistant that are not part of the prompt, or the "last" one.

    Where a template writes a turn in another way once the conversation has gone on (some drop earlier thoughts), that
    turn becomes an example of its own, which ends there: the model learns it as it will be read.

    Raises:
        RowError: for a row that teaches nothing, whose turns end with no stop token, or which the template does not write
            turn by turn.
        UserError: when there is no chat template, or it refuses the messages.
    """
    answer = row.answers[0] if row.answers else []
    if isinstance(row.prompt, str) and isinstance(answer, str):
        return [plain_example(tokenizer, row.prompt, answer)]
    prompt, answer = as_messages(row.prompt, "user"), as_messages(answer, "assistant")
    messages = [*prompt, *answer]
    learnt = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] in ASSISTANT]
    if not learnt:
        raise RowError("there is no turn of the assistant to learn")
    if turns == "last":
        learnt = learnt[-1:]
    given = {"tools": row.tools, **row.variables}
    whole = _text(tokenizer, messages[: learnt[-1] + 1], **given)
    inside: list[tuple[int, int]] = []
    found: list[Example] = []
    for i in learnt:
        through = whole if i == learnt[-1] else _text(tokenizer, messages[: i + 1], **given)
        span = _turn_start(tokenizer, messages[:i], through, **given), len(through)
        _require_written(tokenizer, messages[i], i + 1, through[span[0] :])
        if whole.startswith(through):
            inside.append(span)
        else:
            found.append(_example(tokenizer, through, [span]))
    return [*found, _example(tokenizer, whole, inside)]


def answer_example(
    tokenizer: Tokenizer, prompt: Text, answer: Text, /, *, tools: Any = None, **variables: Any
) -> Example:
    """A prompt with one answer to it, whose turns of the assistant are learnt. Errors as of `examples_of`."""
    row = Row(prompt, (answer,), tools=tools, variables=variables)
    return examples_of(tokenizer, row)[-1]


def prompt_ids(tokenizer: Tokenizer, row: Row) -> list[int]:
    """The ids that a model gets before it answers."""
    if isinstance(row.prompt, str):
        return [*tokenizer.prefix_ids, *tokenizer.encode(row.prompt)]
    return tokenizer.encode(
        chat_text(tokenizer, row.prompt, reply=True, tools=row.tools, **row.variables), specials="parse"
    )


def plain_example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    """A text without a chat template: the prompt, the answer, which is learnt, and the end of the text, learnt too."""
    start = list(tokenizer.prefix_ids)
    asked, both = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    said = both[len(asked) :] if both[: len(asked)] == asked else continuation(tokenizer, answer)
    ids = [*start, *asked, *said, tokenizer.end_id]
    weights = np.zeros(len(ids), np.float32)
    weights[len(start) + len(asked) :] = 1
    return Example(np.array(ids, np.int32), weights)


def whole_ids(tokenizer: Tokenizer, text: str, second: str = "") -> tuple[list[int], list[int]]:
    """The ids of a text that is judged as a whole, or of two, and of each id the number of its text, 0 or 1.

    What the tokenizer puts before a text comes first, and behind each text stands what ends it: [CLS] a [SEP] b [SEP].
    """
    end = list(tokenizer.suffix_ids) or [tokenizer.end_id]
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(text), *end]
    more = [*tokenizer.encode(second), *end] if second else []
    return [*ids, *more], [0] * len(ids) + [1] * len(more)


def as_messages(text: Text, role: str) -> list[Message]:
    """Messages; a plain text is one of that role."""
    if isinstance(text, str):
        return [{"role": role, "content": text}] if text else []
    return list(text)


def shared_prefix(a: str, b: str) -> int:
    """The number of characters with which both begin."""
    if b.startswith(a):
        return len(a)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that follows another one: without what some tokenizers put before the first word."""
    mark = next(iter(tokenizer.control_ids), None)
    if mark is None:
        return tokenizer.encode(text, specials="parse")
    after = Written(mark, bytes([1]) * len(mark)) + text  # a control token in front: what follows begins no text
    return tokenizer.encode(after, specials="parse")[1:]


@one_moment()
def ids_behind(
    tokenizer: Tokenizer, said: Sequence[Message], more: Sequence[Message], *, stop: int, **given: Any
) -> list[int]:
    """The ids behind the stop token of a turn that the model has written: further messages, and its next turn's beginning.

    Args:
        said: the conversation, whose last message is that turn.
        more: the messages that follow it.
        stop: the id at which the turn ended.

    Raises UserError for a chat template that writes the turn in another way once the conversation goes on.
    """
    through, after = _text(tokenizer, said, **given), chat_text(tokenizer, [*said, *more], reply=True, **given)
    if not after.startswith(through):
        raise UserError(
            "the chat template writes a turn of the model in another way when more follows, so the ids that were sampled "
            "would not be those of the conversation: give one that keeps turns, with --config.data.chat_template=FILE"
        )
    before = chat_text(tokenizer, said[:-1], reply=True, **given)
    turn = _ids_between(tokenizer, through, shared_prefix(before, through), len(through))
    stops = [i for i, token in enumerate(turn) if token in tokenizer.eos_ids]
    behind = turn[stops[-1] + 1 :] if stops else []
    behind += continuation(tokenizer, after[len(through) :])
    # Where a turn has no stop token of its own, the next role's mark is what the model has stopped with.
    return behind[1:] if not stops and behind[:1] == [stop] else behind


def _text(tokenizer: Tokenizer, messages: Sequence[Message], /, **given: Any) -> Written:
    return chat_text(tokenizer, messages, reply=False, **given)


def _turn_start(tokenizer: Tokenizer, asked: Sequence[Message], through: Written, /, **given: Any) -> int:
    """Where in a chat's text its last turn begins: behind its prompt.

    Some templates begin a reply with more than they write of it later, such as <think>. The turn then begins at the last
    token that both share.
    """
    before = chat_text(tokenizer, asked, reply=True, **given)
    start = shared_prefix(before, through)
    if start == len(before):
        return start
    # What a message says is not what the template wrote there, though it may begin with the same characters.
    origins = zip(flags_of(before[:start]), flags_of(through[:start]), strict=True)
    start = next((i for i, (one, other) in enumerate(origins) if (one ^ other) & TEMPLATE), start)
    if asked and start < shared_prefix(_text(tokenizer, asked, **given), before):
        raise RowError(
            f"the chat template writes the first {len(asked)} messages in another way once an answer follows, so that its "
            "mask is not known: give one that keeps them, with --config.data.chat_template=FILE"
        )
    at = 0
    for segment in tokenizer.segments(through):
        if segment.control and at < start < at + len(segment.text):
            return at
        at += len(segment.text)
    ids = tokenizer.encode(through, specials="parse")
    for place in range(start, max(start - LONGEST_SHARED, 0), -1):
        made = tokenizer.encode(through[:place], specials="parse")
        if ids[: len(made)] == made:
            return place
    return start


def _require_written(tokenizer: Tokenizer, message: Message, number: int, turn: str) -> None:
    """RowError for a turn that the template leaves out, or whose calls it leaves out: a model would learn to say nothing."""
    names = [(call.get("function") or call).get("name") for call in message.get("tool_calls") or ()]
    if any(isinstance(name, str) and name not in turn for name in names):
        raise RowError(
            f"the chat template does not write the calls of message {number}: give one that knows tools, with "
            "--config.data.chat_template=FILE"
        )
    content = message.get("content")
    says = bool(content.strip()) if isinstance(content, str) else bool(content)
    if says and not any(segment.text.strip() for segment in tokenizer.segments(turn) if not segment.control):
        raise RowError(f"the chat template writes nothing of message {number}, of the {message['role']}")


def _example(tokenizer: Tokenizer, text: Written, turns: Sequence[tuple[int, int]]) -> Example:
    """The ids of a chat's text, and weights for the turns, from one character to another, that are learnt."""
    stops, flags = set(tokenizer.eos_ids), flags_of(text)
    spans = [(start, end, True) for start, end in turns]
    if any(flag & GENERATED for flag in flags):
        spans = [run for start, end in turns for run in _generated(tokenizer, text, flags, start, end)]
        if not spans:
            raise RowError("the chat template marks nothing of the turns to be learnt with {% generation %}")
    ids: list[int] = []
    weights: list[float] = []
    open_turn = False  # the turn before had no stop token of its own: some templates close it with the next role's
    for start, end, learnt, closes in _pieces(spans, len(text)):
        made = _ids_between(tokenizer, text, start, end)
        count = 0
        if learnt and not closes:
            count = len(made)
        elif learnt:
            stopped = [i for i, token in enumerate(made) if token in stops]
            open_turn = not stopped
            count = stopped[-1] + 1 if stopped else len(made)
        elif open_turn:
            if made[0] not in stops:
                raise RowError("the chat template ends a turn of the assistant with no stop token of the tokenizer")
            count, open_turn = 1, False
        ids += made
        weights += [1.0] * count + [0.0] * (len(made) - count)
    if open_turn:
        ids.append(tokenizer.end_id)
        weights.append(1.0)
    return Example(np.array(ids, np.int32), np.array(weights, np.float32))


def _generated(tokenizer: Tokenizer, text: Written, flags: bytes, start: int, end: int) -> list[tuple[int, int, bool]]:
    """What {% generation %} marks in a turn, as `spans` of `_pieces`; a stop token right behind it belongs to it."""
    runs: list[tuple[int, int, bool]] = []
    for generated, group in itertools.groupby(range(start, end), key=lambda i: bool(flags[i] & GENERATED)):
        if generated:
            places = list(group)
            runs.append((places[0], places[-1] + 1, False))
    if not runs:
        return []
    first, last, _ = runs[-1]
    behind = last
    for segment in tokenizer.segments(text[last:end]):
        behind += len(segment.text)
        if segment.control and tokenizer.control_ids[segment.text] in tokenizer.eos_ids:
            last = behind
        if segment.control or segment.text.strip():
            break
    return [*runs[:-1], (first, last, True)]


def _pieces(spans: Sequence[tuple[int, int, bool]], length: int) -> list[tuple[int, int, bool, bool]]:
    """(start, end, learnt, closes) of consecutive parts that cover a text; `closes`: a turn ends there."""
    found: list[tuple[int, int, bool, bool]] = []
    at = 0
    for start, end, closes in spans:
        if start > at:
            found.append((at, start, False, False))
        found.append((start, end, True, closes))
        at = end
    if at < length:
        found.append((at, length, False, False))
    return found


def _ids_between(tokenizer: Tokenizer, text: Written, start: int, end: int) -> list[int]:
    """The ids that a part of a text adds to the ids of what stands before it."""
    if not start:
        return tokenizer.encode(text[:end], specials="parse")
    before, through = (tokenizer.encode(text[:place], specials="parse") for place in (start, end))
    if through[: len(before)] == before:
        return through[len(before) :]
    return continuation(tokenizer, text[start:end])  # a token would lie across the border
