"""Public bugs of other post-training codes, each as a test that fails with the bug.

The rows are those of a list of such bugs: S masks and data, L the scale of the loss, P preferences and rewards, G
policies, A adapters and exports, O operations. `WHERE` says which test holds which row.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import CONVERSATIONS, TEMPLATES, TOOLS, chat_tokenizer
from helpers import few, mesh_of, prepare_steps, tiny_config
from ml_collections import ConfigDict

from llmjax import config
from llmjax.data.chat import chat_ids
from llmjax.data.conversations import Row, RowError
from llmjax.data.examples import Example, examples_of, prompt_ids
from llmjax.data.packing import packed
from llmjax.data.tokenizer import Tokenizer, byte_tokenizer
from llmjax.errors import UserError
from llmjax.infer.chat import Chat
from llmjax.model import transformer
from llmjax.objectives import OBJECTIVES, reward
from llmjax.objectives.log_probs import log_probs
from llmjax.objectives.losses import Predictions
from llmjax.objectives.preference import LOSSES, Answers
from llmjax.post import batches, heldout, rows
from llmjax.post.rows import Group
from llmjax.recipe import stages

HERE = Path(__file__).parent
# Row -> the file, and the tests in it whose names begin so.
WHERE = {
    "S1": "test_acceptance.py::test_S1",
    "S2": "test_acceptance.py::test_S2",
    "S3": "test_examples.py::test_every_turn_is_learnt_from_its_prompts_end_to_its_stop_token",
    "S4": "test_acceptance.py::test_S4",
    "S5": "test_acceptance.py::test_S5",
    "S6": "test_acceptance.py::test_S6",
    "S7": "test_acceptance.py::test_S7",
    "S8": "test_examples.py::test_marks_in_what_a_user_writes_move_no_mask",
    "S9": "test_acceptance.py::test_S9",
    "S10": "test_model.py::test_packed_documents_have_the_logits_that_each_has_alone",
    "S11": "test_acceptance.py::test_S11",
    "S12": "test_acceptance.py::test_S12",
    "S13": "test_post_rollouts.py::test_S13",
    "L1": "test_acceptance.py::test_L1",
    "L2": "test_acceptance.py::test_L2",
    "L3": "test_packing.py::test_the_weight_of_a_row_is_its_tokens_less_one_a_document",
    "L4": "test_policy_losses.py::test_padding_and_repetition_leave_the_constant_aggregation_alone",
    "L5": "test_chunked_loss.py::test_loss_and_gradients_by_chunks",
    "P1": "test_acceptance.py::test_P1_P2_P3_P4_P8",
    "P2": "test_acceptance.py::test_P1_P2_P3_P4_P8",
    "P3": "test_acceptance.py::test_P1_P2_P3_P4_P8",
    "P4": "test_acceptance.py::test_P1_P2_P3_P4_P8",
    "P5": "test_acceptance.py::test_P5",
    "P6": "test_unpaired.py::test_P6",
    "P7": "test_acceptance.py::test_P7",
    "P8": "test_acceptance.py::test_P8",
    "G1": "test_advantages.py::test_groups_are_told_by_ids",
    "G2": "test_post_rollouts.py::test_G2",
    "G3": "test_advantages.py::test_groups_of_one_are_refused",
    "G4": "test_advantages.py::test_advantages_are_not_normalised_twice",
    "G5": "test_acceptance.py::test_G5",
    "G6": "test_post_rollouts.py::test_G6",
    "G7": "test_acceptance.py::test_G7",
    "G8": "test_policy_losses.py::test_a_loss_stays_finite_and_its_kl_metric_raw",
    "G9": "test_post_rewards.py::test_G9",
    "G10": "test_post_rollouts.py::test_G10",
    "G11": "test_post_rollouts.py::test_G11",
    "A1": "test_adapters_peft.py::test_A1_adapters_of_peft",
    "A2": "test_adapters.py::test_A1_A2_merged_computes",
    "A3": "test_adapters.py::test_A3",
    "A4": "test_adapters_peft.py::test_A4",
    "A5": "test_adapters.py::test_A5",
    "A6": "test_cpt.py::test_new_rows_are_the_mean_of_their_parts",
    "O1": "test_post.py::test_sampler_and_trainer_agree_and_a_run_that_stops_inside_a_round_ends_in_the_same_bits",
    "O2": "test_post.py::test_a_base_model_is_taught_and_is_a_run_like_any_other",
    "O3": "test_acceptance.py::test_O3",
}


def test_every_row_of_the_list_has_its_test():
    assert len(WHERE) == 46
    for row, where in WHERE.items():
        file, _, name = where.partition("::")
        assert name and re.search(rf"^def {name}", (HERE / file).read_text(), re.MULTILINE), row


# ---------------------------------------------------------------- S: masks and data

STOPS = {"chatml": "<|im_end|>", "thoughts": "<|im_end|>", "headers": "<|eot_id|>", "turns": "<end_of_turn>",
         "roles": "<|end|>", "generation": "<|im_end|>", "documents": "<|im_end|>"}  # fmt: skip
SYSTEM, USER = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
REPLY, AGAIN = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        made = chat_tokenizer(Path(folder), name, "bytes")
    return dataclasses.replace(made, more_eos_ids=(made.control_ids[STOPS[name]],) if name in STOPS else ())


def taught(ours: Tokenizer, messages: Sequence[dict[str, Any]], **given: Any) -> list[Example]:
    return examples_of(ours, Row([], (list(messages),), **given))


def test_S1_the_tokens_masks_and_segments_of_six_conversations_are_the_golden_ones():
    """A rewrite that trains another token, or loses the mask, changes the file."""
    conversations = {
        "one turn": [USER, REPLY],
        "system": [SYSTEM, USER, REPLY],
        "many turns": [USER, REPLY, AGAIN, REPLY],
        "tools": [*CONVERSATIONS["calls"], REPLY],
        "thoughts": CONVERSATIONS["answers"][1:],
        "empty answer": [USER, {"role": "assistant", "content": ""}, AGAIN, REPLY],
    }
    ours, made = tokenizer("chatml"), {}
    for name, messages in conversations.items():
        tools = TOOLS if name == "tools" else None
        row = packed(taught(ours, messages, tools=tools), length=400)
        size = int((row["segments"] > 0).sum())
        made[name] = {key: row[key][:size].astype(int).tolist() for key in ("tokens", "weights", "segments")}
    file = HERE / "golden" / "masks.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in made.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert made == json.loads(file.read_text())


def store(examples: Sequence[Sequence[Example]], *, ranks: Sequence[float] = (0.0, 1.0, 2.0)) -> rows.Store:
    """A store with a group for each list of examples."""
    with tempfile.TemporaryDirectory() as folder:
        groups = [Group(list(group), list(ranks[: len(group)]), 0.0, {}) for group in examples]
        rows.save(Path(folder) / "rows", "train", groups)
        return rows.load(Path(folder), "train")


def test_S2_packed_or_not_every_template_trains_the_same_tokens_and_never_all_of_them():
    for name in TEMPLATES:
        examples = taught(tokenizer(name), [USER, REPLY, AGAIN, REPLY])
        for example in examples:
            assert 0 < example.weights.sum() < len(example.ids), name
        sums = []
        for pack in (False, True):
            c = tiny_config(train__sequence_length=600, data__pack=pack, data__format="conversations")
            made = batches.rows_of(store([[example] for example in examples * 3]), c)
            sums.append(sum(batches.row(made, i, c)["weights"].sum() for i in range(len(made.groups))))
        assert sums[0] == sums[1] == 3 * sum(example.weights.sum() for example in examples), name


def test_S4_what_is_not_trained_is_the_prompt_exactly():
    ours = tokenizer("chatml")
    for asked in ("?", "what is it", "a longer question, with more to read"):
        messages = [{"role": "user", "content": asked}, REPLY]
        (example,) = taught(ours, messages)
        prompt = chat_ids(ours, messages[:1], reply=True)
        assert example.prompt_tokens == len(prompt)
        assert (example.weights[len(prompt) :] == 0).sum() == 1  # the line's end behind the stop token


@pytest.mark.parametrize("said", ["yes", "<think>\nhm\n</think>\n\nyes"])
def test_S5_a_prompt_and_what_is_sampled_after_it_are_the_ids_of_the_conversation(said):
    """A template that opens a thought for the model must not open a second one around what was sampled."""
    for name, variables in (("chatml", {}), ("thoughts", {"enable_thinking": said != "yes"})):
        ours = tokenizer(name)
        asked = prompt_ids(ours, Row([USER], variables=variables))
        sampled = [*ours.encode(said, specials="parse" if name == "thoughts" else "text"), ours.eos_ids[-1]]
        (example,) = examples_of(ours, Row([USER], ([{"role": "assistant", "content": said}],), variables=variables))
        assert example.ids[: len(asked) + len(sampled)].tolist() == asked + sampled, name


def test_S6_odd_conversations_are_masked_or_counted_and_never_end_the_stage(tmp_path):
    shapes = (
        [USER, REPLY],
        [USER, REPLY, AGAIN, REPLY],
        [USER, REPLY, REPLY],
        [USER, REPLY, AGAIN],
        [SYSTEM, USER, REPLY],
    )
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in shapes))
    for name in TEMPLATES:
        counts = rows_stage(tmp_path / name, file, tokenizer(name), data__rejected_percent=100.0)
        assert counts["rows"] == len(shapes) and counts["train_learnt_tokens"] > 0, name
        reasons = (tmp_path / name / "rows" / "rejected.jsonl").read_text().splitlines()
        assert len(reasons) == counts["rejected"] < len(shapes), name
    assert counts["rejected"] == 0
    refused = json.loads((tmp_path / "turns" / "rows" / "rejected.jsonl").read_text())
    assert refused["row"] == 5 and "no system role" in refused["reason"]


def rows_stage(workdir: Path, file: Path, ours: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The counts of the rows stage for a file, with this tokenizer."""
    changes = {"data__format": "conversations", "data__holdout_percent": 0.0, "train__sequence_length": 256} | changes
    c = tiny_config(**changes)
    c.data.sources = (str(file),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "tokenizer_of", lambda c: ours)
        return rows.run(c, workdir)


