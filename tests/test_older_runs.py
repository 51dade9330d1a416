"""A run of an earlier version opens, is evaluated and goes on: tests/fixtures/run_c4ef595 was made by that commit.

It is a byte-level model of 7,728 parameters after 8 steps with a constant learning rate. It has no source files, no
report and no paths of the machine that made it.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
from helpers import few, rows_of

import llmjax
from llmjax import cli, config, recipe
from llmjax.config import values
from llmjax.train import folders

RUN = Path(__file__).parent / "fixtures" / "run_c4ef595"
STAGES = ("prepare", "tokenizer", "train", "eval", "generate")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run, in a folder without its sources."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(RUN, "run"))


@pytest.fixture
def older(run):
    """As if the run were older still: without some of today's settings."""

    def shorten(tree):
        for group, key in (("generate", "typical_p"), ("infer", "ahead"), ("model", "alibi_rounded")):
            del tree[group][key]
        del tree["model"]["moe"], tree["prepare"]["caps"]
        return tree

    config_file, meta_file = run / "config.json", run / "checkpoints" / "8" / "meta" / "metadata"
    config_file.write_text(json.dumps(shorten(json.loads(config_file.read_text()))))
    meta = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps({**meta, "config": shorten(meta["config"])}))
    stages = json.loads((run / "stages.json").read_text())
    for entry in stages.values():
        for key in [key for key in entry["settings"] if key.startswith("model.moe.") or key == "prepare.caps"]:
            del entry["settings"][key]
    (run / "stages.json").write_text(json.dumps(stages))
    return run


def test_no_path_of_a_machine_and_at_most_a_mebibyte():
    files = [path for path in RUN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1 << 20
    for path in files:
        assert not any(place in path.read_bytes() for place in (b"/tmp", b"/home", b"/root", b"/Users")), path


@pytest.mark.parametrize("kind", few(["older", "run"]))
def test_its_model_says_what_it_said(kind, request, one_device, capsys):
    run = request.getfixturevalue(kind)
    m = llmjax.load(run)
    [sample] = [json.loads(line) for line in (run / "generate" / "samples.jsonl").read_text().splitlines()]
    assert m.generate([sample["prompt"]])[0].text == sample["text"]
    assert math.isfinite(m.loss("Text number 1.\n").bits_per_byte)


@pytest.mark.parametrize("kind", few(["older", "run"]))
def test_every_stage_is_done_and_can_be_done_again(kind, request, one_device, capsys):
    run = request.getfixturevalue(kind)
    values._say_missing.cache_clear()
    c = config.load(str(run / "config.json"))
    told = capsys.readouterr().err
    assert "data.format" in told and "have their defaults, as before" in told
    before = json.loads((run / "eval" / "results.json").read_text())
    recipe.run(c, run, (*STAGES, "report"))
    out = capsys.readouterr().out
    assert all(f"{stage}: done already" in out for stage in STAGES)
    [sample] = [json.loads(line) for line in (run / "generate" / "samples.jsonl").read_text().splitlines()]
    for stage, made in (("generate", sample["prompt"] + sample["text"]), ("eval", "bits_per_byte: ")):
        recipe.run(c, run, (stage,))
        assert made in capsys.readouterr().out, "asked for alone, what was made is shown"
    (run / "eval" / "results.json").unlink()
    results = recipe.run(c, run, (*STAGES, "report"))
    assert results["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=1e-4)
    assert not list(run.glob("before-*"))


def test_its_finished_training_goes_on_for_half_as_long_again(run, one_device, capsys):
    before = rows_of(run)
    assert cli.main(["train", "--workdir", str(run), "--config.train.duration=12"]) == 0
    out = capsys.readouterr().out
    assert "train: goes on from step 8, although train.duration changed from '8 steps' to '12'" in out
    rows = rows_of(run)
    assert rows[:8] == before and [row["step"] for row in rows] == list(range(1, 13))
    assert folders.steps_in(run / "checkpoints")[0] == 12
    assert sum(row["loss"] for row in rows[8:]) < sum(row["loss"] for row in rows[4:8])
    assert cli.main(["train", "--workdir", str(run)]) == 0  # config.json has the new duration
    assert "train: done already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_advice_of_a_training_that_fails_works(run, one_device, capsys):
    longer = ["train", "--workdir", str(run), "--config.train.duration=12"]
    assert cli.main([*longer, "--config.optimizer.learning_rate=1e38", "--config.train.max_bad_steps=2"]) == 2
    told = capsys.readouterr().err
    assert "Lower optimizer.learning_rate" in told and "run again: it goes on from the checkpoint of step 8" in told
    assert cli.main([*longer, "--config.optimizer.learning_rate=1e-3"]) == 0
    out = capsys.readouterr().out
    assert "train: goes on from step 8, although optimizer.learning_rate changed from 1e+38 to 0.001" in out
    assert [row["step"] for row in rows_of(run)] == list(range(1, 13)) and not list(run.glob("before-*"))
    noted = json.loads((run / "stages.json").read_text())["train"]["changes"]
    assert [sorted(note["settings"])[0] for note in noted] == ["optimizer.learning_rate"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.duration=4", "ends at step 4, and the training in run has come to step 8"),
        ("train.duration=0", "is less than one step"),
        ("optimizer.learning_rate=1e-3", "finished after 8 steps, so nothing follows from what changed"),
        ("model.width=32", "model.width changed from 16 to 32, which makes it another one"),
        ("model.vocab_size=100", "model.vocab_size changed from 0 to 100, which makes it another one"),
        ("tokenizer.kind=char", "needs tokenizer, which has not been run with these settings"),
    ],
)
def test_what_is_refused_leaves_every_file_as_it_was(run, one_device, change, message, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["train", "--workdir", str(run), f"--config.{change}"]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
