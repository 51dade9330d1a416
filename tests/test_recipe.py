"""A recipe skips what is done, says why it runs what it runs, and never lets two processes work on one run."""

import dataclasses
import fcntl
import json
import sys
import types

import pytest
from helpers import run_command, tiny_config

from llmjax import cli, config, recipe, storage
from llmjax.errors import UserError
from llmjax.recipe import stages

LEFT = {"prepare": "prepare/train/a.jsonl", "tokenizer": "tokenizer/tokens/index.json", "train": "checkpoints/8/x"}


@pytest.fixture
def calls(monkeypatch):
    """Stages that only say that they ran, and leave a file: what is tested is which do, and when."""
    made: list[str] = []
    checked: list[tuple[str, bool, bool]] = []
    failing: set[str] = set()
    refusing: set[str] = set()
    module = types.ModuleType("stages_that_note_their_calls")
    for name in stages.all_names():

        def run(c, workdir, name=name):
            made.append(name)
            if name in failing:
                raise OSError("the stage was cut off")
            if name in LEFT:
                storage.write_text(workdir / LEFT[name], f"{len(made)}")
            return {"number": len(made)}

        def check(c, workdir, *, fresh, name=name):
            checked.append((name, workdir is not None, fresh))
            if name in refusing:
                raise UserError("the stage refuses")

        def show(workdir, name=name):
            print(f"this is what {name} made")

        setattr(module, name, run)
        setattr(module, f"show_{name}", show)
        setattr(module, f"check_{name}", check)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    noting = tuple(
        dataclasses.replace(
            s,
            function=f"{module.__name__}:{s.name}",
            check=f"{module.__name__}:check_{s.name}",
            show=s.show and f"{module.__name__}:show_{s.name}",
            given=(),
        )
        for s in stages.STAGES
    )
    monkeypatch.setattr(stages, "STAGES", noting)
    return types.SimpleNamespace(made=made, checked=checked, failing=failing, refusing=refusing)


ALL = ("prepare", "tokenizer", "train", "eval", "generate", "report")


@pytest.fixture
def c(tiny_sources):
    return tiny_config(tiny_sources)