def test_S7_a_text_that_begins_with_the_name_of_bos_gets_one_bos_however_the_template_writes_it():
    ours = tokenizer("turns")
    literal = dataclasses.replace(ours, chat_template=ours.chat_template.replace("{{ bos_token }}", "<s>"))
    for made in (ours, literal):
        (example,) = taught(made, [{"role": "user", "content": "<s>hello"}, REPLY])
        assert example.ids.tolist().count(made.bos_id) == 1 and example.ids[0] == made.bos_id


def test_S9_conversations_longer_than_a_row_are_counted_and_alone_they_are_an_error(tmp_path):
    file, ours = tmp_path / "long.jsonl", byte_tokenizer()
    long = [{"prompt": "long", "completion": "x" * 300}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in [*long, {"prompt": "short", "completion": "y"}]))
    assert rows_stage(tmp_path / "some", file, ours)["too_long"] == 3
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    with pytest.raises(
        UserError, match="nothing is left to train on: of 3 rows 0 were left out and 3 texts are longer"
    ):
        rows_stage(tmp_path / "none", file, ours)
    assert not (tmp_path / "none" / "rows").exists()


def test_S11_a_conversation_is_cut_by_its_oldest_turn_when_it_is_one_token_too_long_and_not_before():
    ours = tokenizer("chatml")
    turns = [
        {"role": "user", "content": "a" * 30},
        {"role": "assistant", "content": "b" * 30},
        {"role": "user", "content": "c" * 20},
    ]
    whole = len(chat_ids(ours, [SYSTEM, *turns], reply=True))

    class Limited:
        tokenizer, limit = ours, whole + 8

    chat = Chat(Limited(), {"max_new_tokens": 8}, print, system=SYSTEM["content"], messages=list(turns))  # type: ignore[arg-type]
    assert len(chat.prompt()) == whole
    Limited.limit -= 1
    assert chat.prompt() == chat_ids(ours, [SYSTEM, turns[2]], reply=True)


