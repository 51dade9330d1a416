"""A chain runs recipes that start from each other, checks all before any begins, and never trains on a start that changed."""

import dataclasses
import json
import shutil
import sys
import types

import pytest
from helpers import tiny_config

from llmjax import cli, config, recipe, storage
from llmjax.errors import UserError
from llmjax.post import rows
from llmjax.recipe import chain, named, record, stages
from llmjax.train import folders

LEAVES = {"prepare": "prepare/train/a.jsonl", "tokenizer": "tokenizer/tokens/index.json", "train": "checkpoints/8/x"}
STAGES = ("prepare", "tokenizer", "train")


@pytest.fixture
def calls(monkeypatch):
    """Stages that only say that they ran, as LINK/STAGE, and leave a file."""
    made: list[str] = []
    starts: dict[str, list[str]] = {}
    failing: set[str] = set()
    refusing: set[str] = set()
    module = types.ModuleType("stages_of_links")
    for name in stages.all_names():

        def run(c, workdir, name=name):
            made.append(f"{c.name}/{name}")
            if f"{c.name}/{name}" in failing:
                raise OSError("the stage was cut off")
            storage.write_text(workdir / LEAVES.get(name, f"{name}/x"), "")
            return {"loss": len(made)}

        def check(c, workdir, *, fresh, name=name):
            if name == "train":
                starts.setdefault(c.name, []).append(c.train.init_from)
            if f"{c.name}/{name}" in refusing:
                raise UserError("the stage refuses")

        setattr(module, name, run)
        setattr(module, f"check_{name}", check)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    own = {"show": "", "given": ()}
    noting = [
        dataclasses.replace(s, function=f"stages_of_links:{s.name}", check=f"stages_of_links:check_{s.name}", **own)
        for s in stages.STAGES
    ]
    monkeypatch.setattr(stages, "STAGES", tuple(noting))
    return types.SimpleNamespace(made=made, starts=starts, failing=failing, refusing=refusing)


@pytest.fixture
def links(tiny_sources):
    """base -> more -> last."""
    made = {}
    for name, start in (("base", ""), ("more", "base"), ("last", "more")):
        made[name] = tiny_config(tiny_sources, name=name, stages=STAGES, train__init_from=start)
    return made


def run(links, workdir, *, again=False, **changes):
    """Run a chain with `changes` of links, as LINK__KEY."""
    changed = {name: config.from_json(config.to_json(c)) for name, c in links.items()}
    for key, value in changes.items():
        name, _, rest = key.partition("__")
        config.set_key(changed[name], rest.replace("__", "."), value)
    chain.run(changed, workdir, given={}, again=again)


def all_of(*names):
    return [f"{name}/{stage}" for name in names for stage in STAGES]


def test_each_link_starts_from_the_one_it_names_and_is_skipped_when_it_is_done(calls, links, tmp_path, capsys):
    run(links, tmp_path)
    assert calls.made == all_of("base", "more", "last")
    assert calls.starts["last"][-1] == str(tmp_path / "more")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["more/train/loss"] == 6 and results["last/train/loss"] == 9
    assert json.loads((tmp_path / "last" / "config.json").read_text())["train"]["init_from"] == str(tmp_path / "more")
    capsys.readouterr()
    run(links, tmp_path)
    assert len(calls.made) == 9
    assert capsys.readouterr().out.count("train: done already") == 3


def test_a_chain_that_was_cut_off_goes_on_where_it_was(calls, links, tmp_path):
    calls.failing.add("more/train")
    with pytest.raises(OSError, match="cut off"):
        run(links, tmp_path)
    assert calls.made == [*all_of("base"), *all_of("more")]
    calls.failing.clear()
    calls.made.clear()
    run(links, tmp_path)
    assert calls.made == ["more/train", *all_of("last")]


def test_a_chain_that_was_moved_goes_on_where_it_was(calls, links, tmp_path):
    calls.failing.add("last/train")
    with pytest.raises(OSError, match="cut off"):
        run(links, tmp_path / "here")
    calls.failing.clear()
    calls.made.clear()
    (tmp_path / "here").rename(tmp_path / "there")
    run(links, tmp_path / "there")
    assert calls.made == ["last/train"]
    assert calls.starts["last"][-1] == str(tmp_path / "there" / "more")
    run(links, tmp_path / "there")
    assert calls.made == ["last/train"]


