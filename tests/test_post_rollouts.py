"""Rounds of samples: every number of a row belongs to the token that was sampled, with an engine that says what it is told."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, first_params, mesh_of, tiny_config
from ml_collections import ConfigDict
from test_acceptance import store

from llmjax.data.examples import Example
from llmjax.data.packing import packed
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer.engine import Engine
from llmjax.infer.request import Completion
from llmjax.infer.rollout import sample_rollouts
from llmjax.model import transformer
from llmjax.post import policies, rewards
from llmjax.post.draws import Draw, drift_of, from_kept, rows_of, to_keep
from llmjax.post.rollouts import Forward, RolloutSource, check_drift

OURS = byte_tokenizer()
PROMPT = [OURS.bos_id, *OURS.encode("2+3=")]


class Scripted:
    """An engine that writes the same texts for each prompt, one after another, with -1 nats a token."""

    def __init__(self, texts: Sequence[tuple[Sequence[int], str]]) -> None:
        self.texts, self.waiting, self.version, self.asked = texts, [], 0, []  # type: ignore[var-annotated]

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def load(self, params: Any, *, version: int) -> None:
        self.version = version

    def release(self) -> None:
        assert not self.waiting

    def submit(self, request: Mapping[str, Any], *, name: str) -> int:
        self.waiting.append(len(self.asked))
        self.asked.append(request)
        return len(self.asked) - 1

    def run(self) -> Iterator[tuple[int, Completion]]:
        while self.waiting:
            number = self.waiting.pop()  # the last one ends first
            ids, finish = self.texts[self.asked[number]["number"] % len(self.texts)]
            yield number, Completion("", "", finish, tuple(ids), (0.0,) * len(ids), (), (-1.0,) * len(ids))


def settings(**changes: Any) -> ConfigDict:
    given = {
        "data__format": "conversations", "objective__name": "policy", "rollout__samples": 2, "rollout__updates": 2,
        "rollout__tokens": 8, "train__batch_size": 2, "train__sequence_length": 24,
    }  # fmt: skip
    return tiny_config(**(given | changes))


def source(
    c: ConfigDict, folder: Path, texts: Sequence[tuple[Sequence[int], str]], prompt: Sequence[int] = PROMPT
) -> RolloutSource:
    example = Example(np.array(prompt, np.int32), np.zeros(len(prompt), np.float32))
    prompts = dataclasses.replace(store([[example], [example]]), columns=[{"prompt": "2+3="}] * 2)

    def forward(params: Any, rows: Mapping[str, np.ndarray]) -> Forward:
        return Forward(np.full(rows["tokens"].shape, -1.0, np.float32), None)

    return RolloutSource(
        c, folder, engine=Scripted(texts), tokenizer=OURS, prompts=prompts, forward=forward,  # type: ignore[arg-type]
        functions={"length": rewards.Reward(lambda answers, rows: [float(len(a)) for a in answers], 1.0)},
    )  # fmt: skip


END = OURS.eos_id
FIVE, LONGER = [*OURS.encode("5"), END], [*OURS.encode("55"), END]


def test_G10_the_trainers_ids_are_the_samplers_also_where_their_text_would_be_encoded_in_another_way(tmp_path):
    odd = [OURS.encode("h")[0], 255 + 4, 3 + 4, END]  # bytes that are no text
    assert OURS.encode(OURS.decode(odd)) != odd[:-1]
    batch = source(settings(rollout__updates=1, train__batch_size=4), tmp_path, [(odd, "eos"), (FIVE, "eos")]).batch(
        0, None
    )
    learnt = batch["targets"][0][batch["weights"][0] > 0]
    assert learnt.tolist() == odd
    assert batch["tokens"][0][: len(PROMPT)].tolist() == PROMPT


def test_S13_only_sampled_tokens_are_learnt_whatever_the_prompt_holds(tmp_path):
    prompt = [*PROMPT, *FIVE, *PROMPT]  # an answer of the assistant in the prompt
    batch = source(settings(), tmp_path, [(FIVE, "eos"), (LONGER, "eos")], prompt).batch(0, None)
    assert batch["weights"].sum(axis=1).tolist() == [2, 3]
    assert (np.argmax(batch["weights"] > 0, axis=1) == len(prompt) - 1).all()


def test_G2_a_text_without_a_learnt_token_is_in_no_baseline_and_leaves_its_sibling_at_0(tmp_path):
    texts = [([*OURS.encode("5" * 8)], "length"), (FIVE, "eos")]
    c = settings(rollout__mask_cut=True, rollout__updates=1, train__batch_size=4)
    with pytest.raises(UserError, match="no prompt has two scored texts"):
        source(c, tmp_path, texts).batch(0, None)
    c = settings(rollout__mask_cut=True, rollout__updates=1, train__batch_size=6, rollout__samples=3)
    batch = source(c, tmp_path, [*texts, (LONGER, "eos")]).batch(0, None)
    of_text = [float(row[mask > 0][0]) if mask.any() else 0.0
               for row, mask in zip(batch["advantages"], batch["weights"], strict=True)]  # fmt: skip
    assert of_text == [0.0, -0.5, 0.5] * 2  # lengths 1 and 2: the cut text's 8 is not in their mean


def test_G11_every_token_has_the_version_that_sampled_it_and_others_have_none():
    engine = Scripted([(FIVE, "eos"), (LONGER, "eos")])
    engine.load(None, version=7)
    replies: list[tuple[int, list[int]]] = []

    def reply(number: int, ids: Sequence[int]) -> list[int] | None:
        replies.append((number, list(ids)))
        return [9, 9] if number == 0 and len(ids) == 2 else None

    made = sample_rollouts(engine, [PROMPT], samples=2, max_new_tokens=8, seed=0, reply=reply)  # type: ignore[arg-type]
    assert made.tokens[0].tolist() == [*FIVE, 9, 9, *FIVE, 0, 0] and made.lengths.tolist() == [6, 3]
    assert made.versions[0].tolist() == [7, 7, -1, -1, 7, 7, -1, -1]
    assert made.log_probs[0].tolist() == [-1, -1, 0, 0, -1, -1, 0, 0]
    assert (made.sampled == (made.versions == 7)).all()
    assert engine.asked[-1]["ids"] == (*PROMPT, *FIVE, 9, 9) and engine.asked[-1]["max_new_tokens"] == 4
    # A reply that leaves no room ends the text, as one that was cut.
    made = sample_rollouts(engine, [PROMPT], samples=2, max_new_tokens=4, seed=0, reply=reply)  # type: ignore[arg-type]
    assert made.finish == ("length", "eos") and made.lengths.tolist() == [2, 3]


def test_a_round_is_kept_without_its_padding_and_comes_back_bit_for_bit(tmp_path):
    texts = [(FIVE, "eos"), (LONGER, "eos")]
    c = settings(rollout__updates=4, train__sequence_length=512)
    ours, again = source(c, tmp_path, texts), source(c, tmp_path, texts)
    ours.batch(0, None)
    kept = ours.state()
    again.restore(kept)
    for k in (1, 2, 3):
        assert_same_bits(again.batch(k, None), ours.batch(k, None))
    assert again.state() == {} == ours.state()
    assert sum(x.nbytes for x in kept.values()) < 600  # of 6 rows of 512 places with nine numbers each
    with pytest.raises(UserError, match="lacks the sampled texts"):
        source(c, tmp_path, texts).batch(1, None)


def test_rows_come_back_whatever_they_hold():
    rng = np.random.default_rng(0)
    for largest in (300, 70_000):
        ids = [np.append(rng.integers(1, largest, n), largest).astype(np.int32) for n in (3, 11, 7)]
        made = [
            packed([Example(one, np.r_[0, rng.integers(0, 2, len(one) - 1)].astype(np.float32))], length=16)
            for one in ids
        ]
        rows = {name: np.stack([row[name] for row in made]) for name in made[0]} | {
            "exists": np.ones((3, 1), np.float32)
        }
        for name in ("sampler", "returns"):
            rows[name] = np.where(rows["weights"] > 0, rng.normal(size=(3, 16)), 0).astype(np.float32)
        assert_same_bits(from_kept(to_keep(rows), length=16), rows)
    rows["weights"][:], rows["sampler"][:], rows["returns"][:] = 0, 0, 0  # nothing is learnt
    assert_same_bits(from_kept(to_keep(rows), length=16), rows)


def test_G6_samples_follow_the_models_own_distribution_and_end_at_any_stop_id():
    c = tiny_config(model__layers=1, model__width=16, model__heads=2, model__mlp_width=32)
    module = transformer.build(c.model)
    params = jax.tree.map(lambda x: x * 8, first_params(module))
    engine = Engine(module, params, OURS, slots=64, length=16)
    made = sample_rollouts(engine, [PROMPT], samples=1500, max_new_tokens=1, seed=1)
    first = made.tokens[:, 0]
    logits = np.array(jax.jit(module.apply)({"params": params}, np.array([PROMPT]))[0, -1], np.float64)
    allowed = np.arange(len(logits)) < OURS.vocab_size
    allowed[list(OURS.unsampled_ids)] = False
    chances = np.where(allowed, np.exp(logits - logits[allowed].max()), 0)
    chances /= chances.sum()
    assert not np.isin(first, np.flatnonzero(~allowed)).any()
    np.testing.assert_allclose(made.log_probs[:, 0], np.log(chances[first]), atol=2e-5)
    counts = np.bincount(first, minlength=len(logits))
    often = chances * 1500 >= 5
    expected = np.append(chances[often], chances[~often].sum()) * 1500
    seen = np.append(counts[often], counts[~often].sum())
    square, freedom = float(((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()), len(seen) - 1
    assert square < freedom + 4 * np.sqrt(2 * freedom)  # far beyond the 99th percentile
    stop = int(np.bincount(first).argmax())
    ended = sample_rollouts(engine, [PROMPT], samples=32, max_new_tokens=4, seed=1, stop_ids=(stop,))
    at = ended.tokens[ended.tokens[:, 0] == stop]
    assert len(at) and (at[:, 1:] == 0).all() and "stop" in ended.finish


def test_drift_between_sampler_and_trainer_ends_a_run_in_float32(tmp_path):
    ours = source(settings(), tmp_path, [(FIVE, "eos"), (LONGER, "eos")])
    ours._forward = lambda params, rows: Forward(np.full(rows["tokens"].shape, -1.001, np.float32), None)
    with pytest.raises(RuntimeError, match="they are not the same model"):
        ours.batch(0, None)


@pytest.mark.slow
def test_a_round_has_the_same_tokens_and_no_drift_on_every_mesh():
    found: dict[str, np.ndarray] = {}
    for line in ("data=1", "data=2", "fsdp=2", "tensor=2", "pipeline=2", "context=2"):
        c = settings(parallel__mesh=line, train__batch_size=4, train__sequence_length=16, rollout__slots=4,
                     objective__policy__temperature=1.0, objective__policy__never=OURS.unsampled_ids, objective__vocab_size=OURS.vocab_size)  # fmt: skip
        mesh, module = mesh_of(line), transformer.build(c.model)
        places = policies.abstract_params(c, module, mesh)
        params = jax.tree.map(
            lambda x, like: jax.device_put(np.asarray(x), like.sharding), first_params(module), places
        )
        engine = policies.make_engine(c, module, OURS, mesh, length=16)
        engine.load(params)
        made = sample_rollouts(engine, [PROMPT], samples=4, max_new_tokens=8, seed=0)
        draw = Draw([PROMPT] * 4, made, [""] * 4, rewards.Scored(np.zeros(4), {}), np.zeros(4))
        rows = rows_of(draw, length=16, mask_cut=False)
        rows["old"] = policies.make_forward(c, module, mesh)(params, rows).log_probs
        assert drift_of(rows)["drift_max"] < 2e-5, line
        np.testing.assert_array_equal(made.tokens, found.setdefault("data=1", made.tokens), err_msg=line)


def test_rounding_ends_no_run_and_other_weights_do():
    """2.8e-5 nats ended a run of 3M parameters, whose rounds differ by at most 2e-5 as a rule."""
    old_BL = np.full((2, 4), -3.0, np.float32)
    check_drift(old_BL, old_BL + np.float32(2.8e-5))
    for wrong in (0.01, np.nan):
        sampler_BL = old_BL.copy()
        sampler_BL[1, 2] += wrong
        with pytest.raises(RuntimeError, match="not the same model"):
            check_drift(old_BL, sampler_BL)