def test_S12_rows_are_made_anew_when_what_they_depend_on_changes():
    base = tiny_config(data__format="conversations")
    before = stages.dependencies(base, "rows", files="digest")
    changes = {"data__turns": "last", "data__chat_template": "other.jinja", "tokenizer__path": "another", "train__sequence_length": 32,
               "train__init_from": "another", "rollout__tools": ("math:sqrt",), "objective__name": "preference"}  # fmt: skip
    for key, value in changes.items():
        c = tiny_config(data__format="conversations", **{key: value})
        assert stages.dependencies(c, "rows", files="digest") != before, key
    assert stages.dependencies(base, "rows", files="of another template") != before


def test_an_answer_that_is_labelled_bad_is_not_learnt():
    with pytest.raises(RowError, match="labelled as bad"):
        rows.groups_of(byte_tokenizer(), Row("1+1=", ("3",), good=False), tiny_config(data__format="conversations"))


# ---------------------------------------------------------------- a tiny problem for every objective

LENGTH, V = 32, 320


def setting(name: str, **changes: Any) -> ConfigDict:
    """A model of one small layer, an objective and plain gradient descent."""
    given = {
        "data__format": "text" if name == "causal" else "conversations", "objective__name": name,
        "model__layers": 1, "model__width": 16, "model__heads": 2, "model__mlp_width": 32, "optimizer__name": "sgd",
        "train__sequence_length": LENGTH, "objective__policy__length": LENGTH,
        "objective__policy__temperature": 1.0,
        "model__value_head": name == "reward", "objective__vocab_size": V,
    }  # fmt: skip
    return tiny_config(**(given | changes))


