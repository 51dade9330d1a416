"""Continue prompts with a model: one call that makes an engine of the right size, asks it, and puts answers in order."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.prompts import ALIGN
from llmjax.infer.request import FIELDS, Completion, Request, check, check_range, prompt_ids
from llmjax.infer.sample import OFF
from llmjax.model.transformer import Transformer

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
        mesh, context, engine: see `Engine`, and its further settings.
        settings: temperature, top_k, ...: of `Request`, one value, or one for each prompt (a list).

    Raises:
        UserError: for settings out of range, a prompt that is no text, or one too long for the learned positions.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts; for one prompt write [prompt]")
    if best_of < 1 or (best_of > 1 and on_text is not None):
        raise UserError(f"best_of={best_of} must be at least 1, and 1 where the text is shown while it is written")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    count = len(prompts)
    columns = {name: _column(name, value, count) for name, value in settings.items()}
    if not isinstance(seed, (int, np.integer)):
        seeds, numbers = _column("seed", list(seed), count), [0] * count
    else:
        seeds, numbers = [int(seed)] * count, list(range(count))
    ids = prompt_ids(tokenizer, prompts, vocab_size=module.c.vocab_size)
    if not prompts:
        return []
    longest = max(map(len, ids))
    common = _common(ids) if count > 1 else 0
    requests = []
    for row, row_ids in enumerate(ids):
        own = {name: column[row] for name, column in columns.items()}
        for sample in range(best_of):
            number = numbers[row] * best_of + sample
            requests.append(
                Request(
                    tuple(row_ids), max_new_tokens, stop=stops, seed=seeds[row], number=number, shared=common, **own
                )
            )
    limit = module.c.max_length if module.c.position == "learned" else math.inf
    for row, row_ids in enumerate(ids):
        if len(row_ids) + max_new_tokens > limit:
            raise UserError(
                f"prompt {row} has {len(row_ids)} tokens (<bos> included), which with max_new_tokens={max_new_tokens} is more "
                f"than the model's {limit} learned positions: shorten the prompt or lower max_new_tokens"
            )
    for row, request in enumerate(requests):
        check(request, vocab_size=module.c.vocab_size, row=f"prompt {row // best_of}")
    made = Engine(
        module,
        params,
        tokenizer,
        slots=slots or min(_round_up(len(requests)), MOST_SLOTS),
        length=_round_up(longest + max_new_tokens, least=SMALLEST_LENGTH),
        source_length=-(-max((len(r.source) for r in requests), default=0) // ALIGN) * ALIGN,
        mesh=mesh,
        context=context,
        **(engine or {}),
    )
    for row, request in enumerate(requests):
        shown = None if on_text is None else _for_row(on_text, row)
        made.submit(request, on_text=shown, row=f"prompt {row // best_of}")
    done: dict[int, Completion] = {}
    for number, one in made.run():
        done[number] = one
        if on_done is not None:
            on_done(len(done), len(requests))
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    chosen = [_best([done[row * best_of + i] for i in range(best_of)]) for row in range(count)]
    return [_named(one, text) for one, text in zip(chosen, texts, strict=True)]


def _named(one: Completion, prompt: str) -> Completion:
    return Completion(prompt, one.text, one.finish, one.tokens, one.log_probabilities, one.likeliest)


def _for_row(on_text: Callable[[int, str], None], row: int) -> Callable[[str], None]:
    return lambda piece: on_text(row, piece)


def _best(samples: Sequence[Completion]) -> Completion:
    """The one with the largest mean log-probability."""
    return max(samples, key=lambda one: sum(one.log_probabilities) / max(len(one.log_probabilities), 1))


def _common(ids: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with."""
    first, last = min(map(tuple, ids)), max(map(tuple, ids))
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _column(name: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt."""
    if name not in FIELDS:
        raise UserError(f"generation has no setting {name!r}; it has {', '.join(sorted(FIELDS))}")
    each = isinstance(value, (list, np.ndarray)) or (isinstance(value, tuple) and name in OFF)
    values = list(value) if each else [value] * count
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} values for {count} prompts: give one value, or one for each prompt")
    if name in OFF:
        for one in values:
            check_range(name, one)
    return values


def _round_up(n: int, *, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())
