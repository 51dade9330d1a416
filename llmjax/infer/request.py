"""What an engine is asked for, and what it answers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.sample import OFF

STOP_IDS = 8  # ids at which a row may end, those of the tokenizer included
LARGEST = float(np.finfo(np.float32).max)
RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, LARGEST, "at least 0 (0: greedy) and finite"),
    "top_k": (0, 2**31 - 1, "at least 0 (0: all tokens)"),
    "top_p": (0, 1, "above 0 and at most 1 (1: all tokens)"),
    "min_p": (0, 1, "from 0 (all tokens) to 1"),
    "typical_p": (0, 1, "above 0 and at most 1 (1: all tokens)"),
    "repetition_penalty": (0, LARGEST, "above 0 (1: none)"),
    "frequency_penalty": (-LARGEST, LARGEST, "finite (0: none)"),
    "presence_penalty": (-LARGEST, LARGEST, "finite (0: none)"),
}
ABOVE_ZERO = ("top_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class Request:
    """One text to write. `check` says what of it cannot be."""

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
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: tuple[int, ...] = ()  # and with any of these ids, as with the tokenizer's own
    seed: int = 0
    number: int = 0  # of several samples under one seed
    constraint: Any = None  # from infer/constrained.py
    source: tuple[int, ...] = ()  # what the encoder of an encoder-decoder reads
    shared: int = 0  # so many of the first ids begin other prompts too: they are computed once and kept


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str  # the continuation, without the stop string; bytes that are no UTF-8 are U+FFFD
    finish: str  # "stop" (a stop string), "eos" (the model ended it), "length" (max_new_tokens) or "cancelled"
    tokens: tuple[int, ...]  # what was sampled, a final <eos> and the tokens of the stop string included
    log_probabilities: tuple[float, ...]  # nats of each token in the model's own distribution (temperature 1)
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()  # for each token the likeliest ids and their nats


def check(request: Request, *, vocab_size: int, capacity: float = math.inf, row: str = "") -> Request:
    """The request. UserError with what is wrong; `row` names it, such as "prompt 3"."""
    name = row or "the prompt"
    if not request.ids or not all(0 <= i < vocab_size for i in request.ids):
        raise UserError(f"{name} must have at least one id, and ids from 0 to {vocab_size - 1}")
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
    for key in RANGES:
        check_range(key, getattr(request, key))
    if "" in request.stop:
        raise UserError("a stop string is empty, so every text would end at once: remove it from generate.stop")
    for i, bias in request.logit_bias.items():
        if not 0 <= i < vocab_size or math.isnan(bias):
            raise UserError(f"logit_bias {{{i}: {bias}}} must be a number for an id from 0 to {vocab_size - 1}")
    if len(request.ids) + request.max_new_tokens > capacity:
        raise UserError(
            f"{name} has {len(request.ids)} tokens (<bos> included), which with max_new_tokens="
            f"{request.max_new_tokens} is more than the {capacity} that a slot of the engine holds: "
            "shorten the prompt or lower max_new_tokens"
        )
    return request


def check_range(key: str, value: float) -> None:
    """UserError for a setting out of its range."""
    low, high, says = RANGES[key]
    if not low <= value <= high or (key in ABOVE_ZERO and value == 0):
        raise UserError(f"{key}={value} must be {says}")


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], *, vocab_size: int) -> list[list[int]]:
    """The ids of each prompt, at least one: a text's as the beginning of a document, ids as they are."""
    texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    rows = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            rows.append([*tokenizer.prefix_ids, *next(texts)] or [tokenizer.start_id])
        elif len(prompt) and all(0 <= i < vocab_size for i in prompt):
            rows.append([int(i) for i in prompt])
        else:
            raise UserError(f"prompt {row} must have at least one id, and ids from 0 to {vocab_size - 1}")
    return rows


def sampling_row(request: Request) -> dict[str, float]:
    """The request's part of `sample.Sampling`."""
    return {key: getattr(request, key) for key in OFF}


FIELDS = frozenset(f.name for f in dataclasses.fields(Request))