def test_a_start_is_the_same_folder_under_any_path(calls, links, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.run(links["base"], tmp_path / "start", STAGES)
    for path in ("start", str(tmp_path / "start"), "start/../start"):
        more = config.from_json(config.to_json(links["more"]))
        more.train.init_from = path
        recipe.run(more, tmp_path / "run", STAGES)
    assert calls.made == all_of("base", "more")


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_and_what_its_settings_name_may_move_apart_from_each_other(calls, tiny_sources, tmp_path):
    shutil.copytree(tiny_sources, tmp_path / "here" / "text")
    for name in ("start", "teacher"):
        storage.write_text(tmp_path / "here" / name / "checkpoints" / "8" / "params" / "a", f"the weights of {name}")
    here, there = tmp_path / "here", tmp_path / "there"

    def config_at(folder):
        named = {"train__init_from": str(folder / "start"), "objective__distill__teacher": str(folder / "teacher")}
        return tiny_config(folder / "text", name="more", stages=STAGES, **named)

    recipe.run(config_at(here), tmp_path / "run", STAGES)
    here.rename(there)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):  # and again, by what was noted of the path that is gone
        recipe.run(config_at(there), moved, STAGES)
        recipe.run(config_at(there), moved, ("train",))
    assert calls.made == all_of("more")
    there.rename(tmp_path / "gone")
    recipe.run(config_at(there), moved, STAGES)  # by what was noted of both paths
    (tmp_path / "gone").rename(there)
    recipe.run(config_at(there), moved, STAGES)
    assert calls.made == all_of("more")
    paths = {str(folder / name) for folder in (here, there) for name in ("start", "teacher")}
    assert record.models(moved).keys() == paths

    before = files_of(moved)
    for name, key in (("start", "train.init_from"), ("teacher", "objective.distill.teacher")):
        file = there / name / "checkpoints" / "8" / "params" / "a"
        own = file.read_text()
        file.write_text("other weights")
        with pytest.raises(UserError, match=f"{key} changed from .* makes it another one"):
            recipe.run(config_at(there), moved, STAGES)
        file.write_text(own)
    (there / "text" / "new.txt").write_text("A file that was not there before, of one more line.\n")
    with pytest.raises(UserError, match="the files of data.sources changed"):
        recipe.run(config_at(there), moved, STAGES)
    assert calls.made == all_of("more") and files_of(moved) == before


def test_reward_models_are_known_by_their_weights():
    before = {"rollout.rewards": ["model:a=0.5", "exact_match", "model:b"], "seed": 1}
    now = {"rollout.rewards": ["model:c=0.5", "exact_match", "model:b"], "seed": 2}
    known, there = {"a": "1", "b": "2"}, {"c": "1", "b": "2"}
    assert named.as_before(now, before, known, there.__getitem__) == {**before, "seed": 2}
    assert named.as_before(now, before, known, lambda path: "3") == now
    assert named.as_before(now, before, {}, lambda path: "") == now


def test_every_link_is_checked_before_the_first_one_begins(calls, links, tmp_path):
    calls.refusing.add("last/tokenizer")
    calls.refusing.add("last/prepare")
    with pytest.raises(UserError, match="last: the stage refuses"):
        run(links, tmp_path / "run")
    assert calls.made == [] and not (tmp_path / "run").exists()
    calls.refusing.clear()
    with pytest.raises(UserError, match="last starts from more, which comes later"):
        run({name: links[name] for name in ("base", "last", "more")}, tmp_path / "run")
    with pytest.raises(UserError, match=r"last: .*no_such"):
        run(links, tmp_path / "run", last__data__sources=("no_such.txt",))
    assert calls.made == [] and not (tmp_path / "run").exists()


def test_links_are_checked_against_the_trained_run_that_stands_behind_them(calls, links, tmp_path):
    outside = str(tmp_path / "outside")
    run(links, tmp_path / "run", base__train__init_from=outside)
    assert calls.starts["last"] == [outside, str(tmp_path / "run" / "more")] * 1 + [str(tmp_path / "run" / "more")]
    calls.starts.clear()
    run(links, tmp_path / "other")  # nothing is trained yet, so that only what does not read a start is checked
    assert calls.starts["base"][0] == "" and calls.starts["last"] == [str(tmp_path / "other" / "more")] * 2


def test_a_link_whose_start_changed_is_another_training_which_only_again_replaces(calls, links, tmp_path, capsys):
    run(links, tmp_path)
    calls.made.clear()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"more: .* the model of train.init_from changed, .*--again"):
        run(links, tmp_path, base__train__duration="12 steps")
    assert calls.made == [] and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    run(links, tmp_path, base__train__duration="12 steps", again=True)
    assert calls.made == ["base/train", "more/tokenizer", "more/train", "last/tokenizer", "last/train"]
    assert "train: goes on from step 8, although train.duration changed" in capsys.readouterr().out
    assert (tmp_path / "more" / "before-1").is_dir() and not (tmp_path / "base" / "before-1").exists()
    calls.made.clear()
    run(links, tmp_path, base__train__duration="12 steps", base__train__log_every=3.0)  # which changes no model
    run(links, tmp_path, base__train__duration="12 steps", last__seed=5, again=True)
    assert calls.made == ["last/train"]


