"""Continue prompts with a model: prefill the key/value cache, then decode a few tokens at a time.

Prompts of different lengths run side by side, padded on the right; the cache's rule that a query at position p sees
the slots 0 to p makes the padding invisible. The last token of each prompt is fed by the first decoding step, so there
is one place that samples. Lengths and numbers of rows are rounded up to powers of two, so few programs are compiled.
"""

import codecs
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llmjax.data.tokenizer import Tokenizer
from llmjax.infer.sample import Sampling, sample
from llmjax.model.cache import init_cache
from llmjax.model.transformer import Transformer

CHUNK = 16  # tokens decoded between two looks at the text for stop strings and streaming
SMALLEST_LENGTH = 16


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str  # the continuation, without the stop string; bytes that are no UTF-8 are U+FFFD
    finish: str  # "stop" (a stop string), "eos" (the model ended the document) or "length" (max_new_tokens)
    tokens: tuple[int, ...]  # what was sampled, a final <eos> and the tokens of the stop string included
    log_probabilities: tuple[float, ...]  # nats of each token in the model's own distribution (temperature 1)


@struct.dataclass
class Rows:
    """The rows being decoded; arrays of shape (B,) and the cache."""

    cache: Any
    token: jax.Array  # int32, fed next
    position: jax.Array  # int32, its position


