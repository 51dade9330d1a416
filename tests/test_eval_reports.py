"""What the command does with tasks: scores and items are kept, contamination is told, runs are compared question by question."""

import json
import random
from pathlib import Path

import pytest
from helpers import tiny_config
from networks import settings
from test_eval_likelihood import model_of

from llmjax import cli
from llmjax.eval import code, contamination, judge, native, statistics, tasks
from llmjax.eval.leaderboard import TaskScore
from llmjax.report import scores

WORDS = [f"{a}{b}" for a in ("mor", "tal", "ven", "quo", "sil", "bra") for b in ("ana", "eko", "idi", "oru", "uth")]


def questions(path: Path, count: int = 6) -> list[str]:
    """A file of ARC questions of 15 words each; their texts."""
    rng, rows = random.Random(1), []
    for n in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(15))
        choices = {"text": [f"{rng.choice(WORDS)} {i}" for i in range(4)], "label": list("ABCD")}
        rows.append({"id": f"q{n}", "question": text, "choices": choices, "answerKey": rng.choice("ABCD")})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["question"] for row in rows]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    questions(folder / "arc_easy_train.jsonl", 30)
    questions(folder / "arc_easy_test.jsonl")
    return folder


@pytest.fixture(scope="module")
def model():
    return model_of(settings(vocab_size=260, max_length=4096, layers=1, heads=2, attention="auto"))


def config_of(data: Path, *names: str, **more):
    return tiny_config(eval__tasks=tuple(names), eval__data=(str(data),), eval__limit=3, **more).lock()


def test_scores_and_items_are_kept_and_printed_with_their_errors(tmp_path, data, model, capsys):
    found = tasks.run(config_of(data, "arc_easy"), model, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "arc_easy              25 acc_norm" in printed and "95 % interval" in printed
    kept = scores.read_scores(tmp_path / "run")
    assert kept["tasks"]["arc_easy"]["metrics"]["acc_norm"]["value"] == found["arc_easy/acc_norm"]
    assert found.get("arc_easy/acc_norm_error", 0.0) >= 0
    items = scores.read_items(tmp_path / "run")["arc_easy"]
    assert len(items) == 3 and all(len(x["log_likelihoods"]) == 4 for x in items.values())
    c = config_of(data, "arc_easy")
    assert native.numbers(c, model) == {k: v for k, v in found.items() if not k.endswith("_error")}
    assert native.numbers(tiny_config().lock(), model) == {}


def test_mistakes_are_said(tmp_path, data, model):
    with pytest.raises(ValueError, match="eval.runner='fast'"):
        tasks.run(config_of(data, "arc_easy", eval__runner="fast"), model, tmp_path)
    with pytest.raises(ValueError, match="--allow-code-execution"):
        tasks.run(config_of(data, "humaneval"), model, tmp_path)
    assert code.REFUSAL.startswith("this task runs programs")


def test_the_command_runs_tasks_and_summarises_ratings(tmp_path, data, model, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    from llmjax import config

    (run / "config.json").write_text(config.to_json(tiny_config().lock()))
    monkeypatch.setattr("llmjax.infer.language_model.load", lambda path, **_: model)
    (run / "checkpoints" / "0" / "meta").mkdir(parents=True)
    (run / "checkpoints" / "0" / "meta" / "metadata").write_text('{"imported": "a folder"}')
    assert cli.main(["eval", "--workdir", str(run)]) == 2  # what it advises is done next
    assert (
        "has no held-out text, as imported models have none: give `llmjax eval` benchmarks by --tasks"
        in capsys.readouterr().err
    )
    arguments = ["eval", "--workdir", str(run), "--tasks", "arc_easy", "--data", str(data), "--limit", "2"]
    assert cli.main(arguments) == 0
    assert (run / "eval" / tasks.SCORES).is_file() and "the scores are in" in capsys.readouterr().out
    assert cli.main([*arguments[:4], "humaneval", *arguments[5:]]) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "p", "text": f"says {name}"}) + "\n")
    monkeypatch.setattr("builtins.input", lambda _: "3")
    ratings = str(tmp_path / "r.jsonl")
    answers = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert cli.main(["rate", *answers, "--to", ratings, "--terminal", "me"]) == 0
    assert cli.main(["rate", "--to", ratings]) == 0
    assert "1 ratings by 1 raters" in capsys.readouterr().out
    assert cli.main(["rate", "--to", str(tmp_path / "none")]) == 2
    monkeypatch.setattr(judge, "ask_model", lambda model: lambda prompts: ["who knows"] * len(prompts))
    assert cli.main(["rate", *answers, "--to", ratings, "--judge", str(run)]) == 0
    said = capsys.readouterr().out
    assert "judge run gave no verdict" in said and "1 ratings by 1 raters, 1 missing" in said


def test_questions_that_stand_in_the_training_text_are_told_beside_the_score(tmp_path, data, monkeypatch):
    asked = questions(data / "arc_easy_test.jsonl")
    documents = [
        "nothing of interest " * 30,
        f"He read: {asked[1].upper()}! And went on.",
        " ".join(asked[4].split()[:12]),
    ]
    monkeypatch.setattr(contamination, "_batches", lambda prepared: iter([documents]))
    assert contamination.check(["arc_easy"], [data], tmp_path / "run") == {}  # no training text is known
    (tmp_path / "run" / "prepare" / "train").mkdir(parents=True)
    found = contamination.check(["arc_easy"], [data], tmp_path / "run")["arc_easy"]
    assert found.seen == {1} and found.count == 6  # 12 words are too few
    assert "1 of 6 questions" in str(found)
    items = [{"id": n, "acc": float(n == 1), "acc_norm": float(n < 3)} for n in range(6)]
    score = TaskScore("arc_easy", 25, "acc_norm", {"acc_norm": statistics.mean([1, 1, 1, 0, 0, 0])}, items)
    assert contamination.clean_score(score, found, [data]).value == pytest.approx(2 / 5)
    line = tasks.table({"arc_easy": score}, {"arc_easy": found}, [data])[-1]
    assert line.startswith("contamination: arc_easy: 1 of 6") and line.endswith("on the others 0.4000")


def keep(run: Path, values: list[float], *, shots: int = 25) -> Path:
    """A run with these items of one task."""
    items = [{"id": n, "acc_norm": v} for n, v in enumerate(values)]
    score = TaskScore("arc_easy", shots, "acc_norm", {"acc_norm": statistics.mean(values)}, items)

    class Model:
        step = 1

    tasks.write(run / "eval", tiny_config(), Model(), {"arc_easy": score}, {})
    return run


def test_runs_are_compared_question_by_question(tmp_path):
    rng = random.Random(0)
    a = [float(rng.random() < 0.5) for _ in range(200)]
    better = [1.0 if rng.random() < 0.25 else x for x in a]
    runs = [keep(tmp_path / "a", a), keep(tmp_path / "b", better), keep(tmp_path / "c", a, shots=0)]
    found = scores.compare_runs(runs[0], runs[1])["arc_easy"]
    assert (
        found.difference == pytest.approx((sum(better) - sum(a)) / 200)
        and found.mcnemar < 0.01
        and found.bootstrap < 0.01
    )
    assert scores.compare_runs(runs[0], runs[2]) == {}  # other examples: not the models' difference
    text = scores.comparison_table(runs[:2])
    assert "| arc_easy | acc_norm |" in text and "McNemar p=0.000" in text
    with pytest.raises(ValueError, match="none of the runs"):
        scores.comparison_table([tmp_path / "x", tmp_path / "y"])
