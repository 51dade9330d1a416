"""Continue prompts with a model: one call that makes an engine of the right size, asks it, and puts answers in order."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
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
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, int], None] | None = None,
    slots: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    store: Store | None = None,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continue each prompt: a text, as the beginning of a document, or ids as they are (`Tokenizer.chat_ids`).

    With rotary positions a text may grow longer than the sequences in training, but how good it is there is another
    matter; learned positions end at `model.max_length`. The rows that only pad the embedding are never sampled, nor are
    the <pad>, <bos> and <unk> of tokenizers trained here. A row's logits, and so its text, are the same in any batch up to float rounding.

    Args:
        module, params: the model; `params` is {"embedding": ..., ...}.
        prompts: texts, before which comes what the tokenizer's model expects there, <bos> mostly; "" starts a document.
        max_new_tokens: tokens to sample for each prompt at most, <eos> included.
        stop: a text ends before the first of these strings; looked for in the continuation only.
        seed: one for all, or one for each prompt. A row's random numbers depend on its seed, its place in the list
            (0 where it has its own seed) and the position of the token, never on the other rows.
        best_of: of so many samples of each prompt the one with the largest mean log-probability is returned.
        on_text: called as `on_text(row, piece)` while text becomes certain, a few tokens at a time; the pieces of a
            row add up to its text. Characters come whole, and what may become a stop string is held back.
        on_done: told after every finished text how many of how many are.
        slots: texts written at a time; 0: as many as prompts, at most 32.
        mesh, context, store, engine: see `Engine`, and its further settings.
        settings: temperature, top_k, json_schema, ...: of `Request`, one value, or one for each prompt (a list).

    Raises:
        UserError: for settings out of range, a prompt that is no text, one too long for the learned positions, or a
            form (json_schema, regex, grammar) that cannot be used.
    """
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise UserError("prompts must be a list of texts; for one prompt write [prompt]")
    if not is_number(best_of, int) or best_of < 1 or (best_of > 1 and on_text is not None):
        raise UserError(f"best_of={best_of!r} must be at least 1, and 1 where the text is shown while it is written")
    if not is_number(slots, int) or slots < 0:
        raise UserError(f"slots={slots!r} must be a whole number, at least 0")
    count = len(prompts)
    common = {"max_new_tokens": max_new_tokens, "stop": (stop,) if isinstance(stop, str) else stop}
    own: list[dict[str, Any]] = [dict(common) for _ in range(count)]
    for name, value in settings.items():
        for row, one in enumerate(_column(name, value, count)):
            own[row][name] = one
    each = _listed(seed)
    for row, one in enumerate(_column("seed", seed, count)):
        own[row] |= {"seed": one, "number": 0 if each else row}
    requests = []
    for row, ids in enumerate(prompt_ids(tokenizer, prompts)):
        for sample in range(best_of):
            requests.append(Request.parse({**own[row], "ids": ids, "number": own[row]["number"] * best_of + sample}))
    if not prompts:
        return []
    limit = module.c.max_length if module.c.position == "learned" else math.inf
    for row, request in enumerate(requests):
        if len(request.ids) + request.max_new_tokens > limit:
            raise UserError(
                f"prompt {row // best_of} has {len(request.ids)} tokens (<bos> included), which with max_new_tokens="
                f"{request.max_new_tokens} is more than the model's {limit} learned positions: shorten the prompt or lower "
                "max_new_tokens"
            )
    made = Engine(
        module,
        params,
        tokenizer,
        slots=slots or min(_round_up(len(requests)), MOST_SLOTS),
        length=_round_up(max(len(one.ids) + one.max_new_tokens for one in requests), least=SMALLEST_LENGTH),
        source_length=-(-max((len(r.source) for r in requests), default=0) // ALIGN) * ALIGN,
        mesh=mesh,
        context=context,
        store=store,
        **(engine or {}),
    )
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
    chosen = [_best([done[row * best_of + i] for i in range(best_of)]) for row in range(count)]
    return [
        dataclasses.replace(one, prompt=prompt) if isinstance(prompt, str) else one
        for one, prompt in zip(chosen, prompts, strict=True)
    ]


def _best(samples: Sequence[Completion]) -> Completion:
    """The one with the largest mean log-probability."""
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


def _round_up(n: int, *, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())
