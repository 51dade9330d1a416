"""Requests to an engine, and its answers.

`Request` is the one place that checks them: calls of the API, rows of files, chats and settings all become one. Only
`check_fits` knows the model and the engine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llmjax import config, storage
from llmjax.config.ranges import SHARE, SHARE_ABOVE_0, Range
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.sample import OFF

STOP_IDS = 8  # the most ids that end a text, with those of the tokenizer
STOPS, STOP_LENGTH = 64, 1000  # the most stop strings, and characters of each
CONSTRAINT_LENGTH = 1 << 18  # the most characters of a schema, a regular expression or a grammar
CONSTRAINTS = ("json_schema", "regex", "grammar")
# The model's own distribution, whatever a config asks for.
PLAIN: dict[str, Any] = {**OFF, **dict.fromkeys(CONSTRAINTS, ""), "beams": 1}
LARGE = 1e9  # far above every logit, and far below the overflow of float32
ANY, COUNT = Range(-LARGE, LARGE), Range(0, 2**31 - 1)
# Field -> its type, its range, and the meaning of an end of the range.
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
    """One text to write. The constructor checks every field. Its UserError names the field that is wrong."""

    ids: tuple[int, ...]  # the prompt, at least one id
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
    stop_ids: tuple[int, ...] = ()  # the text ends with any of these ids, as with those of the tokenizer
    seed: int = 0
    number: int = 0  # tells samples with the same seed apart
    json_schema: str = ""  # the text is JSON of this schema; only one of these three may be given
    regex: str = ""  # the whole text matches this expression
    grammar: str = ""  # the text is a sentence of this grammar, in Lark's notation
    source: tuple[int, ...] = ()  # the ids that the encoder of an encoder-decoder reads
    adapter: str = ""  # the name of the adapter to answer with; "": the model without one of them

    def __post_init__(self) -> None:
        for name in NUMBERS:
            self._set(name, check_number(name, getattr(self, name)))
        for name in ("ids", "stop_ids", "source"):
            self._set(name, _ids(name, getattr(self, name)))
        if not self.ids:
            raise UserError("ids must have at least one id")
        if not isinstance(self.adapter, str):
            raise UserError(f"adapter={_short(self.adapter)} must be the name of an adapter")
        self._set("stop", _stops(self.stop))
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("json_schema", _schema(self.json_schema))
        for name in CONSTRAINTS:
            _check_constraint(name, getattr(self, name))
        if len(given := [name for name in CONSTRAINTS if getattr(self, name)]) > 1:
            raise UserError(
                f"{' and '.join(given)} are given: leave one, because a text can follow only one constraint"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Request":
        """The request with these fields, for instance of a row of a file.

        A single stop string or id needs no list, keys of `logit_bias` may be text as in JSON, and `json_schema` may be
        the schema or its text. Raises UserError that names the wrong field.
        """
        if unknown := sorted(str(name) for name in given if name not in FIELDS):
            raise UserError(f"no setting is called {unknown[0]!r}; there are {', '.join(sorted(FIELDS - {'ids'}))}")
        if "ids" not in given:
            raise UserError("ids are missing: the prompt as a list of ids")
        return cls(**given)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """The kind of the constraint (one of `CONSTRAINTS`) and the constraint itself; None: the text is free."""
        return next(((name, value) for name in CONSTRAINTS if (value := getattr(self, name))), None)


@dataclass(frozen=True)
class Completion:
    """The text that a model wrote after a prompt."""

    prompt: str
    text: str  # the continuation without the stop string; bytes that are no UTF-8 become U+FFFD
    finish: str  # "stop" (a stop string, a stop id, the end of a constraint), "eos", "length", "cancelled" or "error"
    tokens: tuple[int, ...]  # all sampled tokens, with a final <eos> and those of the stop string
    log_probabilities: tuple[float, ...]  # nats of each token in the model's own distribution (temperature 1)
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # for each token the likeliest ids and their nats
    # Nats of each token in the distribution that it was sampled from: after bias, penalties, constraint, temperature and
    # truncation. 0 where the token was certain.
    sampled_log_probabilities: tuple[float, ...] = ()
    error: str = ""  # why the text could not go on
    cached: int = 0  # tokens of the prompt that were not computed, because another prompt began alike


@dataclass(frozen=True)
class Event:
    """The news of one request after a step of the engine."""

    number: int
    piece: str = ""  # characters of the text that are certain now
    tokens: tuple[int, ...] = ()
    log_p: tuple[float, ...] = ()  # as `Completion.log_probabilities`, of these tokens
    sampled_log_p: tuple[float, ...] = ()  # as `Completion.sampled_log_probabilities`
    finish: str = ""  # as `Completion.finish`, in the last event of a request
    error: str = ""
    completion: Completion | None = None  # the whole text, in the last event
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # as `Completion.likeliest`, of these tokens


FIELDS = frozenset(f.name for f in dataclasses.fields(Request))
SETTINGS = FIELDS - {"ids", "source", "number"}  # a user may set these for all prompts, or in a row of a file


def check_number(name: str, value: Any) -> Any:
    """The number in the type of its field. Raises UserError for another type, and for a number out of range."""
    kind, allowed, says = NUMBERS[name]
    if not is_number(value, kind):
        raise UserError(f"{name}={_short(value)} must be a {'whole ' * (kind is int)}number, {allowed}{says}")
    if abs(value) > 2**64 or kind(value) not in allowed:  # a number may be too large for its type
        raise UserError(f"{name}={_short(value)} must be {allowed}{says}")
    return kind(value)


def is_number(value: Any, kind: type = float) -> bool:
    """Whether a value is a whole number (kind int) or any real number (float). A truth value is neither."""
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
            raise UserError(f"{name} has {_short(i)}, which is no id: ids are 0 or more")
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
    """The text of a schema that is given as an object or as text."""
    try:
        if isinstance(value, str):
            json.loads(value or "true")
            return value
        if isinstance(value, Mapping) or value is True:  # true and {} are any JSON
            return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"json_schema is no JSON schema: {error}") from error
    raise UserError(f"json_schema={_short(value)} must be a JSON schema, as an object or as text")


def _check_constraint(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{name}={_short(value)} must be a text")
    if len(value) > CONSTRAINT_LENGTH:
        raise UserError(f"{name} has {len(value):,} characters: {CONSTRAINT_LENGTH:,} at most")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{name} has a lone surrogate, which is half a character")


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The ids of each prompt, at least one: of a text with the tokenizer's prefix in front, ids unchanged.

    Raises UserError with the number of a prompt that is neither text nor ids.
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


def read_constraint(name: str, given: str) -> str:
    """A constraint as users write it: a regular expression itself, a schema or a grammar by the path of its file.

    Raises UserError for a file that cannot be read, and as `Request` does.
    """
    if name != "regex":
        try:
            given = storage.read_text(Path(given))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the {name} in {given} cannot be read: {error}") from error
    return str(getattr(Request.parse({"ids": (0,), name: given}), name))


def check_fits(request: Request, c: ConfigDict, *, limit: int, source_length: int, name: str) -> None:
    """Raise UserError for a request that a model of these settings (`config.model`) cannot answer.

    Args:
        limit: tokens of prompt and text together.
        source_length: tokens of an encoder-decoder's source.
        name: what the message calls the prompt.
    """
    V = c.vocab_size
    if max(request.ids) >= V:
        raise UserError(f"{name} must have ids from 0 to {V - 1}")
    if len(request.ids) + request.max_new_tokens > limit:
        bounded = limit == c.max_length and config.bounded_positions(c)
        raise UserError(
            f"{name} has {len(request.ids)} tokens (<bos> included), which with max_new_tokens={request.max_new_tokens} "
            f"is more than the {limit} "
            + (f"{bounded} positions of the model" if bounded else "that a slot of the engine holds")
            + ": shorten the prompt or lower max_new_tokens"
            + ("" if bounded else ", or give the engine a larger length (infer.length)")
        )
    if len(request.source) > source_length or (source_length > 0) != bool(request.source):
        raise UserError(f"the source has {len(request.source)} tokens, of 1 to {source_length} for this engine")
    if request.source and max(request.source) >= V:
        raise UserError(f"the source must have ids from 0 to {V - 1}")
    if wrong := [i for i in request.logit_bias if i >= V]:
        raise UserError(f"logit_bias has the id {wrong[0]}: ids are from 0 to {V - 1}")


def writable(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """bool (vocab_size,): the ids that may be written. Rows that only pad the embedding, and <pad>, <bos>, <unk> may not."""
    allowed_V = np.arange(vocab_size) < tokenizer.vocab_size
    allowed_V[[i for i in tokenizer.unsampled_ids if i < vocab_size]] = False
    return allowed_V


def sampling_row(request: Request) -> dict[str, float]:
    """The request's part of `sample.Sampling`."""
    return {key: getattr(request, key) for key in OFF}