def examples(lengths: Sequence[tuple[int, int]], *, ending: bool = False) -> list[Example]:
    """Texts of (prompt, answer) tokens; `ending` repeats the last one, as examples that are scored there have it."""
    rng, made = np.random.default_rng(5), []
    for prompt, answer in lengths:
        ids = rng.integers(4, 60, prompt + answer + 1).astype(np.int32)
        ids[-1] = ids[-2]
        weights = np.r_[np.zeros(prompt), np.ones(answer), 0].astype(np.float32)
        made.append(Example(ids, weights) if ending else Example(ids[:-1], weights[:-1]))
    return made


LENGTHS = [(3, 2), (2, 9), (4, 15), (5, 1), (2, 4), (1, 3), (6, 7), (3, 12)] * 2


def batch_of(c: ConfigDict) -> dict[str, np.ndarray]:
    """Eight rows of unequal texts, some packed, as the objective of `c` reads them."""
    name, rng = c.objective.name, np.random.default_rng(3)
    if name == "policy":
        made = [packed([example], length=c.train.sequence_length) for example in examples(LENGTHS[:8], ending=True)]
        batch = batches.stacked(made)
        mask = batch["weights"] > 0
        noise = {
            key: rng.normal(size=mask.shape)
            for key in ("old", "reference", "sampler", "advantages", "returns", "old_values")
        }
        batch |= {key: np.where(mask, values - 4 * (key in ("old", "reference", "sampler")), 0).astype(np.float32)
                  for key, values in noise.items() if c.model.value_head or key not in ("returns", "old_values")}  # fmt: skip
        return batch | {"exists": np.ones((8, 1), np.float32)}
    pairs = examples(LENGTHS, ending=name == "reward")
    groups = [pairs[i : i + 2] for i in range(0, 16, 2)] if name != "causal" else [[one] for one in pairs[:8]]
    kept = store(groups)
    reference = rng.normal(size=len(kept.sizes)).astype(np.float32) - 20
    made = batches.rows_of(kept, c, reference=reference if name == "preference" else None)
    return batches.stacked([batches.row(made, i, c) for i in range(8)])


