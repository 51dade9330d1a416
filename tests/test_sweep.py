"""Studies: what is compared, leases, workers, statistics, the page."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import tiny_config

from llmjax import cli, config, recipe, storage
from llmjax.errors import Diverged, UserError
from llmjax.sweep import comparison, cost, design, page, study, worker, workers

ARMS = {"control": {}, "sgd": {"optimizer.name": "sgd"}}


def planned(folder: Path, sources: Path | str = "stdlib", **tree) -> study.Study:
    """A study of tiny runs, written."""
    c = tiny_config(sources, stages=("prepare", "tokenizer", "train", "eval", "generate", "report")).lock()
    found = study.plan(folder, c, design.read_design({"arms": ARMS, "seeds": 2, **tree}))
    study.write(found)
    return found


def work(found: study.Study) -> None:
    worker.work(found, wanted=lambda: study.open_trials(found, study.rows(found.folder)))


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that take no time: the value is the seed, and 1 more with sgd; the list of (name, seed) that were run."""
    ran = []

    def run_stages(folder, c, run):
        ran.append((c.name, c.seed))
        value = c.seed + (1.0 if c.optimizer.name == "sgd" else 0.0) + 0.1 * c.seed * (c.optimizer.name == "sgd")
        return {"bits_per_byte": value, "train/loss": 2.0, "train/flops": 1e9, "train/tokens": 10, "train/steps": 1}

    monkeypatch.setattr(worker, "run_stages", run_stages)
    return ran


# ------------------------------------------------------------------ designs


def test_a_design_names_every_combination_of_a_grid():
    made = design.read_design({"grid": {"train.batch_size": (8, 16), "optimizer.learning_rate": (1e-3, 0.01)}})
    assert list(made.arms) == [
        "batch_size=8 learning_rate=0.001", "batch_size=8 learning_rate=0.01",
        "batch_size=16 learning_rate=0.001", "batch_size=16 learning_rate=0.01",
    ]  # fmt: skip
    assert made.control == "batch_size=8 learning_rate=0.001" and made.seeds == (0,)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"arm": ARMS}, "the closest is 'arms'"),
        ({}, "names no arms"),
        ({"arms": ARMS, "control": "adam"}, "the control 'adam', which is no arm"),
        ({"arms": ARMS, "seeds": (1, 1)}, "different whole numbers"),
        ({"arms": {"other": {"seed": 1}}}, "give seeds beside the arms"),
        ({"arms": ARMS, "better": "less"}, "write lower or higher"),
        ([], "return a dict"),
    ],
)
def test_a_design_that_is_wrong_says_how_to_mend_it(tree, message):
    with pytest.raises(UserError, match=message):
        design.read_design(tree)


def test_what_only_sets_the_pace_is_no_part_of_a_trial():
    made = design.read_design({"arms": ARMS, "seeds": 2})
    first = design.trials(tiny_config(), made)
    assert len({one.id for one in first}) == 4 and [one.seed for one in first] == [0, 0, 1, 1]
    same = tiny_config(
        prepare__workers=3, parallel__cpu_devices=1, model__remat="full", name="other", train__log_every=1.0
    )
    assert design.trials(same, made) == first
    assert not {one.id for one in design.trials(tiny_config(train__duration="9 steps"), made)} & {
        one.id for one in first
    }


def test_an_arm_that_the_config_refuses_is_named(tmp_path):
    with pytest.raises(UserError, match="arm 'wide': .*heads"):
        planned(tmp_path, arms={"control": {}, "wide": {"model.width": 33}})


# ------------------------------------------------------------------ leases


