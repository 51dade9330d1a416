"""The assistant: its questions hold out whole functions, its checks tell right from wrong, and its chain runs."""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

import llmjax
from llmjax import cli, config
from llmjax.data import stdlib_questions as questions
from llmjax.eval import sandbox
from llmjax.post import program_reward, rewards
from llmjax.serve import command as serve

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"`(?:def )?(\w+)\(")


def asked(row):
    """The name of the function that a row asks about."""
    said = row["messages"][0] if "messages" in row else row["prompt"][0]
    return NAME.search(said["content"])[1]


def test_held_out_functions_share_no_name_and_no_docstring_with_the_others():
    held = [one for one in questions.functions() if one.held_out]
    others = [one for one in questions.functions() if not one.held_out]
    assert len(held) > 200 and len(others) > 2000
    for part in ("name", "docstring"):
        assert not {getattr(one, part) for one in held} & {getattr(one, part) for one in others} - {""}
    assert not {one.name.replace("_", "").lower() for one in held} & {
        one.name.replace("_", "").lower() for one in others
    }
    told = {one.name for one in held}
    assert {asked(row) for row in questions.test()} <= told
    for rows in (questions.answers(), questions.pairs(), questions.prompts()):
        assert not {asked(row) for row in rows} & told


def test_questions_are_the_same_every_time_and_half_of_them_are_calls():
    rows = list(questions.test())
    assert rows == list(questions.test()) and len(rows) >= 200
    assert 0.4 < sum(row["kind"] == "call" for row in rows) / len(rows) < 0.75
    forms = [row["messages"][1]["content"] for row in questions.answers()]
    assert len(set(forms)) > 10_000 and max(map(len, forms)) < 100
    calls = [row["messages"][1]["content"] for row in questions.answers() if "call" in row["messages"][0]["content"]]
    assert 0.3 < sum("=" in one for one in calls) / len(calls) < 0.5  # most authors have the other habit


def test_every_answer_passes_its_check_and_other_calls_do_not():
    """In this process: the sandbox takes 40 ms for each."""
    for row in itertools.islice(questions.test(), 200):
        names = re.findall(r"\w+(?==)", row["answer"]) if row["kind"] == "call" else row["answer"].split(", ")
        other = (
            f"({', '.join(reversed(row['answer'][1:-1].split(', ')))})"
            if row["kind"] == "call"
            else ",".join(reversed(names))
        )
        wrong = [row["answer"][:-1] + ", 1, 2, 3, 4, 5)", " + 1", "()()", "wrong__", ""]
        wrong += [row["answer"].replace(names[0], "wrong__")]
        exec(row["check"], {"answer": row["answer"]})
        exec(row["check"], {"answer": other})
        for answer in wrong:
            with pytest.raises((AssertionError, TypeError, NameError, SyntaxError)):
                exec(row["check"], {"answer": answer})


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot isolate programs")
def test_a_program_in_the_sandbox_gives_the_reward_and_runs_once(monkeypatch):
    row = {"check": "def f(a, b=2):\n    return a, b\nassert eval(answer) == (1, 2)"}
    right, wrong = ["f(1)", "f(1, b=2)"], ["f(2)", "f(1", "exit()", "__import__('os')._exit(0)", "", "f(1)\nf(2)"]
    made = program_reward.passes([*right, *wrong, "f(1)"], [row] * 8 + [{}])
    assert made == [1.0] * 2 + [0.0] * 6 + [None]
    monkeypatch.setattr(sandbox, "run_all", lambda programs, **_: [] if not programs else pytest.fail("it runs again"))
    assert program_reward.passes(wrong, [row] * 6) == [0.0] * 6
    assert rewards.parse(["llmjax.post.program_reward:passes=0.5"])["passes"].score is program_reward.passes


def test_the_baseline_is_the_best_template_of_each_kind():
    rows = [{**row, "question": row["prompt"][0]["content"]} for row in questions.test()]
    made = questions.baseline(rows)
    right = [answer == row["answer"] for answer, row in zip(made, rows, strict=True)]
    assert 0.2 < sum(right) / len(right) < 0.5
    calls = [answer for answer, row in zip(made, rows, strict=True) if row["kind"] == "call"]
    assert all(re.fullmatch(r"\((\w+=.*)\)", answer) for answer in calls)


@pytest.mark.slow
def test_the_chain_teaches_a_model_of_a_few_thousand_parameters(tiny_run, one_device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    few = [
        "--config.eval.limit=6", "--config.rollout.tokens=4", "--config.train.batch_size=4", "--config.train.eval_batches=1",
        "--config.sft.train.duration=3 steps", "--config.dpo.train.duration=2 steps", "--config.grpo.train.duration=2 steps",
        "--config.rollout.samples=2", "--config.rollout.slots=4", "--config.rollout.rewards=['exact_match']",
        f"--config.base.train.init_from={tiny_run}", "--config.grpo.train.sequence_length=256",
    ]  # fmt: skip
    assert cli.main(["train", "--workdir", str(tiny_run), "--config.train.duration=2 steps"]) == 0
    workdir = tmp_path / "assistant"
    command = ["run", "--config", "configs/assistant.py", "--workdir", str(workdir), *few]
    assert cli.main(command) == 0
    results = json.loads((workdir / "results.json").read_text())
    for link in ("base", "sft", "dpo", "grpo"):
        assert 0 <= results[f"{link}/exact_match"] <= 1 and 0 <= results[f"{link}/reward"] <= 1
        assert len((workdir / link / "answers" / "answers.jsonl").read_text().splitlines()) == 6
    assert results["base/baseline_exact_match"] > 0
    assert (workdir / "report" / "index.html").is_file()
    assert "exact\\_match" in (workdir / "report" / "report.md").read_text()
    model = llmjax.load(workdir)
    assert model.config.objective.name == "policy"
    assert (
        model.chat(
            [{"role": "user", "content": "Which parameters does `def f(a, b=1, c=2)` need?"}], max_new_tokens=2
        ).text
        is not None
    )
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("train: done already") == 3
    assert cli.main(["report", str(workdir)]) == 0
    assert cli.main(["generate", "--workdir", str(workdir), "--chat", "--prompt", "hello"]) == 0
    assert cli.main(["export", "--from", str(workdir), "--to", str(tmp_path / "exported")]) == 0
    assert config.run_of(workdir) == workdir / "grpo"
    asked = argparse.Namespace(named=workdir, workdir=workdir / "grpo", also=[workdir / "sft"], name=None, adapter=[])
    served, _ = serve._models(asked, model.config)  # a client gives the name of the folder which was served
    assert [one.name for one in served] == ["assistant", "sft"]
