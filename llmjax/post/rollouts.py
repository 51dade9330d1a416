"""The source of batches for policy optimisation: rounds of texts that the trained parameters sample.

A round samples `rollout.samples` answers to each of its prompts, scores them, and gives `rollout.updates` batches.
Prompts and random numbers are functions of (config, seed, round); answers also depend on the parameters. A checkpoint
keeps the rest of the present round, so a killed run that goes on ends in the same bits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from llmjax import storage
from llmjax.data.generators import generator
from llmjax.data.packing import learnt_places, most_places
from llmjax.data.source import Batch
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.rollout import Rollouts, sample_rollouts
from llmjax.post import rewards, sharing, tools
from llmjax.post.advantages import (
    Rewards,
    adapted_kl_weight,
    equal_groups,
    generalised_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from llmjax.post.draws import Draw, drift_of, from_kept, joined, rows_of, to_keep
from llmjax.post.rewards import Reward
from llmjax.post.rows import Store
from llmjax.post.sharing import Shared
from llmjax.post.tools import Tool
from llmjax.train.frozen import combine

# Nats by which a token's log-probability may differ between trainer and sampler, both in float32. By rounding, the largest
# of a round is 3e-6 to 2e-5 with 3M parameters, and seldom more. Other weights or another distribution differ by far more.
DRIFT = 1e-3
SHOWN = 8  # answers of a round that are kept to be looked at


class Forward(NamedTuple):
    """The output of the trainer's own forward pass for rows, (B, L) float32 each, at the positions of their targets."""

    log_probs: np.ndarray
    values: np.ndarray | None  # predicted returns, of a model with a value head


Score = Callable[[Any, Mapping[str, np.ndarray]], Forward]  # (parameters, rows) -> what the trainer gives of them


def check_drift(old_BL: np.ndarray, sampler_BL: np.ndarray) -> None:
    """Raise RuntimeError if the trainer's log-probabilities are not the sampler's, both of float32 models."""
    drift = float(np.abs(old_BL - sampler_BL).max())
    if not drift <= DRIFT:
        raise RuntimeError(
            f"the trainer's log-probability of a sampled token differs by {drift:.1e} nats from the sampler's, more than "
            f"{DRIFT:.0e}: they are not the same model"
        )


