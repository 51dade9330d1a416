"""Texts sampled for reinforcement: arrays of ids and log-probabilities, never text that would be encoded again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmjax.infer.engine import Engine


class Rollouts(NamedTuple):
    """S = prompts x samples texts; text i * samples + j is sample j of prompt i."""

    tokens: np.ndarray  # (S, T) int32: what was sampled, the stop token included; 0 behind it
    lengths: np.ndarray  # (S,) int32: sampled tokens
    log_probs: np.ndarray  # (S, T) float32: nats of each token in the distribution that it was sampled from
    finish: tuple[str, ...]  # why each ended: "eos" or "stop" by itself, "length" cut
    versions: np.ndarray  # (S, T) int32: of the parameters that sampled each token; -1 behind the text


def sample_rollouts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> Rollouts:
    """Sample texts after prompts of ids from the engine's parameters; the engine must be idle.

    Sample j of prompt i depends on the parameters, the prompt, `seed`, i and j alone: not on what else is being written, on
    the number of slots, or on the order in which texts end.

    Raises:
        UserError: for a prompt that the engine cannot hold, and when a text could not be written to its end.
    """
    numbers = {}
    for i, prompt in enumerate(prompts):
        for j in range(samples):
            place = i * samples + j
            given = {"ids": tuple(prompt), "max_new_tokens": max_new_tokens, "temperature": temperature}
            sampled = {"seed": seed, "number": place, "stop_ids": tuple(stop_ids)}
            numbers[engine.submit(given | sampled, name=f"prompt {i}")] = place
    count = len(prompts) * samples
    tokens_ST = np.zeros((count, max_new_tokens), np.int32)
    log_probs_ST = np.zeros((count, max_new_tokens), np.float32)
    lengths_S, finish = np.zeros(count, np.int32), [""] * count
    for number, completion in engine.run():
        if completion.finish == "error":
            raise RuntimeError(f"text {numbers[number]} could not be sampled: {completion.error}")
        place, size = numbers[number], len(completion.tokens)
        tokens_ST[place, :size] = completion.tokens
        log_probs_ST[place, :size] = completion.sampled_log_probabilities
        lengths_S[place], finish[place] = size, completion.finish
    written_ST = np.arange(max_new_tokens)[None] < lengths_S[:, None]
    versions_ST = np.where(written_ST, engine.version, -1).astype(np.int32)
    return Rollouts(tokens_ST, lengths_S, log_probs_ST, tuple(finish), versions_ST)