def test_the_folder_of_a_chain_stands_for_its_last_finished_link(calls, links, tmp_path):
    assert config.run_of(tmp_path) == tmp_path
    calls.failing.add("last/train")
    with pytest.raises(OSError, match="cut off"):
        run(links, tmp_path)
    assert config.run_of(tmp_path) == tmp_path / "more"
    assert folders.newest(tmp_path) == tmp_path / "more" / "checkpoints" / "8"
    calls.failing.clear()
    run(links, tmp_path)
    assert folders.newest(tmp_path) == tmp_path / "last" / "checkpoints" / "8"
    assert chain.read(tmp_path)["more"].train.init_from == "base"  # so that the folder can be moved
    storage.write_json(tmp_path / "empty" / "chain.json", {"links": {"base": {}}})
    with pytest.raises(UserError, match="no link of the chain .* is finished"):
        config.run_of(tmp_path / "empty")


FILE = """
from llmjax.config import base

def get_chain(arg=""):
    made = {}
    for name, start in (("first", ""), ("second", "first")):
        made[name] = base()
        made[name].data.sources = (SOURCES,)
        made[name].stages = ("prepare", "tokenizer", "train")
        made[name].name, made[name].train.init_from = name, start
    return made
"""


def test_the_command_runs_a_file_with_a_chain_and_its_folder_again(calls, tiny_sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair.py").write_text(FILE.replace("SOURCES", repr(str(tiny_sources))))
    given = ["--config.second.train.duration=9 steps", "--config.seed=3"]
    assert cli.main(["run", "--config", "pair.py", *given]) == 0
    assert calls.made == [f"{name}/{stage}" for name in ("first", "second") for stage in STAGES]
    kept = chain.read(tmp_path / "runs" / "pair")
    assert [(c.seed, c.train.duration) for c in kept.values()] == [(3, "1000 steps"), (3, "9 steps")]
    assert cli.main(["run", "--workdir", "runs/pair"]) == 0
    assert len(calls.made) == 6
    assert cli.main(["tokenizer", "--workdir", "runs/pair"]) == 0  # another verb: of the last link
    assert calls.made[6:] == [] and "runs/pair/second" in capsys.readouterr().out
    assert cli.main(["eval", "--config", "pair.py"]) == 2
    assert "is a chain of configs: give it to `llmjax run`" in capsys.readouterr().err
    assert cli.main(["run", "--config", "pair.py", "--config.secnd.seed=3"]) == 2
    (tmp_path / "wrong.py").write_text("def get_chain(arg=''):\n    return {'train': None}\n")
    assert cli.main(["run", "--config", "wrong.py"]) == 2
    assert "a link cannot be called 'train'" in capsys.readouterr().err


def test_a_chain_is_worked_on_by_one_process(calls, links, tmp_path):
    with storage.locked(tmp_path / ".lock"), pytest.raises(UserError, match="another process is working on"):
        run(links, tmp_path)
    assert calls.made == []


def test_results_of_links_are_told_in_a_table(calls, links, tmp_path):
    run(links, tmp_path)
    assert chain.table(tmp_path) == ""  # there are none of those that it has columns for
    storage.write_json(
        tmp_path / "results.json", {"base/exact_match": 0.0, "more/exact_match": 0.5, "more/reward": 0.25}
    )
    assert [line.split() for line in chain.table(tmp_path).splitlines()] == [
        ["exact_match", "reward"], ["base", "0.000"], ["more", "0.500", "0.250"], ["last"],
    ]  # fmt: skip
    assert recipe.run  # the recipe of each link


def test_files_of_conversations_may_move_and_may_not_change(tmp_path):
    def digests(folder):
        c = tiny_config(data__format="conversations", train__init_from="x", data__sources=(str(folder / "a.jsonl"),))
        return rows.fingerprint(c), rows.fingerprint(c, folders=False)

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "a.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    before = digests(here)
    here.rename(there)
    assert digests(there)[0] != before[0] and digests(there)[1] == before[1]
    (there / "a.jsonl").write_text('{"prompt": "1+1=", "completion": "11"}\n')
    assert digests(there)[1] != before[1]