def files_of(folder):
    """Every file under a folder, its content and its time: what must not change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


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
    assert "made" not in output
    recipe.run(c, tmp_path, ("generate",))  # alone, what it made is what was asked for
    assert "this is what generate made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "reruns"),
    [
        ("data.min_bytes", 5, ALL),
        ("tokenizer.split_digits", False, ALL[1:]),
        ("model.layers", 1, ALL[2:]),
        ("seed", 7, ALL[2:]),
        ("train.duration", "12 steps", ALL[2:]),
        ("eval.stride", 3, ("eval", "report")),
        ("generate.temperature", 0.5, ("generate", "report")),
        ("name", "other", ("report",)),
        ("parallel.mesh", "data=1", ("report",)),  # where it runs is not what it makes
        ("train.log_every", 1.0, ("report",)),
        ("checkpoint.keep", 3, ("report",)),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it_and_says_which(calls, c, tmp_path, capsys, key, value, reruns):
    recipe.run(c, tmp_path, ALL)
    calls.made.clear()
    capsys.readouterr()
    before = config.flatten(c.to_dict())[key]
    config.set_key(c, key, value)
    recipe.run(c, tmp_path, ALL, again=key != "train.duration")
    assert calls.made == list(reruns)
    output = capsys.readouterr().out
    for stage in reruns[:-1]:
        how = "goes on from step 8, although" if (key, stage) == ("train.duration", "train") else "runs again, because"
        assert f"{stage}: {how} {key} changed from {before!r} to {value!r}" in output


@pytest.mark.parametrize(
    ("key", "value"), [("data.min_bytes", 5), ("tokenizer.split_digits", False), ("model.layers", 1), ("seed", 7)]
)
@pytest.mark.parametrize("stages", [ALL, "its own"])
def test_what_would_make_another_training_of_it_is_refused_and_changes_nothing(calls, c, tmp_path, key, value, stages):
    recipe.run(c, tmp_path, ALL)
    calls.made.clear()
    config.set_key(c, key, value)
    before = files_of(tmp_path)
    own = {"data": "prepare", "tokenizer": "tokenizer"}.get(key.partition(".")[0], "train")
    with pytest.raises(UserError, match=rf"{key} changed from .* Give another --workdir, or --again"):
        recipe.run(c, tmp_path, ALL if stages == ALL else (own,))
    assert calls.made == [] and files_of(tmp_path) == before
    recipe.run(c, tmp_path / "another", ALL)  # the first piece of advice
    assert calls.made == list(ALL)
    recipe.run(c, tmp_path, ALL, again=True)  # the second
    assert (tmp_path / "before-1" / LEFT["train"]).read_text() == "3"
    assert (tmp_path / LEFT["train"]).read_text() != "3"


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "train.micro_batches", "train.rewind.limit"])
def test_a_change_after_the_end_is_refused_for_nothing_would_follow_from_it(calls, c, tmp_path, key):
    recipe.run(c, tmp_path, ALL)
    config.set_key(c, key, 4)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=rf"is finished after 8 steps.*{key} changed.*Give a longer train.duration"):
        recipe.run(c, tmp_path, ALL)
    assert files_of(tmp_path) == before
    config.set_key(c, "train.duration", "16 steps")  # the advice
    recipe.run(c, tmp_path, ALL)
    [note] = json.loads((tmp_path / "stages.json").read_text())["train"]["changes"]
    assert note["step"] == 8 and note["settings"]["train.duration"] == ["8 steps", "16 steps"]


def test_an_unfinished_training_goes_on_under_a_lower_rate(calls, c, tmp_path, capsys):
    """What the loop and train/rewind.py advise when the loss does not come down."""
    recipe.run(c, tmp_path, ALL[:2])
    calls.failing.add("train")
    with pytest.raises(OSError, match="cut off"):
        recipe.run(c, tmp_path, ALL)
    storage.write_text(tmp_path / LEFT["train"], "of the first start")
    calls.failing.clear()
    config.set_key(c, "optimizer.learning_rate", 1e-4)
    recipe.run(c, tmp_path, ALL)
    assert "train: goes on from step 8, although optimizer.learning_rate changed from 0.01" in capsys.readouterr().out
    assert not (tmp_path / "before-1").exists()


@pytest.mark.parametrize(
    "past", [{"train__batch_ramp": "50%"}, {"data__mixture": ("0%: a=1", "50%: a=1")}, {"data__max_epochs": 2.0}]
)
def test_a_longer_duration_that_moves_batches_already_seen_is_another_training(calls, tiny_sources, tmp_path, past):
    c = tiny_config(tiny_sources, **past)
    recipe.run(c, tmp_path, ALL)
    config.set_key(c, "train.duration", "12 steps")
    with pytest.raises(UserError, match=r"train.duration changed from '8 steps' to '12 steps', which makes it another"):
        recipe.run(c, tmp_path, ALL)


def test_every_stage_that_can_be_checked_is_checked_before_the_first_begins(calls, c, tmp_path):
    calls.refusing.add("generate")
    with pytest.raises(UserError, match="the stage refuses"):
        recipe.run(c, tmp_path / "run", ALL)
    assert calls.made == [] and not (tmp_path / "run").exists()
    assert calls.checked == [("prepare", True, False), *((stage, False, False) for stage in ALL[1:5])]
    calls.refusing.clear()
    calls.checked.clear()
    recipe.run(c, tmp_path / "run", ALL)
    assert calls.checked[len(ALL) :] == [(stage, True, False) for stage in ALL]  # once more, when its turn has come


def test_a_check_knows_that_the_training_so_far_is_to_be_moved_away(calls, c, tmp_path):
    recipe.run(c, tmp_path, ALL)
    config.set_key(c, "seed", 7)
    calls.checked.clear()
    recipe.run(c, tmp_path, ("train",), again=True)
    assert calls.checked == [("train", True, True)] * 2


@pytest.mark.parametrize("stage", ["prepare", "tokenizer", "train"])
def test_a_stage_whose_results_were_deleted_is_not_done(calls, c, tmp_path, stage):
    recipe.run(c, tmp_path, ALL)
    calls.made.clear()
    (tmp_path / LEFT[stage]).unlink()
    (tmp_path / "checkpoints" / "8").rmdir() if stage == "train" else None
    recipe.run(c, tmp_path, ALL)
    assert calls.made == [stage, "report"]


def test_changed_source_files_rerun_everything(calls, c, tmp_path, capsys):
    source = tmp_path / "source.txt"
    source.write_text("one text")
    config.set_key(c, "data.sources", str(source))
    recipe.run(c, tmp_path / "run", ALL)
    calls.made.clear()
    source.write_text("another text")
    recipe.run(c, tmp_path / "run", ALL[3:])  # what was prepared stands for the sources
    assert calls.made == ["report"]
    with pytest.raises(UserError, match=r"the files of data.sources changed, which makes it another one"):
        recipe.run(c, tmp_path / "run", ALL)
    recipe.run(c, tmp_path / "run", ALL, again=True)
    assert calls.made == ["report", *ALL]
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


def test_what_was_set_aside_can_still_be_loaded(calls, c, tmp_path, capsys):
    for number, layers in enumerate((2, 1, 3)):
        config.set_key(c, "model.layers", layers)
        recipe.run(c, tmp_path, ALL, again=True)
        (tmp_path / "metrics.jsonl").write_text(f"{number}\n")
        storage.write_text(tmp_path / "tokenizer" / "byte.json", "{}")
    for number in (0, 1):
        aside = tmp_path / f"before-{number + 1}"
        assert (aside / LEFT["train"]).is_file() and (aside / "tokenizer" / "byte.json").is_file()
        assert json.loads((aside / "config.json").read_text())["model"]["layers"] == (2, 1)[number]
        assert not (aside / "tokenizer" / "tokens").exists()  # the text is not needed for that, and is large
        assert (aside / "metrics.jsonl").read_text() == f"{number}\n"
        assert f"moved to {aside}" in capsys.readouterr().out or number


def test_one_stage_runs_again_on_demand_though_nothing_changed(calls, c, tmp_path):
    recipe.run(c, tmp_path, ALL)
    recipe.run(c, tmp_path, ("train",), again=True)
    assert calls.made == [*ALL, "train"] and (tmp_path / "before-1" / LEFT["train"]).is_file()
    recipe.run(c, tmp_path, ALL, again=True)  # of a whole recipe only what changed
    assert calls.made == [*ALL, "train", "report"]


def test_a_damaged_stages_file_can_be_deleted_as_its_error_says(calls, c, tmp_path):
    recipe.run(c, tmp_path, ALL)
    for content in ("{torn", "[]", '{"train": 1}', '{"train": {"done": true}}'):
        (tmp_path / "stages.json").write_text(content)
        with pytest.raises(UserError, match=r"stages.json is damaged \(.*: delete it, and the stages run again"):
            recipe.run(c, tmp_path, ALL)
    (tmp_path / "stages.json").unlink()
    meta = {"config": {**c.to_dict()}}
    storage.write_json(tmp_path / "checkpoints" / "8" / "meta" / "metadata", meta)
    (tmp_path / "checkpoints" / "8" / "params").mkdir()
    calls.made.clear()
    config.set_key(c, "seed", 7)
    with pytest.raises(UserError, match="seed changed from 0 to 7"):  # the checkpoint knows what it was made with
        recipe.run(c, tmp_path, ALL)
    config.set_key(c, "seed", 0)
    recipe.run(c, tmp_path, ALL)
    assert calls.made == list(ALL) and not (tmp_path / "before-1").exists()


def test_an_imported_model_is_neither_retrained_nor_retokenized_in_place(calls, c, tmp_path):
    storage.write_json(tmp_path / "checkpoints" / "0" / "meta" / "metadata", {"config": {}, "imported": {}})
    (tmp_path / "checkpoints" / "0" / "params").mkdir()
    for names in (ALL, ("tokenizer",), ("train",)):
        with pytest.raises(UserError, match=r"holds an imported model.*train.init_from=|needs prepare|needs tokenizer"):
            recipe.run(c, tmp_path, names)
    recipe.run(c, tmp_path, ("generate",))
    assert calls.made == ["generate"]


def test_a_stage_without_its_predecessors_says_what_to_run_first(calls, c, tmp_path):
    with pytest.raises(UserError, match=r"eval needs train, which has not been run .* `llmjax train` first"):
        recipe.run(c, tmp_path, ("eval",))
    with pytest.raises(ValueError, match="there is no stage 'trian' of data.format=text; stages are prepare"):
        recipe.run(c, tmp_path, ("trian",))
    assert calls.made == []


def test_a_second_process_is_refused_changes_nothing_and_the_lock_goes_with_its_holder(calls, c, tmp_path):
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


def test_the_whole_recipe_runs_as_a_command_and_runs_again_in_a_moment(tiny_run, capsys):
    command = ("run", "--workdir", tiny_run)
    status, output = run_command(*command)
    assert status == 0, output
    assert "prepare: done already" in output
    results = json.loads((tiny_run / "results.json").read_text())
    assert results["bits_per_byte"] > 0
    assert results["train/steps"] == 8
    assert (tiny_run / "report" / "index.html").stat().st_size > 1000
    assert cli.main([*map(str, command)]) == 0
    output = capsys.readouterr().out
    for stage in ALL[:-1]:
        assert f"{stage}: done already, skipped" in output