def test_of_several_that_swap_one_succeeds(tmp_path):
    path, won = tmp_path / "file", []
    assert storage.swap(path, before=None, after=b"start")

    def try_to(name):
        won.extend([name] if storage.swap(path, before=b"start", after=name) else [])

    threads = [threading.Thread(target=try_to, args=(str(i).encode(),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and path.read_bytes() == won[0]
    assert not storage.swap(path, before=b"start", after=None) and storage.swap(path, before=won[0], after=None)
    assert not path.exists()


def test_a_lease_is_one_workers_until_it_ends_or_expires(tmp_path):
    path = tmp_path / "leases" / "a.json"
    mine = storage.take_lease(path, seconds=60)
    assert mine is not None and storage.take_lease(path, seconds=60) is None
    again = storage.renew_lease(mine, seconds=-1)
    assert again is not None and storage.renew_lease(mine, seconds=60) is None
    other = storage.take_lease(path, seconds=60)  # it has expired
    assert other is not None and storage.renew_lease(again, seconds=60) is None
    storage.end_lease(again)  # no longer its own
    assert path.exists()
    storage.end_lease(other)
    assert not path.exists()


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path):
    path = tmp_path / "a.json"
    code = f"from pathlib import Path; from llmjax import storage; storage.take_lease(Path({str(path)!r}), seconds=1e6)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.exists() and storage.take_lease(path, seconds=60) is not None


def test_a_worker_that_loses_its_lease_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LEASE_SECONDS", 0.03)
    lease, lost = storage.take_lease(tmp_path / "a.json", seconds=60), threading.Event()
    assert lease is not None
    with worker.renewed(lease, lost=lost.set):
        while not storage.swap(lease.path, before=lease.path.read_bytes(), after=b"another's"):
            pass
        assert lost.wait(30)
    assert lease.path.read_bytes() == b"another's"


# ------------------------------------------------------------------ workers


def test_nothing_runs_twice_and_more_arms_and_seeds_add_to_what_is_there(tmp_path, fake_runs):
    work(planned(tmp_path))
    assert [name for name, _ in fake_runs] == ["control, seed 0", "sgd, seed 0", "control, seed 1", "sgd, seed 1"]
    work(planned(tmp_path))
    assert len(fake_runs) == 4
    work(planned(tmp_path, arms={**ARMS, "lion": {"optimizer.name": "lion"}}, seeds=3))
    assert [name for name, _ in fake_runs[4:]] == [
        "lion, seed 0",
        "lion, seed 1",
        "control, seed 2",
        "sgd, seed 2",
        "lion, seed 2",
    ]
    assert not list((tmp_path / "leases").glob("[!.]*"))


def test_a_study_of_a_version_with_fewer_settings_runs_nothing_again(tmp_path, fake_runs):
    found = planned(tmp_path)
    work(found)
    for name in ("study.json", "trials.jsonl"):  # names that were made of other settings
        text = (tmp_path / name).read_text()
        for trial in found.trials:
            text = text.replace(trial.id, trial.id[::-1])
        (tmp_path / name).write_text(text)
    tree = json.loads((tmp_path / "study.json").read_text())
    del tree["config"]["train"]["ema"]
    (tmp_path / "study.json").write_text(json.dumps(tree))
    fake_runs.clear()
    more = planned(tmp_path, seeds=3)
    assert (
        [one.id for one in more.trials[:4]]
        == [one.run for one in more.trials[:4]]
        == [t.id[::-1] for t in found.trials]
    )
    work(more)
    assert [seed for _, seed in fake_runs] == [2, 2]


def test_two_workers_share_the_trials(tmp_path, fake_runs):
    found = planned(tmp_path, seeds=6)
    threads = [threading.Thread(target=work, args=(found,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_runs) == 12 and len(set(fake_runs)) == 12


def test_failed_and_diverged_trials_are_shown_and_the_others_go_on(tmp_path, monkeypatch):
    def run_stages(folder, c, run):
        if c.seed == 1:
            raise Diverged("the gradients were not finite")
        if c.optimizer.name == "sgd":
            raise RuntimeError("the machine is on fire")
        return (
            {"bits_per_byte": float("nan")} if c.seed == 2 else {"bits_per_byte": 1.0} if c.seed == 0 else {"loss": 1.0}
        )

    monkeypatch.setattr(worker, "run_stages", run_stages)
    found = planned(tmp_path, seeds=4)
    work(found)
    arms = comparison.arms_of(found, study.rows(tmp_path))
    assert arms[0].states == {"done": 1, "diverged": 2, "failed": 1} and arms[1].states == {"diverged": 1, "failed": 3}
    assert "the run has no number 'bits_per_byte'; it has loss" in arms[0].errors[-1]
    assert any("RuntimeError: the machine is on fire" in error for error in arms[1].errors)
    html = page.write(tmp_path).read_text()
    assert "the machine is on fire" in html and "2 diverged, 1 done, 1 failed" in html


def test_retry_runs_what_failed_once_more(tmp_path, monkeypatch, capsys):
    ran = []

    def run_stages(folder, c, run):
        ran.append(c.name)
        if c.optimizer.name == "sgd":
            raise UserError("the disk is full")
        return {"bits_per_byte": 1.0}

    monkeypatch.setattr(worker, "run_stages", run_stages)
    planned(tmp_path, seeds=1)
    words = ["sweep", "--workdir", str(tmp_path)]
    assert cli.main(words) == 1 and cli.main(words) == 1
    assert ran == ["control, seed 0", "sgd, seed 0"]
    assert cli.main([*words, "--retry"]) == 1
    assert ran == ["control, seed 0", "sgd, seed 0", "sgd, seed 0"]
    assert "--retry runs them again" in capsys.readouterr().err


def test_a_line_that_a_killed_worker_left_does_not_count(tmp_path, fake_runs):
    found = planned(tmp_path)
    work(found)
    rows = study.rows(tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"trial": "' + found.trials[0].id)
    assert study.rows(tmp_path) == rows
    study.note(found, found.trials[1], "running")
    assert study.rows(tmp_path)[found.trials[1].id]["state"] == "running"


def real(folder: Path, sources: Path, *, stages: tuple[str, ...], arms: dict, metric: str) -> list[str]:
    """The words that run a study of a config file of tiny runs."""
    (folder / "conf.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from helpers import tiny_config

def get_config(arg=""):
    return tiny_config({str(sources)!r}, stages={stages!r})

def get_sweep(arg=""):
    return {{"arms": {arms!r}, "metric": {metric!r}}}
"""
    )
    return ["sweep", "--config", str(folder / "conf.py"), "--workdir", str(folder / "study")]


@pytest.fixture
def stages_run(monkeypatch):
    """The stages that recipes are asked for."""
    calls = []
    kept = recipe.run
    monkeypatch.setattr(
        recipe, "run", lambda c, run, stages, **more: calls.append(tuple(stages)) or kept(c, run, stages, **more)
    )
    return calls


def test_stages_that_trials_have_in_common_run_once(tmp_path, tiny_sources, stages_run, capsys):
    arms = {"control": {}, "char": {"tokenizer.kind": "char"}, "none": {"model.layers": 3}}
    words = real(tmp_path, tiny_sources, stages=("prepare", "tokenizer"), arms=arms, metric="tokenizer/heldout_tokens")
    folder = tmp_path / "study"
    assert cli.main([*words, "--dry-run"]) == 0
    assert not folder.exists() and "2 trials are open" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert sorted(stages_run) == [(), (), ("prepare",), ("tokenizer",), ("tokenizer",)]  # "none" changes none of them
    results = json.loads((folder / "results.json").read_text())
    assert results["arms"]["none"]["mean"] == 0 and results["arms"]["char"]["mean"] <= 0
    capsys.readouterr()
    assert cli.main(["sweep", "--workdir", str(folder)]) == 0  # without its config file
    assert "0 trials are open" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_trains_and_draws_and_may_be_moved(tmp_path, tiny_sources, stages_run, one_device):
    arms = {"control": {}, "slow": {"optimizer.learning_rate": 1e-4}}
    folder = tmp_path / "study"
    words = real(tmp_path, tiny_sources, stages=("prepare", "tokenizer", "train", "eval"), arms=arms, metric="loss")
    assert cli.main(words) == 0
    assert stages_run == [("prepare",), ("tokenizer",), ("train", "eval"), ("train", "eval")]
    results = json.loads((folder / "results.json").read_text())
    assert results["arms"]["slow"]["mean"] > 0 and results["arms"]["slow"]["seeds"] == 1
    found = study.read(folder)
    first = json.loads((found.run_folder(found.trials[0]) / "results.json").read_text())
    assert results["arms"]["control"]["value"] == first["loss"]
    shutil.move(folder, tmp_path / "moved")
    assert cli.main(["report", str(tmp_path / "moved")]) == 0
    html = (tmp_path / "moved" / "report" / "index.html").read_text()
    assert "Held-out bits per byte, first seed" in html and "optimizer.learning_rate=0.0001" in html


def test_commands_of_a_launcher_are_those_of_the_open_trials(tmp_path, fake_runs):
    found = planned(tmp_path / "study")
    wanted = workers.commands(found)
    assert wanted[0] == ["sweep", "--trial", "--workdir", str(tmp_path / "study" / "runs" / found.trials[0].run)]
    (tmp_path / "commands.txt").write_text("".join(f"{' '.join(words)}\n" for words in wanted))
    script = Path(__file__).parents[1] / "launch" / "slurm.py"
    words = [sys.executable, str(script), "--nodes", "1", "--dry-run", "--commands", str(tmp_path / "commands.txt")]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout
    assert [line for line in shown.splitlines() if "-m llmjax sweep" in line] == [
        f'    bash -c "$process" "$folder/stopped" .venv/bin/python -m llmjax {" ".join(one)} &' for one in wanted
    ]
    assert "--job-name=llmjax-3" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --config FILE with get_sweep"),
        (["--config", "configs/quickstart.py"], "has no get_sweep"),
        (["--config.seed=1"], "settings need --config"),
        (["--workdir", "nowhere"], "nowhere is no study"),
        (["--trial"], "--trial needs --workdir"),
        (
            ["--config", "configs/quickstart.py", "--sweep", "train.batch_size=8,16", "--budget", "3 steps"],
            "--budget '3 steps': give a time",
        ),
    ],
)
def test_a_sweep_that_cannot_be_says_how_to_mend_it(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------ statistics


def test_intervals_are_students_and_of_differences_by_seed():
    found = comparison.difference([1.0, 2.0, 3.0])
    assert (
        found.mean == 2.0 and found.high == pytest.approx(2 + 4.302653 / 3**0.5) and found.p == pytest.approx(0.0741799)
    )
    assert comparison.difference([1.0]) == comparison.Difference(1.0, None, None, None)


def test_holms_correction_is_that_of_the_paper():
    assert comparison.holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])


def test_results_have_differences_paired_by_seed(tmp_path, fake_runs):
    found = planned(tmp_path, seeds=3)
    work(found)
    page.write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    sgd = results["arms"]["sgd"]
    assert sgd["mean"] == pytest.approx(1.1) and sgd["seeds"] == 3  # 1, 1.1 and 1.2, though the runs vary by 2
    assert sgd["low"] == pytest.approx(1.1 - 4.302653 * 0.1 / 3**0.5) and sgd["p_holm"] == sgd["p"] < 0.01
    assert results["control"] == "control" and results["open"] == 0
    assert "| sgd |" in (tmp_path / "report" / "report.md").read_text()


def test_the_cost_is_by_formula_and_then_as_trials_took(tmp_path, fake_runs):
    found = planned(tmp_path)
    before = cost.estimate(found, {})
    assert before.trials == 4 and before.seconds is None
    c = found.config_of(found.trials[0])
    assert before.flops == pytest.approx(4 * cost.flops_of(c)) and cost.flops_of(c) > 6 * 8 * 8 * 16 * 20_000
    first, second = found.trials[:2]
    rows = {
        first.id: {"trial": first.id, "arm": "control", "state": "done", "seconds": 10.0},
        second.id: {"trial": second.id, "arm": "sgd", "state": "done", "seconds": 30.0},
    }
    assert cost.estimate(found, rows).seconds == 40.0
    assert cost.flops_of(tiny_config(train__duration="2 epochs")) is None


def test_a_study_is_read_as_it_was_written(tmp_path):
    found = planned(tmp_path)
    again = study.read(tmp_path)
    assert dataclasses.replace(again, config=found.config) == found
    assert config.differences(again.config, found.config) == {}
    (tmp_path / "study.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="damaged"):
        study.read(tmp_path)


@pytest.mark.slow
def test_killed_workers_leave_the_table_of_a_study_that_was_left_alone(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "sweep_kills.py"
    words = [sys.executable, str(script), "--small", "--pause", "4", "--out", str(tmp_path / "kills.json")]
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