class RolloutSource:
    """Batches of sampled answers; see `data.source.Source`."""

    stateless = False

    def __init__(
        self,
        c: ConfigDict,
        workdir: Path,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Store,
        forward: Score,
        functions: Mapping[str, Reward],
        called: Mapping[str, Tool] | None = None,
        reference: Any = None,
    ) -> None:
        """
        Args:
            workdir: gets samples/ROUND.json, some answers of each round with their rewards.
            engine: of the same model, idle; each round gives it its parameters.
            prompts: what is answered, with the columns that rewards read.
            forward: the trainer's own forward pass.
            functions: the rewards, by name.
            called: the tools that the model may call, by name.
            reference: the reference model's own values of the trained parameters; None: there is no reference.
        """
        r = c.rollout
        self._c, self._workdir, self._engine, self._tokenizer, self._prompts = c, workdir, engine, tokenizer, prompts
        self._forward, self._reference, self._rewards, self._tools = forward, reference, functions, called or {}
        self._groups = r.updates * c.train.batch_size // r.samples
        self._left: dict[str, np.ndarray] = {}  # the round's rows from the next update on
        self._kl_weight = float(r.kl_weight)
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------------ what the loop asks for

    def batch(self, k: int, params: Any) -> Batch:
        number, update = divmod(k, self._c.rollout.updates)
        self._metrics = {}  # a round is told of once, with its first update
        if update == 0:
            self._left = self._round(number, params)
        elif not self._left:
            raise UserError("the checkpoint lacks the sampled texts of the round in whose middle it was made")
        size = self._c.train.batch_size
        batch = {name: values[:size] for name, values in self._left.items()}
        self._left = {name: values[size:] for name, values in self._left.items() if len(values) > size}
        if self._c.rollout.pack == 1:
            return self._laid_out(batch).rows
        return sharing.batch_of(self._laid_out(batch), micro_batches=self._c.train.micro_batches)

    def state(self) -> dict[str, np.ndarray]:
        adapted = {"kl_weight": np.array(self._kl_weight)} if self._c.rollout.kl_target else {}
        kept = to_keep(self._left) if self._left else {}
        return {**{f"left/{name}": values for name, values in kept.items()}, **adapted}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        kept = {name.removeprefix("left/"): v for name, v in state.items() if name.startswith("left/")}
        self._left = from_kept(kept, length=self._c.train.sequence_length) if kept else {}
        self._kl_weight = float(state.get("kl_weight", self._kl_weight))

    def metrics(self) -> dict[str, float]:
        return self._metrics

    # ------------------------------------------------------------------ a round

    def _round(self, number: int, params: Any) -> dict[str, np.ndarray]:
        """The rows of a round."""
        r, began = self._c.rollout, time.perf_counter()
        self._engine.load(params, version=number)
        draws: list[Draw] = []
        groups_left, drawn = self._groups, 0
        while groups_left and drawn <= r.resample:
            draw = self._draw(number, drawn, groups_left)
            drawn += 1
            # Groups that all earn the same teach nothing: they are sampled anew as often as allowed, then taken as they are.
            if drawn <= r.resample:
                draw = draw.with_different_rewards(r.samples)
            draws.append(draw)
            groups_left -= len(draw.prompts) // r.samples
        self._engine.release()  # an update needs the memory
        draw = joined(draws)
        seconds = time.perf_counter() - began
        rows = rows_of(draw, length=self._c.train.sequence_length, mask_cut=r.mask_cut)
        made = self._read(params, rows)
        rows["old"] = made.log_probs
        reference = self._reference
        if reference is None:
            rows["reference"] = made.log_probs
        else:
            rows["reference"] = self._read(combine(params, reference), rows).log_probs
        for name in ("old", "reference", "sampler"):
            rows[name] = np.where(rows["weights"] > 0, rows[name], 0).astype(np.float32)
        if self._c.model.dtype == "float32" and self._c.infer.weights != "int8":
            check_drift(rows["old"], rows["sampler"])
        self._add_advantages(rows, draw, made.values)
        self._metrics = self._measured(rows, draw) | {"rollout/draws": float(drawn), "rollout/seconds": seconds}
        self._show(number, draw, rows)
        return rows

    def _read(self, params: Any, rows: Mapping[str, np.ndarray]) -> Forward:
        """The trainer's own forward pass of a round's rows, packed as the rows of an update are."""
        size, found = self._c.train.batch_size, []
        for first in range(0, len(rows["tokens"]), size):
            shared = self._laid_out({name: values[first : first + size] for name, values in rows.items()})
            made = self._forward(params, shared.rows)
            found.append(made._replace(log_probs=shared.apart(made.log_probs),
                                       values=None if made.values is None else shared.apart(made.values)))  # fmt: skip
        values = None if found[0].values is None else np.concatenate([one.values for one in found])
        return Forward(np.concatenate([one.log_probs for one in found]), values)

    def _laid_out(self, rows: Mapping[str, np.ndarray]) -> Shared:
        """An update's rows as the trainer computes them, with the places that are learnt where these are few.

        A critic gives values of other places too, so it gets none.
        """
        c, r, length = self._c, self._c.rollout, self._c.train.sequence_length
        if r.pack > 1:
            return sharing.share(rows, most=r.pack, micro_batch=c.train.batch_size // c.train.micro_batches)
        critic, answers = c.model.value_head, 1
        if c.data.share_prompts:
            answers = r.samples
            length += (r.samples - 1) * r.tokens - 1 + r.samples * critic
            made = sharing.share_prompts(rows, samples=answers, length=length, whole=critic)
        else:
            made = sharing.alone(rows)
        count = most_places(answers * r.tokens, length)
        if not critic and count:
            made.rows["places"] = np.stack([learnt_places(weights_L, count) for weights_L in made.rows["weights"]])
        return made

    def _draw(self, number: int, drawn: int, groups: int) -> Draw:
        """Answers to the prompts of one draw of a round, and their rewards."""
        r, samples = self._c.rollout, self._c.rollout.samples
        chosen = self._chosen(number * (r.resample + 1) + drawn)[:groups]
        ids = [self._prompts.example(int(self._prompts.first[g])).ids.tolist() for g in chosen]
        seed = int(generator("rollouts", self._c.seed, number, drawn).integers(2**32 - 1))
        columns = [self._prompts.columns[g] for g in chosen for _ in range(samples)]
        made, texts, columns = sample_answers(
            self._engine, self._tokenizer, ids, columns, c=self._c, called=self._tools, samples=samples, seed=seed,
            temperature=r.temperature,
        )  # fmt: skip
        if (made.versions[made.sampled] != number).any():
            raise RuntimeError("a token was sampled by other parameters than those of its round")
        prompts = [prompt for prompt in ids for _ in range(samples)]
        scored = rewards.score(self._rewards, texts, columns)
        total = scored.total + [
            rewards.overlong(int(n), longest=r.tokens, buffer=r.overlong_buffer) for n in made.lengths
        ]
        groups_of = np.repeat(np.arange(len(ids)) + (drawn << 20), samples)
        return Draw(prompts, made, texts, scored._replace(total=total), groups_of)

    def _chosen(self, draw: int) -> np.ndarray:
        """The numbers of a draw's prompts: all prompts in an order drawn for each epoch, one draw after another."""
        count = len(self._prompts)
        places = np.arange(draw * self._groups, (draw + 1) * self._groups)
        orders = {e: generator("prompts", self._c.seed, int(e)).permutation(count) for e in np.unique(places // count)}
        return np.array([orders[place // count][place % count] for place in places])

    def _add_advantages(self, rows: dict[str, np.ndarray], draw: Draw, values_BL: np.ndarray | None) -> None:
        """Write the advantages of sampled tokens into the rows; with a critic also the returns and the old values."""
        r, mask_BL = self._c.rollout, rows["weights"]
        kl_BL = np.where(mask_BL > 0, rows["old"] - rows["reference"], 0)
        scores_B = draw.scored.total
        if r.advantage == "gae":
            if values_BL is None:
                raise UserError("rollout.advantage=gae needs a value head: set --config.model.value_head=True")
            rewards_BL = token_rewards(scores_B, kl_BL, mask_BL, kl_weight=self._kl_weight)
            after_B = np.where(np.array(draw.made.finish) == "length", _value_behind(values_BL, mask_BL), 0.0)
            advantages_BL, returns_BL = generalised_advantages(
                rewards_BL, values_BL, mask_BL, after_B, discount=r.discount, trace=r.trace
            )
            rows["returns"] = returns_BL.astype(np.float32)
            rows["old_values"] = np.where(mask_BL > 0, values_BL, 0).astype(np.float32)
            rows["advantages"] = whiten(advantages_BL, mask_BL).astype(np.float32)
        else:
            scores_B = scores_B - self._kl_weight * kl_BL.sum(axis=1)
            scores_B = np.where(mask_BL.any(axis=1), scores_B, np.nan)  # without a token that is learnt: in no baseline
            made = group_advantages(Rewards(scores_B, draw.groups), baseline=r.advantage, scale=r.scale)
            rows["advantages"] = np.where(mask_BL > 0, made.values[:, None], 0).astype(np.float32)
        if r.kl_target:
            self._kl_weight = adapted_kl_weight(
                self._kl_weight,
                float(kl_BL.sum(axis=1).mean()),
                target=r.kl_target,
                horizon=r.kl_horizon,
                texts=len(mask_BL),
            )

    def _measured(self, rows: Mapping[str, np.ndarray], draw: Draw) -> dict[str, float]:
        """The metrics of a round."""
        mask_BL, total = rows["weights"], draw.scored.total
        scored, lengths = ~np.isnan(total), draw.made.lengths
        ends = np.array(draw.made.finish)
        means = rewards.means(draw.scored)
        parts = {f"rollout/reward{'/' * bool(name)}{name}": mean for name, mean in means.items()}
        return parts | {
            "rollout/reward_std": float(total[scored].std()) if scored.any() else 0.0,
            "rollout/unscored": float((~scored).mean()),
            "rollout/equal_groups": float(np.mean(list(equal_groups(Rewards(total, draw.groups)).values()))),
            "rollout/length": float(lengths.mean()),
            **({"rollout/turns": float(_turns(draw.made).mean())} if self._tools else {}),
            "rollout/longest": float(lengths.max()),
            "rollout/cut": float((ends == "length").mean()),
            "rollout/kl": float((rows["old"] - rows["reference"])[mask_BL > 0].sum() / len(mask_BL)),
            "rollout/kl_weight": self._kl_weight,
            **{f"rollout/{name}": value for name, value in drift_of(rows).items()},
        }

    def _show(self, number: int, draw: Draw, rows: Mapping[str, np.ndarray]) -> None:
        shown = []
        for i in range(0, len(draw.texts), max(1, len(draw.texts) // SHOWN)):
            here = rows["advantages"][i][rows["weights"][i] > 0]
            shown.append(
                {
                    "prompt": self._tokenizer.decode(draw.prompts[i]),
                    "answer": draw.texts[i],
                    "finish": draw.made.finish[i],
                    "reward": None if np.isnan(draw.scored.total[i]) else float(draw.scored.total[i]),
                    "advantage": float(here.mean()) if len(here) else 0.0,
                }
            )
        storage.write_json(self._workdir / "samples" / f"{number:06d}.json", shown)


def sample_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    columns: Sequence[Mapping[str, Any]],
    *,
    c: ConfigDict,
    called: Mapping[str, Tool],
    samples: int,
    seed: int,
    temperature: float,
) -> tuple[Rollouts, list[str], list[Mapping[str, Any]]]:
    """Answers to prompts of ids, their texts, and what rewards read of their rows.

    An answer's text is the model's last turn. With tools, the column "transcript" has everything after the prompt.

    Args:
        columns: of the row of each answer.
        called: the tools, by name.
    """
    r, reply = c.rollout, None
    if called:
        reply = tools.make_reply(tokenizer, called, [row["prompt"] for row in columns], turns=r.turns)
    made = sample_rollouts(
        engine, prompts, samples=samples, max_new_tokens=r.tokens, seed=seed, temperature=temperature, reply=reply
    )
    whole = [row[:n] for row, n in zip(made.tokens, made.lengths, strict=True)]
    begins = [int(np.flatnonzero(~mask[:n])[-1]) + 1 if (~mask[:n]).any() else 0
              for mask, n in zip(made.sampled, made.lengths, strict=True)]  # fmt: skip
    texts = [tokenizer.decode(ids[begin:].tolist()) for ids, begin in zip(whole, begins, strict=True)]
    if called:
        transcripts = [tokenizer.decode(ids.tolist()) for ids in whole]
        columns = [{**row, "transcript": text} for row, text in zip(columns, transcripts, strict=True)]
    return made, texts, list(columns)


def _turns(made: Rollouts) -> np.ndarray:
    """The turns of the model in each text, (S,): stretches of sampled tokens."""
    return (np.diff(made.sampled.astype(np.int8), axis=1, prepend=0) > 0).sum(axis=1)


def _value_behind(values_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """The value at the place behind each text's last sampled token, or the last one where the row ends there."""
    last_B = mask_BL.shape[1] - 1 - np.argmax(mask_BL[:, ::-1] > 0, axis=1)
    return np.take_along_axis(values_BL, np.minimum(last_B + 1, values_BL.shape[1] - 1)[:, None], axis=1)[:, 0]
