"""Texts sampled for reinforcement: arrays of ids and log-probabilities, never text that would be encoded again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.infer.engine import Engine

Reply = Callable[[int, Sequence[int]], list[int] | None]


class Rollouts(NamedTuple):
    """S = prompts x samples texts; text i * samples + j is sample j of prompt i."""

    tokens: np.ndarray  # (S, T) int32: what follows the prompt, the stop token included; 0 behind it
    lengths: np.ndarray  # (S,) int32: tokens behind the prompt
    sampled: np.ndarray  # (S, T) bool: the tokens that the model sampled; others are the answers of tools
    log_probs: np.ndarray  # (S, T) float32: nats of each sampled token in the distribution that it was sampled from
    finish: tuple[str, ...]  # why each ended: "eos" or "stop" by itself, "length" cut
    versions: np.ndarray  # (S, T) int32: of the parameters that sampled each token; -1 for all others

    def take(self, where_S: np.ndarray) -> "Rollouts":
        """The texts of these numbers."""
        arrays = {name: value[where_S] for name, value in self._asdict().items() if name != "finish"}
        return Rollouts(finish=tuple(self.finish[i] for i in where_S), **arrays)


def joined(rollouts: Sequence[Rollouts]) -> Rollouts:
    """Texts of several calls, one after another."""
    parts = [one._asdict() for one in rollouts]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "finish"}
    return Rollouts(finish=tuple(end for one in rollouts for end in one.finish), **arrays)


def sample_rollouts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    reply: Reply | None = None,
) -> Rollouts:
    """Sample texts after prompts of ids from the engine's parameters; the engine must be idle.

    Sample j of prompt i depends on the parameters, the prompt, `seed`, i, j and the replies alone: not on what else is
    being written, on the number of slots, or on the order in which texts end.

    Args:
        max_new_tokens: of a text, replies included.
        reply: (number of a text that ended by itself, its ids so far) -> the ids that follow before the model goes on, or
            None, which ends the text. A reply that leaves the model no token ends it too, without the reply, as "length".

    Raises:
        UserError: for a prompt that the engine cannot hold, and when a text could not be written to its end.
    """
    count, numbers = len(prompts) * samples, {}
    tokens_ST, sampled_ST = (np.zeros((count, max_new_tokens), kind) for kind in (np.int32, bool))
    log_probs_ST = np.zeros((count, max_new_tokens), np.float32)
    lengths_S, finish = np.zeros(count, np.int32), [""] * count

    def submit(place: int) -> None:
        size, prompt = lengths_S[place], prompts[place // samples]
        ids = (*prompt, *tokens_ST[place, :size].tolist())
        given = {"ids": ids, "max_new_tokens": int(max_new_tokens - size), "temperature": temperature}
        sampled = {"seed": seed, "number": place, "stop_ids": tuple(stop_ids)}
        numbers[engine.submit(given | sampled, name=f"prompt {place // samples}")] = place

    for place in range(count):
        submit(place)
    while engine.busy:
        for number, completion in engine.run():
            place = numbers.pop(number)
            if completion.finish == "error":
                raise RuntimeError(f"text {place} could not be sampled: {completion.error}")
            first, last = lengths_S[place], lengths_S[place] + len(completion.tokens)
            tokens_ST[place, first:last], sampled_ST[place, first:last] = completion.tokens, True
            log_probs_ST[place, first:last] = completion.sampled_log_probabilities
            lengths_S[place], finish[place] = last, completion.finish
            more = None
            if reply is not None and completion.finish != "length":
                more = reply(place, tokens_ST[place, :last].tolist())
            if more is None:
                continue
            if last + len(more) >= max_new_tokens:
                finish[place] = "length"
                continue
            tokens_ST[place, last : last + len(more)] = more
            lengths_S[place] += len(more)
            submit(place)
    versions_ST = np.where(sampled_ST, engine.version, -1).astype(np.int32)
    return Rollouts(tokens_ST, lengths_S, sampled_ST, log_probs_ST, tuple(finish), versions_ST)