CASES = {
    "policy token": setting("policy", objective__policy__aggregate="token", objective__policy__kl_weight=0.1),
    "preference": setting("preference"),
    "supervised": setting("causal", data__format="conversations"),
    "reward": setting("reward", objective__reward__centre=0.1),
    "policy sequence": setting("policy", objective__policy__aggregate="sequence", objective__policy__level="sequence"),
    "ppo": setting("policy", objective__policy__aggregate="token", model__value_head=True),
    "policy constant": setting("policy"),
    "policy sequence_sum": setting("policy", objective__policy__aggregate="sequence_sum", objective__policy__loss="cispo"),
    "preference ipo and sft": setting("preference", objective__preference__loss="ipo=1 sft=0.5"),
}  # fmt: skip


CUTS = [("data=2", 2), ("data=1", 4), ("fsdp=2", 1), ("tensor=2", 2)]  # mesh and micro-batches
# The first case of both is always tested, then every case of SLOW and every cut once, and at last all pairs.
SLOW = 5  # the cases of other losses, whose sums are made in the same places, are exhaustive
PAIRS = sorted(
    itertools.product(range(len(CASES)), range(len(CUTS))), key=lambda pair: (min(pair) > 0 or pair[0] >= SLOW, pair)
)


@pytest.mark.parametrize(
    ("case", "line", "parts"),
    few([(list(CASES)[i], *CUTS[j]) for i, j in PAIRS], slow=SLOW + len(CUTS) - 2),
)
def test_L1_any_cut_into_micro_batches_and_devices_gives_the_same_step(case, line, parts):
    c = CASES[case]
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    whole, wanted = run(state, batch_of(c))
    c = c.copy_and_resolve_references()
    c.train.micro_batches = parts
    state, _, run = prepare_steps(c, mesh_of(line))
    made, found = run(state, batch_of(c))
    for name in wanted:
        assert np.isfinite(wanted[name]), name
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), made.params, whole.params)


def test_L2_a_step_whose_last_parts_are_padding_is_the_step_of_the_others():
    c = CASES["policy token"]
    state, _, run = prepare_steps(c, mesh_of("data=1"))
    batch = batch_of(c)
    _, wanted = run(state, {**batch, "weights": batch["weights"] * (np.arange(8) < 4)[:, None].astype(np.float32)})
    _, found = run(state, {name: np.concatenate([x[:4], x[:4]]) for name, x in batch.items()})  # the same mean twice
    for name in ("loss", "grad_norm", "ratio"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


# ---------------------------------------------------------------- P: preferences and rewards


@functools.cache
def params_of(name: str) -> Any:
    module = transformer.build(CASES[name].model)
    rng = np.random.default_rng(0)
    shapes = transformer.param_shapes(module)
    return module, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), shapes)


