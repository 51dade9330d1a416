"""Sampled answers with their rewards, as rows to train on, and the compact form of these rows in a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.data.examples import Example
from llmjax.data.packing import packed
from llmjax.infer import rollout
from llmjax.infer.rollout import Rollouts
from llmjax.post.rewards import Scored

OF_TOKENS = ("sampler", "old", "reference", "advantages", "returns", "old_values")  # (B, L), 0 but on learnt tokens


class Draw(NamedTuple):
    """S sampled answers: a prompt and a text for each, with rewards and ids of groups (S,)."""

    prompts: list[list[int]]
    made: Rollouts
    texts: list[str]
    scored: Scored
    groups: np.ndarray

    def taken(self, keep_S: np.ndarray) -> "Draw":
        """The answers that a mask selects."""
        where = np.flatnonzero(keep_S)
        scored = Scored(self.scored.total[where], {k: v[where] for k, v in self.scored.parts.items()})
        prompts, texts = [self.prompts[i] for i in where], [self.texts[i] for i in where]
        return Draw(prompts, self.made.take(where), texts, scored, self.groups[where])

    def with_different_rewards(self, samples: int) -> "Draw":
        """The groups whose scored answers differ in reward."""
        by_group = self.scored.total.reshape(-1, samples)
        unknown = np.isnan(by_group)
        lowest, highest = np.where(unknown, np.inf, by_group).min(1), np.where(unknown, -np.inf, by_group).max(1)
        return self.taken(np.repeat(highest > lowest, samples))


def joined(draws: Sequence[Draw]) -> Draw:
    """The answers of several draws, one after another."""
    scored = Scored(
        np.concatenate([draw.scored.total for draw in draws]),
        {name: np.concatenate([draw.scored.parts[name] for draw in draws]) for name in draws[0].scored.parts},
    )
    return Draw(
        [prompt for draw in draws for prompt in draw.prompts],
        rollout.joined([draw.made for draw in draws]),
        [text for draw in draws for text in draw.texts],
        scored,
        np.concatenate([draw.groups for draw in draws]),
    )


def rows_of(draw: Draw, *, length: int, mask_cut: bool) -> dict[str, np.ndarray]:
    """A row a text, (B, length): its prompt and its answer, with weight 1 on the sampled tokens alone.

    "sampler" has the sampler's log-probability of each of them. With `mask_cut` a text that was cut has no weights.
    """
    made, rows = draw.made, []
    for i, (prompt, size) in enumerate(zip(draw.prompts, made.lengths, strict=True)):
        tokens, sampled = made.tokens[i, :size], made.sampled[i, :size]
        # One id more, so that the last token is an input too: the critic gives its value there.
        ids = np.array([*prompt, *tokens, tokens[-1]], np.int32)
        row = packed([Example(ids, np.r_[np.zeros(len(prompt)), sampled, 0].astype(np.float32))], length=length)
        row["sampler"] = np.zeros(length, np.float32)
        row["sampler"][row["weights"] > 0] = made.log_probs[i, :size][sampled]
        if mask_cut and made.finish[i] == "length":
            row["weights"][:] = 0
        row["exists"] = np.ones(1, np.float32)
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def drift_of(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The drift of the trainer's log-probabilities from the sampler's: log r = old - sampler for each learnt token.

    drift and drift_max: mean and largest |log r|, in nats. drift_ratio: the mean of r. drift_k3: the mean of r - 1 - log r.
    drift_far: the share of tokens whose r is beyond 10 percent. drift_text_5, _50 and _95: quantiles of a text's log r,
    summed over its tokens.
    """
    learnt_BL = rows["weights"] > 0
    log_BL = np.where(learnt_BL, rows["old"] - rows["sampler"], 0).astype(np.float64)
    log_r = log_BL[learnt_BL] if learnt_BL.any() else np.zeros(1)
    r = np.exp(log_r)
    texts = np.quantile(log_BL.sum(axis=1), (0.05, 0.5, 0.95))
    return {
        "drift": float(np.abs(log_r).mean()),
        "drift_max": float(np.abs(log_r).max()),
        "drift_ratio": float(r.mean()),
        "drift_k3": float((r - 1 - log_r).mean()),
        "drift_far": float((np.abs(r - 1) > 0.1).mean()),
        **{f"drift_text_{name}": float(value) for name, value in zip((5, 50, 95), texts, strict=True)},
    }


def to_keep(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of `rows_of` without their padding, and what belongs to learnt tokens for those alone.

    `sizes` (B,) int32 are the tokens of each row, `ids` all of them, in the smallest type that holds them, `learnt` bits
    of which are learnt, and the others float32, one a learnt token, with a 0 behind them: no array is empty.
    """
    inside, learnt = rows["segments"] > 0, rows["weights"] > 0
    lasts = inside.sum(axis=1) - 1
    ids = [np.append(row[:n], t[n - 1]) for row, t, n in zip(rows["tokens"], rows["targets"], lasts + 1, strict=True)]
    flat = np.concatenate(ids)
    kept = {
        "sizes": np.array([len(one) for one in ids], np.int32),
        "ids": flat.astype(np.uint16) if flat.max() < 1 << 16 else flat,
        "learnt": np.packbits(learnt[inside]),
    }
    return kept | {name: np.append(rows[name][learnt], np.float32(0)) for name in OF_TOKENS if name in rows}


def from_kept(kept: Mapping[str, np.ndarray], *, length: int) -> dict[str, np.ndarray]:
    """The rows that `to_keep` was given, bit for bit."""
    ends = np.cumsum(kept["sizes"])
    places = np.cumsum(kept["sizes"] - 1)
    bits = np.unpackbits(kept["learnt"], count=int(places[-1]))
    rows = []
    for size, end, place in zip(kept["sizes"], ends, places, strict=True):
        ids, learnt = kept["ids"][end - size : end], bits[place - size + 1 : place]
        rows.append(packed([Example(ids.astype(np.int32), np.append(0, learnt).astype(np.float32))], length=length))
    made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    learnt_BL = made["weights"] > 0
    for name in OF_TOKENS:
        if name in kept:
            made[name] = np.zeros(learnt_BL.shape, np.float32)
            made[name][learnt_BL] = kept[name][:-1]
    return made | {"exists": np.ones((len(rows), 1), np.float32)}
