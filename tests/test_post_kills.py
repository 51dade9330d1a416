"""The kills of post-trainings: those that were made are kept, one run is measured without the others, and one lost bit shows."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script with a training that takes all its steps at once."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import post_kills

    steps = [{"step": step, "loss": 1.0 / step} for step in range(1, post_kills.STEPS + 1)]
    monkeypatch.setattr(post_kills, "finish", lambda folder, *command: None)
    monkeypatch.setattr(post_kills, "rows", lambda run: steps)
    params = types.SimpleNamespace(params={"layer": {"kernel": np.ones(2)}})
    monkeypatch.setattr(post_kills.llmjax, "load", lambda run: params)
    yield post_kills
    for name in ("post_kills", "over_optimisation"):
        sys.modules.pop(name)


def run(script, monkeypatch, tmp_path, *more):
    given = ["x", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "made.json"), "--kills", "3", *more]
    monkeypatch.setattr(sys, "argv", given)
    return script.main()


def test_kills_are_kept_where_the_time_is_over_and_runs_are_added_to_the_results(script, monkeypatch, tmp_path):
    made = []

    def kill(folder, verb, command, killed, *, number):
        if len(made) == 2:
            raise script.OutOfTime
        made.append((verb, number))
        return ("start", "save", "update")[number]

    monkeypatch.setattr(script, "kill", kill)
    assert run(script, monkeypatch, tmp_path, "--only", "dpo") == 0 and not (tmp_path / "made.json").exists()
    made.append("a new call")
    assert run(script, monkeypatch, tmp_path, "--only", "dpo") == 0
    assert run(script, monkeypatch, tmp_path, "--only", "sft") == 0
    assert [one for one in made if one[0] == "dpo"] == [("dpo", 0), ("dpo", 1), ("dpo", 2)]
    found = json.loads((tmp_path / "made.json").read_text())
    assert found["exact"] and found["kills"] == 6 and list(found["runs"]) == ["sft", "dpo"]
    assert found["runs"]["dpo"]["kills"] == {"start": 1, "rollout": 0, "update": 1, "save": 1}


def test_a_lost_bit_is_an_exit_status(script, monkeypatch, tmp_path):
    drawn = iter(range(2))
    loaded = lambda run: types.SimpleNamespace(params={"kernel": np.float32([1, next(drawn)])})  # noqa: E731
    monkeypatch.setattr(script.llmjax, "load", loaded)
    monkeypatch.setattr(script, "kill", lambda *given, number: "start")
    assert run(script, monkeypatch, tmp_path, "--only", "dpo") == 1
    assert not json.loads((tmp_path / "made.json").read_text())["exact"]
