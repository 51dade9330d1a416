"""What an engine is asked for, and what it answers.

`Request.parse` is the one place that validates: the calls of the API, rows of files, chats and settings all come through
it. What depends on the engine (its length, its vocabulary) is checked by `Engine.submit`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import storage
from llmjax.config.ranges import SHARE, SHARE_ABOVE_0, Range
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.sample import OFF

STOP_IDS = 8  # ids at which a row may end, those of the tokenizer included
STOPS, STOP_LENGTH = 64, 1000  # stop strings, and characters of each
FORM_LENGTH = 1 << 18  # characters of a schema, a regular expression or a grammar
FORMS = ("json_schema", "regex", "grammar")
PLAIN: dict[str, Any] = {**OFF, **dict.fromkeys(FORMS, "")}  # the model's own distribution, whatever a config asks for
LARGE = 1e9  # far beyond every logit, and far below what float32 adds without overflow
ANY, COUNT = Range(-LARGE, LARGE), Range(0, 2**31 - 1)
# Field -> its type, its range, and what ends of the range mean.
NUMBERS: dict[str, tuple[type, Range, str]] = {
    "max_new_tokens": (int, Range(1, 2**31 - 1), ""),
    "temperature": (float, Range(0, LARGE), " (0: greedy)"),
    "top_k": (int, COUNT, " (0: all tokens)"),
    "top_p": (float, SHARE_ABOVE_0, " (1: all tokens)"),
    "min_p": (float, SHARE, " (0: all tokens)"),
    "typical_p": (float, SHARE_ABOVE_0, " (1: all tokens)"),
    "repetition_penalty": (float, Range(1 / LARGE, LARGE), " (1: none)"),
    "frequency_penalty": (float, ANY, " (0: none)"),
    "presence_penalty": (float, ANY, " (0: none)"),
    "seed": (int, Range(0, 2**32 - 1), ""),
    "number": (int, COUNT, ""),
}


@dataclass(frozen=True)
class Request:
    """One text to write. Its fields are valid, whoever made it: UserError names the field that is not."""

    ids: tuple[int, ...]  # the prompt; at least one
    max_new_tokens: int = 128
    temperature: float = OFF["temperature"]
    top_k: int = 0
    top_p: float = OFF["top_p"]
    min_p: float = OFF["min_p"]
    typical_p: float = OFF["typical_p"]
    repetition_penalty: float = OFF["repetition_penalty"]
    frequency_penalty: float = OFF["frequency_penalty"]
    presence_penalty: float = OFF["presence_penalty"]
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids; -inf: never
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: tuple[int, ...] = ()  # and with any of these ids, as with the tokenizer's own
    seed: int = 0
    number: int = 0  # of several samples under one seed
    json_schema: str = ""  # the text is JSON that this schema describes; at most one of these three
    regex: str = ""  # the whole text matches this expression
    grammar: str = ""  # the text is a sentence of this grammar, in Lark's notation
    source: tuple[int, ...] = ()  # what the encoder of an encoder-decoder reads

    def __post_init__(self) -> None:
        for name in NUMBERS:
            self._set(name, check_number(name, getattr(self, name)))
        for name in ("ids", "stop_ids", "source"):
            self._set(name, _ids(name, getattr(self, name)))
        if not self.ids:
            raise UserError("ids must have at least one id")
        self._set("stop", _stops(self.stop))
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("json_schema", _schema(self.json_schema))
        for name in FORMS:
            _check_form(name, getattr(self, name))
        if len(given := [name for name in FORMS if getattr(self, name)]) > 1:
            raise UserError(f"{' and '.join(given)} are given: a text can have one form only")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Request":
        """The request that these fields make, such as a row of a file says them.

        Single stop strings and ids may stand without a list, keys of `logit_bias` may be digits, as JSON has them, and
        `json_schema` may be the schema itself or its text. Raises UserError that names the field.
        """
        if unknown := sorted(str(name) for name in given if name not in FIELDS):
            raise UserError(f"no setting is called {unknown[0]!r}; there are {', '.join(sorted(FIELDS - {'ids'}))}")
        if "ids" not in given:
            raise UserError("ids are missing: the prompt as a list of ids")
        return cls(**given)

    @property
    def form(self) -> tuple[str, str] | None:
        """Which of `FORMS` the text must have, and which one."""
        return next(((name, value) for name in FORMS if (value := getattr(self, name))), None)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str  # the continuation, without the stop string; bytes that are no UTF-8 are U+FFFD
    finish: str  # "stop" (a stop string, an id of stop_ids, the end of a form), "eos" (the model ended it), "length", "cancelled" or "error"
    tokens: tuple[int, ...]  # what was sampled, a final <eos> and the tokens of the stop string included
    log_probabilities: tuple[float, ...]  # nats of each token in the model's own distribution (temperature 1)
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # for each token the likeliest ids and their nats
    # Nats of each token in what it was sampled from: after penalties, bias, form, temperature and truncation.
    sampled_log_probabilities: tuple[float, ...] = ()
    error: str = ""  # why it could not go on


@dataclass(frozen=True)
class Event:
    """What one step of an engine did for one request."""

    number: int
    piece: str = ""  # characters of the text that have become certain
    tokens: tuple[int, ...] = ()
    log_p: tuple[float, ...] = ()  # as `Completion.log_probabilities`, of these tokens
    sampled_log_p: tuple[float, ...] = ()  # as `Completion.sampled_log_probabilities`
    finish: str = ""  # as `Completion.finish`, with the last event of a request
    error: str = ""
    completion: Completion | None = None  # all of it, with the last event


FIELDS = frozenset(f.name for f in dataclasses.fields(Request))
SETTINGS = FIELDS - {"ids", "source", "number"}  # what may be set for all prompts, or by a row of a file


def check_number(name: str, value: Any) -> Any:
    """The number as its field's type. UserError for another type and for what is out of the field's range."""
    kind, allowed, says = NUMBERS[name]
    if not is_number(value, kind):
        raise UserError(f"{name}={_short(value)} must be a {'whole ' * (kind is int)}number, {allowed}{says}")
    if abs(value) > 2**64 or kind(value) not in allowed:  # a number may be too large for its type
        raise UserError(f"{name}={_short(value)} must be {allowed}{says}")
    return kind(value)


def is_number(value: Any, kind: type = float) -> bool:
    """Whether it is a whole number (kind int), or any real one (float); a truth value is none."""
    types = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, types) and not isinstance(value, bool)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if name == "stop_ids" and is_number(value, int):
        value = (value,)
    if isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.integer):
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        raise UserError(f"{name}={_short(value)} must be a list of ids")
    for i in value:
        if type(i) is not int and not is_number(i, int):
            raise UserError(f"{name} has {_short(i)}, which is no id: ids are whole numbers")
        if not 0 <= i < 2**31:
            raise UserError(f"{name} has {_short(i)}, which is no id: ids are from 0 on")
    return tuple(map(int, value))


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"stop={_short(value)} must be a text, or a list of texts (empty: none)")
    if "" in stops:
        raise UserError("a stop string is empty, so every text would end at once: remove it from stop")
    if len(stops) > STOPS or any(len(stop) > STOP_LENGTH for stop in stops):
        raise UserError(f"stop may have {STOPS} texts of {STOP_LENGTH} characters each at most")
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise UserError(f"logit_bias={_short(value)} must be a mapping from ids to numbers, such as {{50: -2.5}}")
    found: dict[int, float] = {}
    for key, bias in value.items():
        digits = isinstance(key, str) and key.isdecimal() and len(key) < 11
        if not digits and not is_number(key, int):
            raise UserError(f"logit_bias has the key {_short(key)}, which is no id")
        if not is_number(bias):
            raise UserError(f"logit_bias {{{key}: {_short(bias)}}} must be a number")
        if not (-LARGE <= bias <= LARGE or bias == -math.inf):
            raise UserError(f"logit_bias {{{key}: {_short(bias)}}} must be from -1e9 to 1e9, or -inf (never)")
        found[int(key)] = float(bias)
    return found


def _schema(value: Any) -> Any:
    """The text of a schema that is given as a value or as its text."""
    try:
        if isinstance(value, str):
            json.loads(value or "true")
            return value
        if isinstance(value, Mapping):
            return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"json_schema is no JSON schema: {error}") from error
    raise UserError(f"json_schema={_short(value)} must be a JSON schema, as an object or as text")


def _check_form(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name}={_short(value)} must be a text")
    if len(value) > FORM_LENGTH:
        raise UserError(f"{name} has {len(value):,} characters: {FORM_LENGTH:,} at most")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{name} has a lone surrogate, which is half a character")


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The ids of each prompt, at least one: a text's as the beginning of a document, ids as they are.

    Raises UserError with its number for a prompt that is neither.
    """
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and (
            not isinstance(prompt, (list, tuple, range, np.ndarray)) or not len(prompt)
        ):
            raise UserError(f"prompt {row} must be a text, or a list of at least one id, not {_short(prompt)}")
    texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    rows = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            rows.append([*tokenizer.prefix_ids, *next(texts)] or [tokenizer.start_id])
        else:
            rows.append(list(_ids(f"prompt {row}", prompt)))
    return rows


def read_form(name: str, given: str) -> str:
    """A form as users write it: an expression itself, a schema or a grammar as the path of its file.

    Raises UserError for a file that cannot be read, and for a form as `Request` does.
    """
    if name != "regex":
        try:
            given = storage.read_text(Path(given))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the {name} in {given} cannot be read: {error}") from error
    return str(getattr(Request.parse({"ids": (0,), name: given}), name))


def sampling_row(request: Request) -> dict[str, float]:
    """The request's part of `sample.Sampling`."""
    return {key: getattr(request, key) for key in OFF}
