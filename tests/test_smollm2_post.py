"""The stages of a real chat model (configs/post/smollm2_*.py): they build, are sized for an hour, and get the rows they need."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from llmjax import config
from llmjax.data.ramp import batch_sizes
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.data.tokenizer_files import with_template
from llmjax.post import instructions, rewards
from llmjax.scaling import analytic, compiler

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "dpo", "grpo")
SHAPE = {  # of SmolLM2-135M, which a run takes over from the imported model
    "layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp_width": 1536, "vocab_size": 49_152,
    "tie_embeddings": True, "max_length": 8192,
}  # fmt: skip
CPU = 100e9  # FLOP/s of 2 cores


def load(stage, **changes):
    given = {f"model.{name}": value for name, value in SHAPE.items()} | {"train.init_from": "runs/smollm2"} | changes
    name, _, variant = stage.partition(":")
    spec = f"{ROOT / 'configs' / 'post' / f'smollm2_{name}.py'}{':' * bool(variant)}{variant}"
    return config.load(spec, overrides=[f"{key}={value!r}" for key, value in given.items()])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_complete_locked_and_sized_for_an_hour_of_two_cores(stage):
    c = load(stage)
    config.check(c)
    assert c.is_locked and c.model.adapter.kind == "lora" and c.train.eval_first
    with pytest.raises(AttributeError):
        c.train.rows = 1
    resolved = compiler.resolve(c, platform="cpu")
    assert analytic.parameter_count(resolved) == pytest.approx(139.4e6, rel=0.01)
    flops = analytic.token_flops(resolved)
    tokens = c.train.batch_size * c.train.sequence_length
    steps = batch_sizes(c.train).steps(c.train.duration)
    updates = steps * tokens * flops.model / CPU
    share = {"50%": 3, "100%": 2}[c.train.eval_every]  # evaluations, with the one before the first step
    beside = share * c.train.eval_batches * tokens * flops.forward / CPU
    if stage == "grpo":  # every answer is written, and read by the trainer before it is learnt
        beside = (steps + share * c.train.eval_batches) * tokens * flops.forward / CPU * 2
    if stage == "dpo":  # the reference reads 900 pairs of about 300 tokens
        beside += 900 * 300 * flops.forward / CPU
    assert 900 < updates + beside < 3600


def test_variants_of_sft_are_built_and_others_refused():
    assert load("sft:rank=64").model.adapter.scale == "root"
    assert load("sft:nf4").model.adapter.base_format == "nf4"
    for name in STAGES[1:]:
        with pytest.raises(AssertionError, match="no variants"):
            load(f"{name}:nf4")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import smollm2_post

    yield smollm2_post
    sys.modules.pop("smollm2_post")


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


def tree(text):
    def said(role, text, *replies, rank=None):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    best = said("assistant", "best", said("prompter", "more", said("assistant", "end")), rank=0)
    return {"message_tree_id": "1", "prompt": said("prompter", text, best, said("assistant", "worse", rank=1))}


def test_rows_are_made_of_the_shared_data_and_training_has_no_held_out_constraint(script, tmp_path, monkeypatch):
    data, asked_for = tmp_path / "posttrain", list[list[Path]]()
    monkeypatch.setattr(script.constraints, "find_data", asked_for.append)  # which takes seconds to import its library
    write(data / "instruct" / "oasst_100_trees.jsonl.gz", [tree("one?"), tree("two?")])
    task = {"instruction": "Do.", "instances": [{"input": "this", "output": "Done."}]}
    write(
        data / "instruct" / "self_instruct_user_oriented.jsonl",
        [task, {**task, "instances": [{"input": "", "output": " "}]}],
    )
    write(data / "self_instruct_seed_tasks.jsonl", [task])
    talk = "\n\nHuman: Hi\n\nAssistant: "
    write(data / "preference" / "hh_harmless_test.jsonl.gz", [{"chosen": talk + "Hello.", "rejected": talk + "No."}])
    unknown = "keywords:frequency"  # which cannot be checked so, like one whose data is missing
    given = {
        unknown: {"relation": "at most", "keyword": "a", "frequency": 1},
        "detectable_content:postscript": {"postscript_marker": "P.S."},
    }
    names = ["punctuation:no_comma", "detectable_format:title", *instructions.HELD_OUT, unknown]
    asked = []
    for i in range(60):
        name = names[i % len(names)]
        asked.append(
            {"key": i, "prompt": f"Write {i}.", "instruction_id_list": [name], "kwargs": [given.get(name, {})]}
        )
    write(data / "instruct" / "ifeval_prompts.jsonl", [*asked, {**asked[0], "key": 99, "prompt": "long " * 200}])

    tokenizer = with_template(byte_tokenizer(), "{% for m in messages %}{{ m.content }}{% endfor %}")
    counts = script.make_files(tmp_path, tmp_path / "files", tokenizer)
    assert asked_for == [[tmp_path]]
    made = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "files").glob("*.jsonl")
    }
    assert [row["messages"][-1]["content"] for row in made["chats"]] == ["end", "end", "Done.", "Done."]
    assert made["chats"][2]["messages"][0] == {"role": "user", "content": "Do.\n\nthis"}
    assert made["pairs"][0]["chosen"] == [{"role": "assistant", "content": "Hello."}]
    constrained = [row for row in made["prompts"] if row["instruction_id_list"]]
    assert counts["ifeval_train"] == len(constrained) > 5
    assert not {name for row in constrained for name in row["instruction_id_list"]} & set(instructions.HELD_OUT)
    assert unknown not in str(made["prompts"]) + str(made["ifeval_prompts"])
    texts = {row["prompt"] for row in made["ifeval_prompts"]}
    assert not {row["prompt"][0]["content"] for row in constrained} & texts and len(texts) >= 24
    assert all(len(row["prompt"][0]["content"]) < script.LONGEST for row in made["prompts"])

    parsed, made_sums = rewards.parse(load("grpo").rollout.rewards), [row for row in made["prompts"] if row["answer"]]
    assert len(made_sums) == script.SUMS == len({row["prompt"][0]["content"] for row in made_sums})
    rows = [next(row for row in constrained if row["instruction_id_list"] == ["punctuation:no_comma"]), made_sums[0]]
    scored = rewards.score(parsed, ["no, comma", f"It is {made_sums[0]['answer']}."], rows)
    assert scored.total.tolist() == [0, 1]  # each by its own reward alone


def test_ifevals_scores_are_told_by_whether_a_kind_was_trained(script):
    prompts = [{"key": 7, "instruction_id_list": ["punctuation:no_comma", instructions.HELD_OUT[0]]}]
    found = script.by_kind(prompts, [{"id": 7, "strict": [True, False]}, {"id": 7, "strict": [False, False]}])
    assert found == {"seen_kinds": {"value": 0.5, "count": 2}, "new_kinds": {"value": 0.0, "count": 2}}


def test_steps_are_taken_once_and_go_on_where_the_time_was_over(script, tmp_path, monkeypatch):
    asked = []

    def llmjax(*arguments, budget, log):
        asked.append(arguments[0])
        if budget.left() is not None:
            raise script.OutOfTime

    monkeypatch.setattr(script, "llmjax", llmjax)
    monkeypatch.setattr(script, "heldout", lambda run: {"before": {"loss": 2.0}, "after": {"loss": 1.0}})
    arguments = [
        "x",
        "--model",
        "m",
        "--data",
        "d",
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path / "made.json"),
        "--only",
        "sft",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--seconds", "100"])
    assert script.main() == 0 and not (tmp_path / "made.json").exists()
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
    assert asked == ["sft", "sft"]
    found = json.loads((tmp_path / "made.json").read_text())["steps"]
    assert found.keys() == {"sft"} and found["sft"]["found"]["after"] == {"loss": 1.0}


def test_a_step_of_another_day_is_taken_again_only_for_the_scores_of_its_run(script, tmp_path, monkeypatch):
    out, taken = tmp_path / "made.json", []
    monkeypatch.setattr(script.Steps, "import_model", lambda self: taken.append("import"))
    monkeypatch.setattr(script.Steps, "make_files", lambda self: taken.append("files"))
    monkeypatch.setattr(script.Steps, "stage", lambda self, name: taken.append(name))
    monkeypatch.setattr(script.Steps, "scores", lambda self, run, task: taken.append(f"{run} {task}"))

    def taken_with(before, *only, limit=60):
        taken.clear()
        steps = {name: {"found": {}} for name in before}
        out.write_text(json.dumps({"limit": limit, "steps": steps}))
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        words = ["x", "--model", "m", "--data", "d", "--runs", str(folder), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [*words, *(["--only", *only] if only else [])])
        assert script.main() == 0
        assert json.loads(out.read_text())["steps"].keys() >= ({*before} if limit == 60 else set())
        return list(taken)

    def scores(run):
        return [f"{run} {task}" for task in script.TASKS]

    whole = taken_with([])
    assert whole[:2] == ["import", "files"] and whole[2:6] == [*scores("base"), "sft"] and "reward" in whole
    made = ["import", "files", *(f"scores-base-{task}" for task in script.TASKS), "sft"]
    assert taken_with([*made, "scores-sft-ifeval"], "import", "files", "sft", "scores-sft-hellaswag") == [
        "import", "files", "sft", "sft hellaswag",
    ]  # fmt: skip
    done = [f"scores-{name.replace(' ', '-')}" if " " in name else name for name in whole]
    assert taken_with(done) == []
    assert taken_with(done, limit=9) == whole  # another slice of the tasks
    assert taken_with([name for name in done if name != "reward"]) == ["import", "files", "reward"]