def generate(
    module: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str], None] | None = None,
    rows_multiple: int = 1,
) -> list[Completion]:
    """Continue each prompt: a text, as the beginning of a document, or ids as they are (`Tokenizer.chat_ids`).

    With rotary positions a text may grow longer than the sequences in training, but how good it is there is another
    matter; learned positions end at `model.max_length`. The rows that only pad the embedding are never sampled, nor are
    the <pad>, <bos> and <unk> of tokenizers trained here. A row's logits, and so its text, are the same in any batch up to float rounding.

    Args:
        module, params: the model; `params` is {"embedding": ..., ...}.
        prompts: texts, before which comes what the tokenizer's model expects there, <bos> mostly; "" starts a document.
        max_new_tokens: tokens to sample for each prompt at most, <eos> included.
        temperature, top_k, top_p, min_p: see `sample.Sampling`; one value, or one for each prompt.
        stop: a text ends before the first of these strings; looked for in the continuation only.
        seed: one for all, or one for each prompt. A row's random numbers depend on its seed, its place in the list
            (0 where it has its own seed) and the position of the token, never on the other rows.
        on_text: called as `on_text(row, piece)` while text becomes certain, a few tokens at a time; the pieces of a
            row add up to its text. Characters come whole, and what may become a stop string is held back.
        rows_multiple: the number of rows is padded to a multiple of this; the mesh's data times fsdp.

    Raises:
        ValueError: for settings out of range, a prompt that is no text, or one too long for the learned positions.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts; for one prompt write [prompt]")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ValueError("a stop string is empty, so every text would end at once: remove it from generate.stop")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        return []
    ids = _prompt_ids(tokenizer, prompts, vocab_size=module.c.vocab_size)
    _check_length(module, ids, max_new_tokens)

    # ------------------------------------------------------------------ arrays
    count = len(prompts)
    batch = -(-_round_up(count) // rows_multiple) * rows_multiple
    longest = max(map(len, ids))
    limit = module.c.max_length if module.c.position == "learned" else math.inf
    prompt_length = int(min(_round_up(longest, least=SMALLEST_LENGTH), limit))
    cache_length = int(min(_round_up(longest + max_new_tokens, least=SMALLEST_LENGTH), limit))
    tokens_BL = np.zeros((batch, prompt_length), np.int32)
    for row, row_ids in enumerate(ids):
        tokens_BL[row, : len(row_ids)] = row_ids
    lengths_B = np.array([len(row) for row in ids] + [1] * (batch - count), np.int32)
    # Rows that only fill the batch are finished from the start.
    finished_B = np.arange(batch) >= count
    sampling = _sampling(count, batch, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    keys_B = _row_keys(seed, count, batch)
    allowed_V = np.arange(module.c.vocab_size) < tokenizer.vocab_size
    allowed_V[list(tokenizer.unsampled_ids)] = False
    # Padded, so that tokenizers with one, two or no such ids share a program.
    eos_ids = np.array([*tokenizer.eos_ids, *[-1] * (4 - len(tokenizer.eos_ids))], np.int32)

    # ------------------------------------------------------------------ decode
    rows = _prefill(module, params, tokens_BL, lengths_B, cache_length=cache_length)
    texts = [Text(piece_bytes=tokenizer.piece_bytes, eos_ids=tokenizer.eos_ids, stops=stops) for _ in prompts]
    done = 0
    while done < max_new_tokens and not finished_B.all():
        steps = min(CHUNK, max_new_tokens - done)
        rows, new_BL, log_probability_BL = _decode(
            module, params, rows, finished_B, sampling, keys_B, allowed_V, np.int32(steps), eos_ids
        )
        done += steps
        new_BL, log_probability_BL = np.asarray(new_BL), np.asarray(log_probability_BL)
        for row, text in enumerate(texts):
            for token, log_probability in zip(new_BL[row, :steps], log_probability_BL[row, :steps], strict=True):
                text.add(int(token), float(log_probability))
            if done == max_new_tokens:
                text.end("length")
            if on_text is not None and (piece := text.take()):
                on_text(row, piece)
        finished_B = np.array([bool(text.finish) for text in texts] + [True] * (batch - count))
    return [
        Completion(
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
            text.text,
            text.finish,
            tuple(text.tokens),
            tuple(text.log_probabilities),
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("module", "cache_length"))
def _prefill(
    module: Transformer, params: Any, tokens_BL: jax.Array, lengths_B: jax.Array, *, cache_length: int
) -> Rows:
    cache = init_cache(module.c, batch=tokens_BL.shape[0], length=cache_length)
    last_B1 = lengths_B[:, None] - 1
    # The last token is fed by the first decoding step, and recurrent layers must see it once: here it is padding (0).
    segments_BL = (jnp.arange(tokens_BL.shape[1])[None] < last_B1).astype(jnp.int32)
    # Nobody reads the logits, so XLA leaves the output head out.
    output: Any = module.apply({"params": params}, tokens_BL, segments_BL=segments_BL, cache=cache)
    return Rows(cache=output[1], token=jnp.take_along_axis(tokens_BL, last_B1, axis=1)[:, 0], position=last_B1[:, 0])


@functools.partial(jax.jit, static_argnames="module", donate_argnames="rows")
def _decode(
    module: Transformer,
    params: Any,
    rows: Rows,
    finished_B: jax.Array,
    sampling: Sampling,
    keys_B: jax.Array,
    allowed_V: jax.Array,
    steps: jax.Array,
    eos_ids: jax.Array,
) -> tuple[Rows, jax.Array, jax.Array]:
    """Sample `steps` tokens for every row, fewer when all have ended: (rows, tokens_BL, log_probability_BL), L = CHUNK."""
    batch = rows.token.shape[0]
    Carry = tuple[jax.Array, Rows, jax.Array, jax.Array, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        step, _, finished_B, _, _ = carry
        return (step < steps) & ~jnp.all(finished_B)

    def one(carry: Carry) -> Carry:
        step, rows, finished_B, tokens_LB, log_probability_LB = carry
        output: Any = module.apply(
            {"params": params}, rows.token[:, None], positions_BL=rows.position[:, None], cache=rows.cache
        )
        logits_BLV, cache = output
        logits_BV = logits_BLV[:, 0]
        keys = jax.vmap(jax.random.fold_in)(keys_B, rows.position)
        token_B = sample(jnp.where(allowed_V[None], logits_BV, -jnp.inf), keys, sampling)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        log_probability_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        # A finished row stays where it is and writes the same slot again.
        rows = Rows(
            cache=cache,
            token=jnp.where(finished_B, rows.token, token_B),
            position=jnp.where(finished_B, rows.position, rows.position + 1),
        )
        finished_B = finished_B | jnp.isin(token_B, eos_ids)
        tokens_LB = tokens_LB.at[step].set(token_B)
        log_probability_LB = log_probability_LB.at[step].set(log_probability_B)
        return step + 1, rows, finished_B, tokens_LB, log_probability_LB

    start = (
        jnp.int32(0),
        rows,
        finished_B,
        jnp.zeros((CHUNK, batch), jnp.int32),
        jnp.zeros((CHUNK, batch), jnp.float32),
    )
    _, rows, _, tokens_LB, log_probability_LB = jax.lax.while_loop(unfinished, one, start)
    return rows, tokens_LB.T, log_probability_LB.T


@dataclass
class Text:
    """The text of one row while it grows: bytes to characters, stop strings, and what may be shown already."""

    piece_bytes: Sequence[bytes]
    eos_ids: Sequence[int]
    stops: Sequence[str]
    text: str = ""
    finish: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    shown: int = 0  # characters that `take` has returned
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: int, log_probability: float) -> None:
        """Append a token; without effect once the text has ended."""
        if self.finish:
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        if token in self.eos_ids:
            self.end("eos")
            return
        before = len(self.text)
        self.text += self.decoder.decode(self.piece_bytes[token])
        starts = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self.stops]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.end("stop")

    def end(self, finish: str) -> None:
        """End the text unless it has ended. A character of which bytes are missing is left out."""
        self.finish = self.finish or finish

    def take(self) -> str:
        """The characters that are certain and were not taken before."""
        held = 0 if self.finish else held_back(self.text, self.stops)
        piece = self.text[self.shown : len(self.text) - held]
        self.shown += len(piece)
        return piece


def _prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], *, vocab_size: int) -> list[list[int]]:
    """The ids of each prompt, at least one."""
    texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    rows = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            rows.append([*tokenizer.prefix_ids, *next(texts)] or [tokenizer.start_id])
        elif len(prompt) and all(0 <= i < vocab_size for i in prompt):
            rows.append([int(i) for i in prompt])
        else:
            raise ValueError(f"prompt {row} must have at least one id, and ids from 0 to {vocab_size - 1}")
    return rows


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


def _check_length(module: Transformer, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if module.c.position != "learned":
        return
    for row, row_ids in enumerate(ids):
        if len(row_ids) + max_new_tokens > module.c.max_length:
            raise ValueError(
                f"prompt {row} has {len(row_ids)} tokens (<bos> included), which with max_new_tokens={max_new_tokens} is more "
                f"than the model's {module.c.max_length} learned positions: shorten the prompt or lower max_new_tokens"
            )


def _sampling(
    count: int,
    batch: int,
    *,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int],
    top_p: float | Sequence[float],
    min_p: float | Sequence[float],
) -> Sampling:
    """The settings of `batch` rows; rows that only fill the batch are greedy."""

    def column(name: str, value: Any, dtype: Any, fill: float, low: float, high: float, says: str) -> np.ndarray:
        values = [value] * count if np.ndim(value) == 0 else list(value)
        if len(values) != count:
            raise ValueError(
                f"{name} has {len(values)} values for {count} prompts: give one value, or one for each prompt"
            )
        for v in values:
            if not low <= v <= high or (name == "top_p" and v == 0):
                raise ValueError(f"{name}={v} must be {says}")
        return np.array([*values, *[fill] * (batch - count)], dtype)

    largest = float(np.finfo(np.float32).max)
    return Sampling(
        temperature=column("temperature", temperature, np.float32, 0, 0, largest, "at least 0 (0: greedy) and finite"),
        top_k=column("top_k", top_k, np.int32, 0, 0, 2**31 - 1, "at least 0 (0: all tokens)"),
        top_p=column("top_p", top_p, np.float32, 1, 0, 1, "above 0 and at most 1 (1: all tokens)"),
        min_p=column("min_p", min_p, np.float32, 0, 0, 1, "from 0 (all tokens) to 1"),
    )


def _row_keys(seed: int | Sequence[int], count: int, batch: int) -> jax.Array:
    """A key for every row: of the row's number under one seed, or of number 0 under each row's own seed."""
    if isinstance(seed, (int, np.integer)):
        seeds, numbers = [seed] * batch, list(range(batch))
    else:
        if len(seed) != count:
            raise ValueError(f"seed has {len(seed)} values for {count} prompts: give one value, or one for each prompt")
        seeds, numbers = [*seed, *[0] * (batch - count)], [0] * batch
    return jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(np.array(seeds), np.array(numbers))


def _round_up(n: int, *, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())