@functools.cache
def program(case: str, loss: str) -> Any:
    module, _ = params_of(case)
    c = CASES[case].copy_and_resolve_references()
    c.objective.preference.loss = loss

    def of(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        sums = OBJECTIVES[c.objective.name](module, params, batch, None, c.objective)
        return sums.objective / sums.weight, {name: mean.total / mean.weight for name, mean in sums.metrics.items()}

    return jax.jit(jax.grad(of, has_aux=True))


def sums_of(case: str, batch: dict[str, np.ndarray], *, loss: str = "sigmoid") -> tuple[dict[str, float], Any]:
    """The means of an objective's metrics over a batch, and the gradient of its mean."""
    grads, metrics = program(case, loss)(params_of(case)[1], batch)
    found = {name: float(value) for name, value in metrics.items()}
    assert np.isfinite(list(found.values())).all(), found
    return found, grads


def nats_alone(example: Example) -> float:
    """The log-probability of an answer after its prompt, computed alone by a plain forward pass."""
    module, params = params_of("preference")
    ids = np.pad(example.ids, (0, LENGTH - len(example.ids)))  # what follows is not seen
    logits_LV = jax.jit(module.apply)({"params": params}, ids[None])[0]
    nats_L = np.asarray(jax.nn.log_softmax(logits_LV))[np.arange(len(example.ids) - 1), example.ids[1:]]
    return float((nats_L * example.weights[1:]).sum())


PAIRS = examples([(3, 2), (3, 9), (4, 3), (4, 5)])


def pair_rows(c: ConfigDict, *, pack: bool) -> tuple[batches.Rows, np.ndarray]:
    with c.unlocked():
        c.data.pack = pack
    module, params = params_of("preference")
    made = batches.rows_of(store([PAIRS[:2], PAIRS[2:]]), c)
    return made, heldout.reference_log_probs(c, module, params, made, mesh_of("data=1"))


def test_P1_P2_P3_P4_P8_pairs_give_the_same_numbers_packed_and_padded():
    """Each answer's log-probability is that of the answer alone, and a model equals itself at the first step."""
    found, alone = {}, [nats_alone(example) for example in PAIRS]
    ratios, lengths = np.float32([1, 2, 0, 5]), np.float32([2, 9, 3, 5])  # the second is what the answers have
    chosen, rejected = (Answers(ratios[i::2], np.zeros(2, np.float32), lengths[i::2]) for i in (0, 1))
    for pack in (True, False):
        c = setting("preference", train__batch_size=2)
        made, reference = pair_rows(c, pack=pack)
        assert len(made.groups) == (1 if pack else 2)
        np.testing.assert_allclose(reference, alone, rtol=1e-5)
        still, moved = (
            batches.stacked([batches.row(dataclasses.replace(made, reference=one), i, c) for i in range(2)])
            for one in (reference, reference - ratios)
        )
        at_first, _ = sums_of("preference", still)
        assert at_first["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(at_first["margin"]) < 1e-6
        found[pack] = sums_of("preference", moved)
        for name in ("sigmoid", "ipo") if pack else ("sigmoid",):
            wanted = float(jnp.mean(LOSSES[name](chosen, rejected, c.objective.preference)))
            assert sums_of("preference", moved, loss=name)[0]["loss"] == pytest.approx(wanted, rel=1e-4), name
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5, abs=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found[True][1], found[False][1])


def test_P5_pairs_that_are_too_long_on_either_side_are_counted_and_alone_they_are_an_error(tmp_path):
    file, ours = tmp_path / "pairs.jsonl", byte_tokenizer()
    long = [
        {"prompt": "a", "chosen": "x" * 300, "rejected": "n"},
        {"prompt": "b", "chosen": "y", "rejected": "x" * 300},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*long, {"prompt": "c", "chosen": "y", "rejected": "n"}]))
    counts = rows_stage(tmp_path / "some", file, ours, objective__name="preference")
    assert counts["too_long"] == 2 and counts["train_groups"] == 1
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    with pytest.raises(UserError, match="nothing is left to train on"):
        rows_stage(tmp_path / "none", file, ours, objective__name="preference")


