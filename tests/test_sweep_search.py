"""Searches: spaces, samplers, halving, importance, the best config."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config

from llmjax import cli, config
from llmjax.errors import UserError
from llmjax.sweep import design, halving, importance, page, samplers, search, space, study, worker

DATA = Path("../shared/data/scaling")
TEXTS = ["optimizer.learning_rate=log(1e-4,1e-1)", "train.batch_size=8,16,32", "model.layers=integer(2,4)"]


def test_a_space_gives_values_within_its_ranges_and_their_places_back():
    for one in space.read_space(
        [*TEXTS, "model.dropout=linear(0,0.3)", "optimizer.name=adamw,lion", "model.bias=('qkv',),()"]
    ):
        values = [one.value(place) for place in np.linspace(0, 1, 50, endpoint=False)]
        config.set_key(config.base(), one.key, values[0])  # it is a value of the setting
        for place, value in zip(np.linspace(0, 1, 50, endpoint=False), values, strict=True):
            assert one.place(value) == pytest.approx(place, abs=0.6)
            assert not one.ordered or values == sorted(values)
    rate, batch, layers = space.read_space(TEXTS)
    assert rate.value(0.5) == pytest.approx(10**-2.5, rel=1e-3) and batch.value(0.99) == 32
    assert {layers.value(place) for place in np.linspace(0, 1, 20)} == {2, 3, 4}
    assert space.from_json(json.loads(json.dumps(space.as_json((rate, batch, layers))))) == (rate, batch, layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.batch_size", "write KEY=VALUES"),
        ("train.batchsize=1,2", "there is no config key train.batchsize"),
        ("train.batch_size=8", "two or more different values"),
        ("optimizer.learning_rate=log(0,1)", "0 < LOW < HIGH"),
        ("optimizer.learning_rate=exp(1,2)", "exp is not known"),
        ("seed=1,2", "give --seeds N"),
    ],
)
def test_a_space_that_is_none_says_how_to_mend_it(text, message):
    with pytest.raises(UserError, match=message):
        space.read_space([text])


@pytest.mark.parametrize("name", ["random", "quasi-random"])
def test_a_point_follows_from_its_number_and_the_seed(name):
    one = space.read_space(TEXTS)
    points = [samplers.SAMPLERS[name](one, i, 7, ()) for i in range(16)]
    assert points == [samplers.SAMPLERS[name](one, i, 7, ()) for i in range(16)]
    assert points != [samplers.SAMPLERS[name](one, i, 8, ()) for i in range(16)]


def test_quasi_random_points_cover_every_eighth_of_a_range():
    (one,) = space.read_space(TEXTS[:1])
    points = [samplers.quasi_random((one,), i, 3, ()) for i in range(8)]
    assert sorted(int(one.place(point[one.key]) * 8) for point in points) == list(range(8))


def test_tpe_without_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'llmjax\[search\]', or take --sampler quasi-random"):
        search.make(tiny_config(), space.read_space(TEXTS), sampler="tpe", count=4, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs llmjax[search]")
def test_tpe_tries_more_points_near_good_ones():
    one = space.read_space([TEXTS[0], "optimizer.name=adamw,lion"])
    known: list[samplers.Known] = []
    for i in range(24):
        settings = samplers.tpe(one, i, 0, known)
        loss = abs(np.log10(settings["optimizer.learning_rate"]) + 2) + (settings["optimizer.name"] == "lion")
        known.append(samplers.Known(settings, None if i == 3 else (float(loss),)))
    first, last = (np.mean([k.values[0] for k in part if k.values]) for part in (known[:8], known[-8:]))
    assert last < 0.7 * first


def test_rungs_leave_one_arm_and_the_best_of_each_go_on():
    assert halving.rungs(900, count=9) == [100, 300, 900] and halving.rungs(10, count=1) == [10]
    assert halving.survivors({"a": 3.0, "b": None, "c": 1.0, "d": 2.0}) == ["c", "d"]
    assert halving.survivors({"a": 3.0, "b": 1.0}, better="higher") == ["a"]
    losses = [[3.0 - i / 10, 2.0 - i / 10] for i in range(9)]
    assert halving.chosen(losses, [0, 1])[0] == 8 and halving.chosen(losses, [0, 1])[1].count(1) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__duration": "1M tokens"}, "give train.duration in steps"),
        ({}, "schedule.name=cosine misleads"),
        ({"schedule__name": "constant"}, "give it in steps"),
    ],
)
def test_halving_refuses_what_rungs_would_mislead(changes, message):
    with pytest.raises(UserError, match=message):
        halving.check(tiny_config(**changes))


def test_importance_finds_the_setting_that_matters_though_its_best_lies_inside():
    one = space.read_space([TEXTS[0], TEXTS[1], "optimizer.name=adamw,lion"])
    points = [samplers.quasi_random(one, i, 0, ()) for i in range(48)]
    values = [
        (np.log10(point["optimizer.learning_rate"]) + 2.5) ** 2 + 0.2 * (point["optimizer.name"] == "lion")
        for point in points
    ]
    rate, batch, name = importance.importances(one, points, values)
    assert rate.mean > 5 * name.mean > 5 * batch.mean and rate.low > name.high and rate.explained > 0.95
    assert importance.importances(one, points[:6], values[:6]) == []


# ------------------------------------------------------------------ studies


@pytest.fixture
def curve(monkeypatch):
    """Runs that take no time: the loss falls with steps and is lowest at a rate of 0.01; (rate, steps) that were run."""
    ran = []

    def run_stages(folder, c, run):
        steps = int(str(c.train.duration).split()[0])
        ran.append((c.optimizer.learning_rate, steps))
        return {"bits_per_byte": abs(np.log10(c.optimizer.learning_rate) + 2) + 10 / steps}

    monkeypatch.setattr(worker, "run_stages", run_stages)
    return ran


def run_search(folder: Path, sampler: str, count: int, **changes) -> study.Study:
    c = tiny_config(**changes).lock()
    made = search.make(c, space.read_space(TEXTS[:1]), sampler=sampler, count=count, seed=0)
    found = search.first(folder, c, made, design.Design({}))
    study.write(found)
    wanted = lambda: study.open_trials(search.propose(folder), study.rows(folder))  # noqa: E731
    worker.work(found, wanted=wanted)
    return study.read(folder)


def test_a_search_writes_its_best_config_and_more_trials_reuse_what_is_there(tmp_path, curve):
    run_search(tmp_path, "quasi-random", 8)
    found = run_search(tmp_path, "quasi-random", 16)
    assert len(curve) == 16 == len(found.design.arms)
    summary = page.write_results(tmp_path)
    rates = [rate for rate, _ in curve]
    best = min(rates, key=lambda rate: abs(np.log10(rate) + 2))
    assert summary["best"]["settings"] == {"optimizer.learning_rate": best}
    assert summary["importance"]["optimizer.learning_rate"]["mean"] > 0.5
    (tmp_path / "best.py").write_text(search.best_config(found, summary))
    c = config.load(str(tmp_path / "best.py"))
    assert c.optimizer.learning_rate == best
    assert set(config.differences(c, found.config)) <= {"optimizer.learning_rate"}
    assert "The best so far" in page.write(tmp_path).read_text()


def test_halving_goes_on_with_the_best_third_in_their_own_runs(tmp_path, curve):
    steady = {"schedule__name": "constant", "schedule__warmup": "2 steps", "train__duration": "90 steps"}
    found = run_search(tmp_path, "halving", 9, **steady)
    assert sorted(steps for _, steps in curve) == [10] * 9 + [30] * 3 + [90]
    by_rung = {steps: {rate for rate, at in curve if at == steps} for steps in (10, 30, 90)}
    assert by_rung[90] < by_rung[30] < by_rung[10]
    best = min(by_rung[10], key=lambda rate: abs(np.log10(rate) + 2))
    assert by_rung[90] == {best}
    assert len({trial.run for trial in found.trials}) == 9  # longer trials go on in the run of the shorter ones
    summary = page.write_results(tmp_path)
    assert summary["best"]["settings"]["optimizer.learning_rate"] == best
    assert "train.duration" not in search.best_config(found, summary).split("def ")[0]
    assert "'train.duration', '90 steps'" in search.best_config(found, summary)


def test_several_metrics_show_the_points_that_nothing_beats(tmp_path, monkeypatch):
    values = iter([(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (0.5, 9.0)])

    def run_stages(folder, c, run):
        loss, seconds = next(values)
        return {"bits_per_byte": loss, "train/train_seconds": seconds}

    monkeypatch.setattr(worker, "run_stages", run_stages)
    c = tiny_config().lock()
    made = search.make(c, space.read_space(TEXTS[:1]), sampler="random", count=4, seed=0)
    two = design.Design({}, metric=("bits_per_byte", "train/train_seconds"), better=("lower", "lower"))
    found = search.first(tmp_path, c, made, two)
    study.write(found)
    worker.work(found, wanted=lambda: study.open_trials(found, study.rows(tmp_path)))
    front = page.write_results(tmp_path)["trade_offs"]
    assert sorted(one["bits_per_byte"] for one in front) == [0.5, 1.0, 2.0]


def test_the_command_shows_a_search_before_it_runs(tmp_path, capsys):
    words = [
        "sweep",
        "--config",
        "configs/quickstart.py",
        "--sweep",
        *TEXTS[:2],
        "--trials",
        "3",
        "--workdir",
        str(tmp_path / "s"),
    ]
    assert cli.main([*words, "--config.train.duration=20 steps", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "3 arms" in shown and "3 trials are open" in shown and shown.count("llmjax sweep --trial") == 3
    assert not (tmp_path / "s").exists() and os.environ["LLMJAX_CACHE"] == "off"


@pytest.mark.skipif(not DATA.exists(), reason="needs published points")
def test_halving_on_gemstones_curves_chooses_the_same_for_half_the_compute():
    import search as benchmark  # benchmarks/search.py

    with (DATA / "gemstones_fineweb_dclm.csv").open() as file:
        found = benchmark.halving_of(list(csv.DictReader(file)))
    assert found["same"] and found["compute"] <= 0.5
