"""A recipe skips what is done, says why it runs what it runs, and never lets two processes work on one run."""

import dataclasses
import fcntl
import json
import sys
import types

import pytest
from helpers import run_command, start_command, tiny_config

from llmjax import recipe


@pytest.fixture
def calls(monkeypatch):
    """Stages that only say that they ran: what is tested is which do, and when."""
    made = []
    module = types.ModuleType("stages_that_note_their_calls")
    for name in recipe.STAGES:

        def run(c, workdir, name=name):
            made.append(name)
            if name in failing:
                raise OSError("the stage was cut off")
            return {"number": len(made)}

        setattr(module, name, run)
    failing: set[str] = set()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    stages = {k: dataclasses.replace(s, function=f"{module.__name__}:{k}") for k, s in recipe.STAGES.items()}
    monkeypatch.setattr(recipe, "STAGES", stages)
    return types.SimpleNamespace(made=made, failing=failing)


ALL = ("prepare", "tokenizer", "train", "eval", "generate", "report")


@pytest.fixture
def c(tiny_sources):
    return tiny_config(tiny_sources)


def test_done_stages_are_skipped_with_a_line_and_the_report_always_runs(calls, c, tmp_path, capsys):
    results = recipe.run(c, tmp_path, ALL)
    assert calls.made == list(ALL)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["eval/number"] == results["number"] == 4
    capsys.readouterr()
    recipe.run(c, tmp_path, ALL)
    assert calls.made == [*ALL, "report"]
    output = capsys.readouterr().out
    for stage in ALL[:-1]:
        assert f"{stage}: done already, skipped ({tmp_path / stage})" in output


@pytest.mark.parametrize(
    ("key", "value", "reruns"),
    [
        ("data.min_bytes", 5, ALL),
        ("tokenizer.split_digits", False, ALL[1:]),
        ("model.layers", 1, ALL[2:]),
        ("seed", 7, ALL[2:]),
        ("eval.stride", 3, ("eval", "report")),
        ("generate.temperature", 0.5, ("generate", "report")),
        ("name", "other", ("report",)),
        ("parallel.mesh", "data=1", ("report",)),  # where it runs is not what it makes
        ("train.log_every", 1.0, ("report",)),
        ("checkpoint.keep", 3, ("report",)),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it_and_says_which(calls, c, tmp_path, capsys, key, value, reruns):
    from llmjax import config

    recipe.run(c, tmp_path, ALL)
    calls.made.clear()
    capsys.readouterr()
    before = config.flatten(c.to_dict())[key]
    config.set_key(c, key, value)
    recipe.run(c, tmp_path, ALL)
    assert calls.made == list(reruns)
    output = capsys.readouterr().out
    for stage in reruns[:-1]:
        assert f"{stage}: runs again, because {key} changed from {before!r} to {value!r}" in output


def test_changed_source_files_rerun_everything(calls, c, tmp_path, capsys):
    from llmjax import config

    source = tmp_path / "source.txt"
    source.write_text("one text")
    config.set_key(c, "data.sources", str(source))
    recipe.run(c, tmp_path / "run", ALL)
    calls.made.clear()
    source.write_text("another text")
    recipe.run(c, tmp_path / "run", ALL)
    assert calls.made == list(ALL)
    assert "prepare: runs again, because the files of data.sources changed" in capsys.readouterr().out


def test_a_stage_that_was_cut_off_runs_again_and_the_finished_ones_do_not(calls, c, tmp_path):
    calls.failing.add("train")
    with pytest.raises(OSError, match="cut off"):
        recipe.run(c, tmp_path, ALL)
    (tmp_path / "checkpoints").mkdir()
    calls.failing.clear()
    calls.made.clear()
    recipe.run(c, tmp_path, ALL)
    assert calls.made == list(ALL[2:])
    assert (tmp_path / "checkpoints").is_dir()  # an interrupted training goes on from them


def test_a_changed_training_moves_the_earlier_one_aside(calls, c, tmp_path, capsys):
    from llmjax import config

    recipe.run(c, tmp_path, ALL)
    for number, layers in ((1, 1), (2, 3)):
        (tmp_path / "checkpoints" / "8").mkdir(parents=True)
        (tmp_path / "metrics.jsonl").write_text(f"{number}\n")
        config.set_key(c, "model.layers", layers)
        recipe.run(c, tmp_path, ALL)
        aside = tmp_path / f"before-{number}"
        assert (aside / "checkpoints" / "8").is_dir()
        assert (aside / "metrics.jsonl").read_text() == f"{number}\n"
        assert not (tmp_path / "checkpoints").exists()
        assert f"moved to {aside}" in capsys.readouterr().out


def test_a_stage_without_its_predecessors_says_what_to_run_first(calls, c, tmp_path):
    with pytest.raises(ValueError, match=r"eval needs train, which has not been run .* `llmjax train` first"):
        recipe.run(c, tmp_path, ("eval",))
    with pytest.raises(ValueError, match="there is no stage 'trian'; stages are prepare"):
        recipe.run(c, tmp_path, ("trian",))
    assert calls.made == []


def test_a_second_process_is_refused_changes_nothing_and_the_lock_goes_with_its_holder(calls, c, tmp_path):
    from llmjax import config

    recipe.run(c, tmp_path, ("prepare",))
    before = (tmp_path / "config.json").read_text()
    config.set_key(c, "data.min_bytes", 9)
    with (tmp_path / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=r"another process is working on .*wait for it, or choose another --workdir"
        ):
            recipe.run(c, tmp_path, ("prepare",))
        recipe.run(c, tmp_path, ("report",))  # which only reads
    assert calls.made == ["prepare", "report"]
    assert (tmp_path / "config.json").read_text() == before
    recipe.run(c, tmp_path, ("prepare",))


def test_the_whole_recipe_runs_as_a_command_and_runs_again_in_a_moment(tiny_run):
    command = ("run", "--workdir", tiny_run)
    status, output = run_command(*command)
    assert status == 0, output
    assert "prepare: done already" in output
    results = json.loads((tiny_run / "results.json").read_text())
    assert results["bits_per_byte"] > 0
    assert results["train/steps"] == 8
    assert (tiny_run / "report" / "index.html").stat().st_size > 1000
    process = start_command(*command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for stage in ALL[:-1]:
        assert f"{stage}: done already, skipped" in output
