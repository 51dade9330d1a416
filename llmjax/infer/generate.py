"""Continue prompts with a model: one call makes an engine of the right size, asks it, and puts the answers in order."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llmjax import config
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.beam import BeamSearch
from llmjax.infer.engine import Engine
from llmjax.infer.prefixes import ALIGN
from llmjax.infer.request import NUMBERS, SETTINGS, Completion, Request, is_number, prompt_ids
from llmjax.model.transformer import Transformer
from llmjax.startup.compiled import Store

SMALLEST_LENGTH = 32
MOST_SLOTS = 32


def generate(
    module: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    best_of: int = 1,
    beams: int = 1,
    length_penalty: float = 1.0,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, int], None] | None = None,
    slots: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    store: Store | None = None,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continue each prompt: a text, as the beginning of a document, or ids as they are (`data.chat.chat_ids`).

    With rotary positions a text may grow longer than the sequences of training, though it may be worse there. Learned
    positions end at `model.max_length`. Rows that only pad the embedding are never sampled, nor are the <pad>, <bos> and
    <unk> of tokenizers trained here. The text of a row is the same in any batch, up to float rounding of its logits.

    Args:
        module, params: the model; `params` is {"embedding": ..., ...}.
        prompts: texts, which get the tokenizer's prefix in front, mostly <bos>; "" starts a document.
        max_new_tokens: the most tokens to sample for each prompt, <eos> included.
        stop: a text ends before the first of these strings in the continuation.
        seed: one for all, or one for each prompt. A row's random numbers depend on its seed, its place in the list
            (0 where it has its own seed) and the position of the token, never on the other rows.
        best_of: take so many samples of each prompt, and return the one with the largest mean log-probability.
        beams, length_penalty: with more than one beam, return the text that beam search finds (see `BeamSearch`).
        on_text: called as `on_text(row, piece)` while text becomes certain, a few tokens at a time. The pieces of a
            row add up to its text. Characters come whole, and the possible beginning of a stop string is held back.
        on_done: called after every finished text with the numbers of texts that are finished and of all.
        slots: texts written at a time; 0: as many as prompts, at most 32.
        mesh, context, store, engine: see `Engine`, and its further settings.
        settings: temperature, top_k, json_schema, ... of `Request`: one value, or a list with one for each prompt.

    Raises:
        UserError: for settings out of range, a prompt that is no text or is too long for the learned positions, and a
            constraint (json_schema, regex, grammar) that cannot be used.
    """
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise UserError("prompts must be a list of texts; for one prompt write [prompt]")
    if not is_number(best_of, int) or best_of < 1 or (best_of > 1 and on_text is not None):
        raise UserError(f"best_of={best_of!r} must be at least 1, and 1 where the text is shown while it is written")
    if not is_number(beams, int) or beams < 1 or (beams > 1 and (best_of > 1 or engine)):
        raise UserError(f"beams={beams!r} must be at least 1, and 1 with best_of or settings of the engine")
    if not is_number(length_penalty):
        raise UserError(f"length_penalty={length_penalty!r} must be a number")
    if not is_number(slots, int) or slots < 0:
        raise UserError(f"slots={slots!r} must be a whole number, at least 0")
    common = {"max_new_tokens": max_new_tokens, "stop": (stop,) if isinstance(stop, str) else stop}
    requests = _requests(tokenizer, prompts, common, settings, seed=seed, best_of=best_of)
    if not prompts:
        return []
    length = round_up(max(len(one.ids) + one.max_new_tokens for one in requests), least=SMALLEST_LENGTH)
    if config.bounded_positions(module.c):
        length = min(length, module.c.max_length)
    shape: dict[str, Any] = {"length": length, "mesh": mesh, "context": context}
    shape["source_length"] = -(-max(len(one.source) for one in requests) // ALIGN) * ALIGN
    made: Engine | BeamSearch
    if beams > 1:
        made = BeamSearch(module, params, tokenizer, beams=beams, length_penalty=length_penalty, **shape)
    else:
        slots = slots or min(round_up(len(requests)), MOST_SLOTS)
        made = Engine(module, params, tokenizer, slots=slots, store=store, **shape, **(engine or {}))
    numbers = [made.submit(one, name=f"prompt {row // best_of}") for row, one in enumerate(requests)]
    row_of = {number: row for row, number in enumerate(numbers)}
    done: dict[int, Completion] = {}
    while made.busy:
        for event in made.step():
            row = row_of[event.number]
            if event.error:
                raise UserError(f"prompt {row // best_of}: {event.error}")
            if on_text is not None and event.piece:
                on_text(row, event.piece)
            if event.completion is not None:
                done[row] = event.completion
                if on_done is not None:
                    on_done(len(done), len(requests))
    chosen = [_best([done[row * best_of + i] for i in range(best_of)]) for row in range(len(prompts))]
    return [
        dataclasses.replace(one, prompt=prompt) if isinstance(prompt, str) else one
        for one, prompt in zip(chosen, prompts, strict=True)
    ]


def _requests(
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    common: dict[str, Any],
    settings: dict[str, Any],
    *,
    seed: int | Sequence[int],
    best_of: int,
) -> list[Request]:
    """`best_of` requests for each prompt."""
    own: list[dict[str, Any]] = [dict(common) for _ in prompts]
    for name, value in settings.items():
        for row, one in enumerate(_column(name, value, len(prompts))):
            own[row][name] = one
    seeds, each = _column("seed", seed, len(prompts)), _listed(seed)
    requests = []
    for row, ids in enumerate(prompt_ids(tokenizer, prompts)):
        for sample in range(best_of):
            number = (0 if each else row) * best_of + sample
            requests.append(Request.parse({**own[row], "seed": seeds[row], "ids": ids, "number": number}))
    return requests


def _best(samples: Sequence[Completion]) -> Completion:
    """The sample with the largest mean log-probability."""
    return max(samples, key=lambda one: sum(one.log_probabilities) / max(len(one.log_probabilities), 1))


def _column(name: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt."""
    if name not in SETTINGS | {"source"}:
        raise UserError(f"generation has no setting {name!r}; it has {', '.join(sorted(SETTINGS))}")
    each = _listed(value) and (name in NUMBERS or not isinstance(value, tuple))
    if name in ("stop_ids", "source"):  # lists themselves: of ids, or of such lists
        each = _listed(value) and any(_listed(one) for one in value)
    values = list(value) if each else [value] * count
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} values for {count} prompts: give one value, or one for each prompt")
    return values


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def round_up(count: int, *, least: int = 1) -> int:
    """The next power of two, at least `least`. Few sizes make few programs."""
    return max(least, 1 << (count - 1).bit_length())
