"""A base model is taught, compared and improved by the commands of post-training; each is a run like any other."""

import contextlib
import functools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import rows_of, run_command, start_command, tiny_config

import llmjax
from llmjax import cli, config, recipe, storage
from llmjax.errors import UserError
from llmjax.parallel import mesh, reading
from llmjax.post import rewards, rows
from llmjax.train import hardware

SUMS = [(a, b) for a in range(8) for b in range(8)]
SMALL = (
    "--config.train.sequence_length=24", "--config.train.batch_size=8", "--config.optimizer.learning_rate=1e-3",
    "--config.data.holdout_percent=20", "--config.checkpoint.every=1000 steps", "--config.checkpoint.every_seconds=0",
    "--config.schedule.name=constant", "--config.schedule.warmup=0 steps", "--config.checkpoint.keep=9",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """The runs see one device of a known speed: they compile faster so, and meshes are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", functools.partial(mesh.make_mesh, devices=jax.devices()[:1]))
        patch.setattr(reading, "own_devices", lambda: jax.devices()[:1])
        patch.setattr(hardware, "_measured_cpu", lambda: 1e11)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base run, files of sums as conversations, preferences and prompts, and a model that was taught them."""
    where = tmp_path_factory.mktemp("post")
    texts = where / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("".join(f"{a}+{b}={a + b}\n" for a, b in SUMS[i::8]))
    names = ("chats", "pairs", "prompts", "judged", "labelled")
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for a, b in SUMS:
        asked, answer = f"{a}+{b}=", str(a + b)
        files["chats"].append({"prompt": asked, "completion": answer})
        files["pairs"].append({"prompt": asked, "chosen": answer, "rejected": "no"})
        files["prompts"].append({"prompt": asked, "answer": answer})
        good = (a + b) % 2 == 0
        files["judged"].append({"prompt": asked, "completion": answer if good else "no", "label": good})
        files["labelled"].append({"text": asked, "label": "large" if b > 3 else "small"})
    for name, records in files.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with contextlib.redirect_stdout(None):
        recipe.run(tiny_config(texts, train__eval_every="0 steps"), where / "base", ("prepare", "tokenizer", "train"))
    assert (
        post(where, "sft", "base", "chats", "--config.train.duration=40 steps", "--config.train.eval_every=20 steps")
        == 0
    )
    return where


def post(folder: Path, verb: str, start: str, data: str, *more: str, name: str = "") -> int:
    """Run a command of post-training with small settings."""
    given = (
        f"--config.train.init_from={folder / start}",
        f"--config.data.sources=['{folder / data}.jsonl']",
        *SMALL,
        *more,
    )
    of = "classify" if verb == "task" else verb
    return cli.main([verb, "--config", f"configs/post/{of}.py", "--workdir", str(folder / (name or verb)), *given])


def test_a_base_model_is_taught_and_is_a_run_like_any_other(folder, capsys):
    held = [row["heldout_loss"] for row in rows_of(folder / "sft") if "heldout_loss" in row]
    assert held[-1] < 0.9 * held[0]
    index = json.loads((folder / "sft" / "rows" / "index.json").read_text())["counts"]
    assert index["rows"] == 64 and index["train_groups"] + index["heldout_groups"] == 64 and index["heldout_groups"] > 4
    assert index["train_learnt_tokens"] < index["train_tokens"]
    assert (
        post(folder, "sft", "base", "chats", "--config.train.duration=40 steps", "--config.train.eval_every=20 steps")
        == 0
    )
    assert "train: done already" in capsys.readouterr().out
    model = llmjax.load(folder / "sft")
    assert model.config.model == llmjax.load(folder / "base").config.model  # no field of the architecture is lost
    results = json.loads((folder / "sft" / "train" / "results.json").read_text())
    assert results["heldout_loss"] == held[-1]


def test_a_preference_run_starts_at_ln_2_and_learns_which_answer_is_better(folder):
    assert (
        post(folder, "dpo", "sft", "pairs", "--config.train.duration=12 steps", "--config.train.eval_every=12 steps")
        == 0
    )
    first, *_, last = rows_of(folder / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["margin"]) < 1e-6
    assert last["loss"] < 0.6 and last["accuracy"] > 0.7 and last["margin"] > 0
    reference = np.load(folder / "dpo" / "rows" / "reference.npz")
    store = rows.load(folder / "dpo", "train")
    assert len(reference["train"]) == len(store.sizes) == 2 * len(store)


@pytest.mark.slow  # test_post_rewards.py and test_acceptance.py have its parts
def test_a_reward_model_orders_answers_and_scores_texts(folder):
    more = (
        "--config.train.duration=20 steps",
        "--config.train.eval_every=20 steps",
        "--config.optimizer.learning_rate=1e-2",
    )
    assert post(folder, "reward", "sft", "pairs", *more) == 0
    first, *_, last = rows_of(folder / "reward")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the head begins at 0
    assert last["accuracy"] > first["accuracy"] and last["loss"] < 0.6
    results = json.loads((folder / "reward" / "results.json").read_text())
    assert results["train/accuracy"] == last["heldout_accuracy"] and results["train/calibration_error"] < 0.5
    assert "## Held-out pairs by margin" in (folder / "reward" / "report" / "report.md").read_text()
    model = llmjax.load(folder / "reward")
    long = "1" * 30  # an answer keeps its score beside a longer text
    scores = model.reward(["1+1=2", "1+1=no", "2+3=5", "2+3=no", long])
    assert scores[0] > scores[1] and scores[2] > scores[3]
    prompts = ["1+1=", "1+1=", "2+3=", "2+3=", ""]
    apart = model.reward(["2", "no", "5", "no", long], prompts=prompts)
    np.testing.assert_allclose(apart, scores, rtol=1e-5, atol=1e-6)
    held = rows.load(folder / "reward", "heldout").examples(0)[0]
    text = model.tokenizer.decode(held.ids)
    np.testing.assert_allclose(model.reward([text, long])[:1], model.reward([long, text])[1:], rtol=1e-5, atol=1e-6)
    # Another policy's reward: read from the run, by name and with a weight.
    made = rewards.parse([f"model:{folder / 'reward'}=0.5"])
    found = rewards.score(made, ["2", "no", "5", "no", long], [{"prompt": prompt} for prompt in prompts])
    np.testing.assert_allclose(found.total, 0.5 * scores, rtol=1e-5, atol=1e-6)
    assert list(found.parts) == ["reward"]
    with pytest.raises(UserError, match="gives no rewards"):
        llmjax.load(folder / "sft").reward(["1+1=2"])


@pytest.mark.slow
def test_a_reward_model_learns_the_order_of_letters_and_not_only_how_many_there_are(folder, tmp_path):
    """Pairs of the same letters, so that their order alone tells the better one; a convolution sees it at once."""
    draw = random.Random(0)
    turns = ["abcdabcd"[i : i + 4] for i in range(4)]
    pairs = []
    for i in range(320):
        chosen = "".join(draw.choice(turns) for _ in range(2))
        pairs.append({"prompt": f"{i}=", "chosen": chosen, "rejected": chosen[::-1]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    start = tiny_config(
        folder / "texts", model__pattern=("conv", "global"), train__duration="1 steps", train__eval_every="0 steps"
    )
    with contextlib.redirect_stdout(None):
        recipe.run(start, tmp_path / "base", ("prepare", "tokenizer", "train"))
    more = (
        "--config.train.duration=60 steps", "--config.train.eval_every=60 steps", "--config.optimizer.learning_rate=3e-3",
        "--config.train.batch_size=32", "--config.train.sequence_length=32",
    )  # fmt: skip
    assert post(tmp_path, "reward", "base", "pairs", *more) == 0
    assert rows_of(tmp_path / "reward")[-1]["heldout_accuracy"] > 0.9


@pytest.mark.slow
def test_single_answers_are_learnt_from_as_good_or_bad(folder):
    more = ("--config.train.duration=12 steps", "--config.train.eval_every=12 steps")
    assert post(folder, "kto", "sft", "judged", *more) == 0
    first, *_, last = rows_of(folder / "kto")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and abs(first["kl"]) < 1e-6
    assert last["loss"] < 0.48 and last["good_reward"] > last["bad_reward"]
    store = rows.load(folder / "kto", "train")
    assert len(store.sizes) == 2 * len(store) and 0 < store.labels.mean() < 1
    results = json.loads((folder / "kto" / "results.json").read_text())
    assert (
        results["train/heldout_loss"] == last["heldout_loss"] and results["train/accuracy"] == last["heldout_accuracy"]
    )


@pytest.mark.slow
def test_a_model_learns_the_classes_of_texts_which_the_report_tells(folder):
    more = (
        "--config.train.duration=40 steps",
        "--config.train.eval_every=40 steps",
        "--config.optimizer.learning_rate=1e-2",
    )
    assert post(folder, "task", "base", "labelled", *more) == 0
    results = json.loads((folder / "task" / "results.json").read_text())
    assert results["train/accuracy"] > 0.9 and results["train/macro_f1"] > 0.9 and "train/heldout_loss" in results
    page = (folder / "task" / "report" / "report.md").read_text()
    assert "## Held-out classes" in page and "| class | large | small |" in page
    model = llmjax.load(folder / "task")
    assert model.config.objective.classify.labels == ("large", "small") and model.config.model.classes == 2
    said = model.classify(["1+7=", "7+1=", "2+0="])
    assert [one.label for one in said] == ["large", "small", "small"]
    assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in said)
    out = folder / "said.jsonl"
    assert (
        cli.main(
            ["label", "--workdir", str(folder / "task"), "--texts", f"{folder / 'labelled'}.jsonl", "--out", str(out)]
        )
        == 0
    )
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(told) == 64 and np.mean([one["predicted"] == one["label"] for one in told]) > 0.9
    with pytest.raises(UserError, match="knows no classes"):
        llmjax.load(folder / "sft").classify(["1+1="])


@pytest.mark.slow
def test_an_encoder_learns_the_classes_of_two_texts(folder):
    c = tiny_config(folder / "texts", objective__name="masked", model__direction="bidirectional", model__types=2)
    recipe.run(c, folder / "encoder", ("prepare", "tokenizer", "train"))
    rows_of = [{"text": f"{a}", "text_b": f"{b}", "label": "more" if a > b else "not"} for a, b in SUMS]
    (folder / "twos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    more = ("--config.train.duration=150 steps", "--config.optimizer.learning_rate=1e-2", "--config.model.pooler=true")
    assert post(folder, "task", "encoder", "twos", *more, "--config.train.eval_every=150 steps", name="twos") == 0
    results = json.loads((folder / "twos" / "results.json").read_text())
    assert results["train/loss"] < 0.6 and 0 <= results["train/accuracy"] <= 1  # ln 2 is 0.69
    model = llmjax.load(folder / "twos")
    assert model.config.model.pooler
    found = [one.label for one in model.classify([(row["text"], row["text_b"]) for row in rows_of])]
    assert sum(a == row["label"] for a, row in zip(found, rows_of, strict=True)) > 0.75 * len(rows_of)


@pytest.mark.slow
def test_numbers_are_learnt_and_a_head_for_something_else_begins_anew(folder):
    files = [{"text": f"{a}+{b}=", "label": b} for a, b in SUMS]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files))
    given = (
        "--config.train.duration=1 steps",
        "--config.objective.classify.target=number",
        "--config.train.eval_every=1 steps",
    )
    for start, name in (("base", "classes"), ("classes", "number")):
        more = given if name == "number" else given[:1]
        assert post(folder, "task", start, "numbers", *more, name=name) == 0
    assert len(llmjax.load(folder / "classes").config.objective.classify.labels) > 2
    assert {"train/rmse", "train/pearson", "train/spearman"} <= json.loads(
        (folder / "number" / "results.json").read_text()
    ).keys()
    assert isinstance(llmjax.load(folder / "number").classify(["1+7="])[0].label, float)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_and_writes_what_it_wrote(folder):
    more = (
        f"--config.objective.distill.teacher={folder / 'sft'}", "--config.train.duration=30 steps",
        "--config.train.eval_every=30 steps", "--config.eval.texts=['exact_match', 'rougeL']", "--config.generate.max_new_tokens=4",
        "--config.objective.distill.top=8",
    )  # fmt: skip
    assert post(folder, "distill", "base", "chats", *more) == 0
    first, *_, last = rows_of(folder / "distill")
    assert last["divergence"] < 0.5 * first["divergence"] and last["agreement"] > first["agreement"]
    results = json.loads((folder / "distill" / "results.json").read_text())
    assert {"train/exact_match", "train/rougeL", "train/heldout_loss", "train/divergence"} <= results.keys()
    assert "## Texts for held-out rows" in (folder / "distill" / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_teacher_is_its_own_student_and_a_students_own_answers_are_the_same_after_a_stop(folder):
    same = (f"--config.objective.distill.teacher={folder / 'sft'}", "--config.objective.distill.on_policy=0.5",
            "--config.rollout.tokens=4", "--config.objective.distill.divergence=reverse")  # fmt: skip
    assert post(folder, "distill", "sft", "chats", *same, "--config.train.duration=6 steps", name="whole-own") == 0
    seen = rows_of(folder / "whole-own")
    assert abs(seen[0]["divergence"]) < 1e-5 and {row["rollout/on_policy"] for row in seen} == {0.0, 1.0}
    for steps in (3, 6):
        assert (
            post(folder, "distill", "sft", "chats", *same, f"--config.train.duration={steps} steps", name="cut-own")
            == 0
        )
    whole, cut = (llmjax.load(folder / name).params for name in ("whole-own", "cut-own"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


GRPO = (
    "--config.rollout.rewards=['exact_match', 'last_number=0.5']", "--config.rollout.tokens=4", "--config.rollout.samples=4",
    "--config.rollout.updates=2", "--config.train.eval_every=2 steps", "--config.checkpoint.every=1 steps",
)  # fmt: skip
WITH_REFERENCE = ("--config.objective.policy.kl_weight=0.01", "--config.train.micro_batches=2")


def as_if_killed_after_step_3(folder: Path, whole: str, cut: str) -> None:
    """The run `cut`: `whole`, which took 4 steps, without the last one."""
    shutil.copytree(folder / whole, folder / cut)
    for path in ("checkpoints/4", "train/results.json"):
        storage.remove(folder / cut / path)
    stages = json.loads((folder / cut / "stages.json").read_text())
    stages["train"]["done"] = False
    (folder / cut / "stages.json").write_text(json.dumps(stages))


@pytest.mark.slow  # test_post_rollouts.py samples, test_source.py stops inside a round
def test_sampler_and_trainer_agree_and_a_run_that_stops_inside_a_round_ends_in_the_same_bits(folder):
    assert post(folder, "grpo", "sft", "prompts", *GRPO, "--config.train.duration=4 steps", name="whole") == 0
    seen = rows_of(folder / "whole")
    for row in seen[::2]:  # the first update of each round
        assert row["ratio"] == pytest.approx(1, abs=1e-6)
    assert all(row["rollout/drift_max"] <= 2e-5 for row in seen[::2])
    assert seen[1]["ratio"] != 1  # the second update is off-policy
    assert {"heldout_reward", "heldout_reward/exact_match"} <= seen[-1].keys()
    assert len(json.loads((folder / "whole" / "samples" / "000001.json").read_text())) > 0

    as_if_killed_after_step_3(folder, "whole", "cut")  # inside the second round
    assert post(folder, "grpo", "sft", "prompts", *GRPO, "--config.train.duration=4 steps", name="cut") == 0
    whole, cut = (llmjax.load(folder / name).params for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    for a, b in zip(seen, rows_of(folder / "cut"), strict=True):
        of_its_own = ("seconds", "per_second", "mfu", "goodput", "changed", "heldout")
        same = {name for name in a.keys() | b.keys() if not any(word in name for word in of_its_own)}
        assert {name: a[name] for name in same} == {name: b[name] for name in same}


@pytest.mark.slow  # test_post_sharing.py has the rows and the step
@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_answers_that_share_rows_teach_the_same_and_a_stop_inside_a_round_changes_no_bit(folder, verb):
    given = (*GRPO, "--config.train.duration=4 steps", "--config.train.micro_batches=4", "--config.train.sequence_length=48",
             *(("--config.rollout.samples=1",) if verb == "ppo" else WITH_REFERENCE[:1]))  # fmt: skip
    apart, shared = f"{verb}-apart", f"{verb}-shared"
    assert post(folder, verb, "sft", "prompts", *given, name=apart) == 0
    assert post(folder, verb, "sft", "prompts", *given, "--config.rollout.pack=4", name=shared) == 0
    for one, other in zip(rows_of(folder / apart), rows_of(folder / shared), strict=True):
        for name in ("loss", "ratio", "grad_norm", "k3", "entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=2e-6), name
        assert other.get("rollout/reward") == one.get("rollout/reward")
    first, *_ = rows_of(folder / shared)
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["rollout/drift_max"] <= 2e-5
    as_if_killed_after_step_3(folder, shared, f"{shared}-cut")
    assert post(folder, verb, "sft", "prompts", *given, "--config.rollout.pack=4", name=f"{shared}-cut") == 0
    whole, cut = (llmjax.load(folder / run).params for run in (shared, f"{shared}-cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.slow
def test_a_policy_with_a_critic_is_held_to_its_reference(folder):
    more = (
        "--config.rollout.rewards=['exact_match']", "--config.rollout.tokens=4", "--config.rollout.updates=2",
        "--config.train.duration=4 steps", "--config.train.eval_every=4 steps", "--config.rollout.kl_target=0.1",
    )  # fmt: skip
    assert post(folder, "ppo", "sft", "prompts", *more) == 0
    first, _, second, _ = rows_of(folder / "ppo")
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["k1"] == pytest.approx(0, abs=1e-6)
    assert first["value_loss"] >= 0 and second["rollout/kl_weight"] != first["rollout/kl_weight"]


@pytest.mark.slow  # test_adapters.py has the reference
@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("grpo", (*GRPO, *WITH_REFERENCE)),
        pytest.param(
            "grpo",
            (*GRPO, *WITH_REFERENCE, "--config.model.adapter.kind=dora", "--config.model.adapter.base_format=nf4"),
            marks=pytest.mark.exhaustive,  # test_adapters.py has DoRA on nf4, and the others have the policy
        ),
        ("ppo", (*GRPO, "--config.rollout.samples=1")),
    ],
    ids=["grpo", "grpo-nf4-dora", "ppo"],
)
def test_a_policy_of_adapters_starts_at_its_base_and_ends_in_the_same_bits_after_a_stop(folder, verb, more, request):
    name = f"adapters-{request.node.callspec.id}"
    given = (
        "--config.model.adapter.kind=lora",
        "--config.model.adapter.rank=4",
        *more,
        "--config.train.duration=4 steps",
    )
    assert post(folder, verb, "sft", "prompts", *given, name=name) == 0
    seen = rows_of(folder / name)
    for row in seen[::2]:  # the first update of each round
        assert row["ratio"] == pytest.approx(1, abs=1e-6) and row["rollout/drift_max"] <= 2e-5
    assert seen[0]["rollout/kl"] == 0 and seen[0]["k3"] == pytest.approx(0, abs=1e-9)
    assert seen[2]["rollout/kl"] != 0  # the policy has moved, the reference has not
    assert (folder / name / "checkpoints" / "base.json").is_file()  # and holds no copy of the base
    as_if_killed_after_step_3(folder, name, f"{name}-cut")
    assert post(folder, verb, "sft", "prompts", *given, name=f"{name}-cut") == 0
    whole, cut = (llmjax.load(folder / run).params for run in (name, f"{name}-cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


@pytest.mark.slow  # test_smollm2_post.py has the configs and the rows
def test_the_stages_of_a_real_chat_model_run_on_a_small_one_and_tell_held_out_figures_before_and_after(
    folder, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from smollm2_post import STAGES, command, heldout

    beside = {"instruction_id_list": None, "kwargs": None}
    asked = [{"prompt": f"{a}+{b}=", "answer": str(a + b), **beside} for a, b in SUMS]
    constrained = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "answer": None}
    asked += [{"prompt": f"say {i}", **constrained} for i in range(32)]
    (folder / "verified.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    files = {"sft": "chats", "full": "chats", "grpo": "verified"}
    wanted = {"sft": "loss", "full": "loss", "reward": "accuracy", "dpo": "loss", "grpo": "reward/ifeval"}
    for stage in STAGES:
        small = {"train.duration": "2 steps", "train.sequence_length": 64, "train.batch_size": 8, "train.micro_batches": 4,
                 "data.holdout_percent": 20, "rollout.tokens": 6, "rollout.samples": 4, "rollout.slots": 8}  # fmt: skip
        given = [f"--config.{key}={value}" for key, value in small.items()]
        run, rows_at = folder / f"smollm2-{stage}", folder / f"{files.get(stage, 'pairs')}.jsonl"
        words = [*command(stage), f"--config.train.init_from={folder / 'base'}"]
        assert cli.main([*words, f"--config.data.sources=['{rows_at}']", *given, "--workdir", str(run)]) == 0
        found = heldout(run)
        assert {"before", "after"} == found.keys() and all(wanted[stage] in figures for figures in found.values())
        if stage == "dpo":
            assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        if stage == "grpo":
            assert "reward/last_number" in found["after"]


def test_a_verb_refuses_a_config_of_another_kind_and_a_run_without_a_start(folder, capsys):
    words = ["dpo", "--config", "configs/post/sft.py", "--workdir", str(folder / "none")]
    assert cli.main(words) == 2
    assert "begin with one of configs/post/, such as configs/post/dpo.py" in capsys.readouterr().err
    words = ["sft", "--config", "configs/post/sft.py", "--workdir", str(folder / "none")]
    assert cli.main([*words, f"--config.data.sources=['{folder / 'chats'}.jsonl']"]) == 2
    assert "give --config.train.init_from=RUN" in capsys.readouterr().err
    assert post(folder, "grpo", "sft", "prompts", "--config.rollout.rewards=['exact']", name="none") == 2
    assert "'exact' is no reward" in capsys.readouterr().err
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.name=reward", "set model.value_head=true"),
        ("objective.name=infill", "is for text"),
        ("objective.preference.loss=dpo", "must name losses"),
        ("rollout.samples=1", "set rollout.samples to 2 or more"),
        ("model.dropout=0.1", "ratio to itself must be 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(change, message):
    verb = "grpo" if change.split(".")[0] in ("rollout", "model") else "dpo"
    with pytest.raises(UserError, match=message):
        config.load(f"configs/post/{verb}.py", overrides=[change])


def test_rows_that_say_nothing_are_counted_and_too_many_are_an_error(folder, capsys):
    broken = folder / "broken.jsonl"
    good = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(9)]
    broken.write_text("".join(json.dumps(row) + "\n" for row in [*good, {"prompt": "a", "completion": ""}]))
    given = (f"--config.train.init_from={folder / 'base'}", f"--config.data.sources=['{broken}']", *SMALL)
    workdir = ("--workdir", str(folder / "counted"))
    assert cli.main(["rows", "--config", "configs/post/sft.py", *given, *workdir]) == 0
    out = capsys.readouterr().out
    assert "1 not usable" in out and "completion is empty (broken.jsonl, row 10)" in out
    kept = [json.loads(line) for line in (folder / "counted" / "rows" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in kept] == [(10, "completion is empty")]
    again = post(folder, "sft", "base", "broken", "--config.data.rejected_percent=5", name="refused")
    assert again == 2 and "1 of 10 rows are left out, more than data.rejected_percent=5" in capsys.readouterr().err


def test_show_prints_what_is_learnt_and_what_is_left_out(folder, capsys):
    mixed = folder / "mixed.jsonl"
    mixed.write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2="}\n')
    given = (
        f"--config.train.init_from={folder / 'base'}",
        f"--config.data.sources=['{mixed}']",
        "--workdir",
        str(folder / "no"),
    )
    assert cli.main(["show", "--config", "configs/post/sft.py", *given]) == 0
    out = capsys.readouterr().out
    assert "<bos>1+1=[[2<eos>]]" in out and "mixed.jsonl, row 1: 7 tokens, 2 learnt" in out
    assert "left out: mixed.jsonl, row 2" in out and not (folder / "no").exists()
    labelled = (given[0], f"--config.data.sources=['{folder / 'labelled'}.jsonl']", *given[2:])
    assert cli.main(["show", "--config", "configs/post/classify.py", *labelled]) == 0
    out = capsys.readouterr().out
    assert "labelled.jsonl, row 1, label small: 6 tokens, 0 learnt\n<bos>0+0=<eos>" in out
    assert "64 prompts begin with 8 different words" in out


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_messages_are_learnt_by_a_given_template_which_the_model_then_chats_by(folder, capsys):
    template, chats = folder / "chat.jinja", folder / "messages.jsonl"
    template.write_text(TEMPLATE)
    sums = [[{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}] for a, b in SUMS]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in sums))
    more = (
        f"--config.data.chat_template={template}",
        "--config.train.duration=2 steps",
    )
    assert post(folder, "sft", "base", "messages", *more, name="chats") == 0
    model = llmjax.load(folder / "chats")
    assert model.tokenizer.chat_template == TEMPLATE
    asked = sums[0][:1]
    store = rows.load(folder / "chats", "train")
    learnt = {model.tokenizer.decode(e.ids[e.weights > 0]) for g in range(len(store)) for e in store.examples(g)}
    assert learnt <= {str(n) for n in range(15)}
    settings = {"temperature": 0.0, "max_new_tokens": 4}
    assert model.chat(asked, **settings).tokens == model.generate(["u:0+0\na:"], **settings)[0].tokens
    capsys.readouterr()
    assert post(folder, "sft", "base", "messages", name="untold") == 2
    assert "set --config.data.chat_template=FILE" in capsys.readouterr().err
    template.write_text(TEMPLATE.replace("'\\n'", "' '"))  # another template makes other rows, and another training
    assert post(folder, "sft", "base", "messages", *more, name="chats") == 2
    assert "the files of data.sources changed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_policy_run_killed_at_any_moment_ends_in_the_bits_of_one_that_was_not(folder):
    """SIGKILL while texts are sampled, while steps are taken and while checkpoints are written."""
    sources = f"--config.data.sources=['{folder / 'prompts'}.jsonl']"
    given = (
        f"--config.train.init_from={folder / 'sft'}",
        sources,
        *SMALL,
        *GRPO,
        *WITH_REFERENCE,
        "--config.train.duration=24 steps",
    )
    command = ["grpo", "--config", "configs/post/grpo.py", *given]
    status, output = run_command(*command, "--workdir", folder / "undisturbed")
    assert status == 0, output
    random_, killed = random.Random(0), folder / "killed"

    def taken() -> int:
        return len(rows_of(killed)) if (killed / "metrics.jsonl").exists() else 0

    for _ in range(6):
        before, process = taken(), start_command(*command, "--workdir", killed)
        while process.poll() is None and taken() < before + 2:
            time.sleep(0.02)
        time.sleep(random_.random() * 0.2)
        process.kill()
        process.communicate()
    status, output = run_command(*command, "--workdir", killed)
    assert status == 0, output
    whole, again = (llmjax.load(folder / name).params for name in ("undisturbed", "killed"))
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert [row["step"] for row in rows_of(killed)] == list(range(1, 25))
    assert [row["loss"] for row in rows_of(killed)] == [row["loss"] for row in rows_of(folder / "undisturbed")]