def test_P7_the_score_of_an_answer_is_read_at_its_last_token_whatever_pads_the_row():
    plain = byte_tokenizer()
    for ours in (plain, dataclasses.replace(plain, pad_id=plain.eos_id)):
        c = setting("reward")
        asked = Row("ask", ("one", "another"), ranks=(0.0, 1.0))
        made = batches.rows_of(store([group.examples for group in rows.groups_of(ours, asked, c)]), c)
        row = batches.row(made, 0, c)
        ends = [row["tokens"][place] for place in row["last"][:2]]
        assert ends == [ours.end_id] * 2
        assert row["segments"][row["last"][:2]].tolist() == [1, 2]
        assert (row["segments"][row["last"][:2] + 1] != [1, 2]).all()  # nothing of the answer follows
        row["tokens"][row["segments"] == 0] = ours.eos_id
        found = scores_of(batches.stacked([row]))[0]
        for number, text in enumerate(("one", "another")):
            (one,) = rows.groups_of(ours, Row("ask", (text, text), ranks=(0.0, 1.0)), c)
            alone = batches.row(batches.rows_of(store([one.examples]), c), 0, c)
            np.testing.assert_allclose(found[number], scores_of(batches.stacked([alone]))[0][0], rtol=1e-5)
            plain = [*ours.prefix_ids, *ours.encode("ask" + text), ours.end_id]
            assert one.examples[0].ids.tolist() == [*plain, ours.end_id]  # the last one is only read as a target


@jax.jit
def scores_of(batch: dict[str, Any]) -> jax.Array:
    module, params = params_of("reward")
    params = {**params, "value": jax.tree.map(lambda x: jnp.full_like(x, 0.1), params["value"])}
    return reward.scores(module, params, batch, None)[0]


def test_P8_dropout_that_would_move_a_model_from_its_reference_is_refused():
    for verb in ("dpo", "grpo"):
        with pytest.raises(UserError, match="set model.dropout and its like to 0"):
            config.load(f"configs/post/{verb}.py", overrides=["model.dropout=0.1"])
    config.load("configs/post/dpo.py", overrides=["model.dropout=0.1", "objective.preference.loss='simpo'"])


# ---------------------------------------------------------------- G: policies


def test_G5_the_kl_is_taken_from_the_reward_or_from_the_loss_and_never_from_both():
    with pytest.raises(UserError, match="the KL is either in the reward"):
        config.load("configs/post/grpo.py", overrides=["rollout.kl_weight=0.1", "objective.policy.kl_weight=0.1"])


def test_G7_rows_that_pad_the_vocabulary_and_ids_that_are_never_sampled_have_no_probability():
    rng, V, known, never = np.random.default_rng(0), 12, 9, (0, 3)
    logits = jnp.asarray(rng.normal(size=(V, 1, V)), jnp.float32)  # the same distribution for every target

    def head(params: Any, hidden_BLD: jax.Array, **_: Any) -> jax.Array:
        return hidden_BLD

    logits = jnp.broadcast_to(logits[:1], logits.shape)
    made = log_probs_of(logits, np.arange(V)[:, None], vocab_size=known, never=never)
    allowed = [i for i in range(known) if i not in never]
    assert np.exp(made[allowed]).sum() == pytest.approx(1, abs=1e-6)
    assert all(made[i] == -np.inf for i in range(V) if i not in allowed)


def log_probs_of(logits_BLV: jax.Array, targets_BL: np.ndarray, **given: Any) -> np.ndarray:
    """`log_probs` of targets under given logits: of a head that hands its input on."""

    class Handed:
        def apply(self, variables: Any, hidden_BLD: jax.Array, *args: Any, **more: Any) -> jax.Array:
            return hidden_BLD

    made = Predictions(logits_BLV, Handed(), {}, jnp.asarray(targets_BL), jnp.ones(targets_BL.shape))  # type: ignore[arg-type]
    return np.asarray(log_probs(made, loss_chunks=1, **given).targets)[:, 0]


# ---------------------------------------------------------------- O: operations


@pytest.mark.parametrize("case", few(["policy token", "preference", "reward"], 1))
def test_O3_metrics_of_a_batch_are_those_of_the_batch_with_fifty_more_columns_of_padding(case):
    c = CASES[case]
    batch = batch_of(c)
    wide = {
        name: np.pad(x, ((0, 0), (0, 50))) if x.ndim == 2 and x.shape[1] == LENGTH else x for name, x in batch.items()
    }
    wide["tokens"][:, LENGTH:] = 7
    assert sums_of(case, wide)[0] == pytest.approx(sums_of(case, batch)[0], rel=1e-5, abs=1e-6)
