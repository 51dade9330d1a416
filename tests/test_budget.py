"""Budgets: what FLOPs, days, dollars, a size or a loss buy, and where each number is from."""

import argparse
import json

import pytest

from llmjax import cli, config
from llmjax.errors import UserError
from llmjax.sweep import budget, budget_run, published
from llmjax.sweep.budget_command import quantity
from llmjax.sweep.laws import Law

LAW = Law(E=1.8172, A=477.83, B=2143.42, alpha=0.34731, beta=0.36717)


def ask(tmp_path, *words: str) -> dict:
    out = tmp_path / "budget.json"
    assert cli.main(["budget", *words, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_chinchillas_budget_buys_seventeen_tokens_a_parameter(tmp_path, capsys):
    made = ask(tmp_path, "--flops", "5.76e23", "--write-config", str(tmp_path / "run.py"))
    assert made["parameters"]["value"] == pytest.approx(73e9, rel=0.02) and made["parameters"]["kind"] == "fitted"
    assert made["tokens"]["value"] / made["parameters"]["value"] == pytest.approx(17.9, abs=0.1)
    loss = made["loss"]
    assert loss["low"] < loss["value"] < loss["high"] and loss["kind"] == "fitted"
    assert {name: made[name]["kind"] for name in ("days", "dollars")} == {"days": "assumed", "dollars": "assumed"}
    assert 15 < made["days"]["value"] <= 30  # as many chips as that takes
    assert made["mesh"]["memory"] < made["mesh"]["available"]
    c = config.load(str(tmp_path / "run.py"))
    assert budget_run.counted(c) == pytest.approx(made["parameters"]["value"], rel=0.05)
    tokens = c.train.batch_size * c.train.sequence_length * int(c.train.duration.split()[0])
    assert tokens == pytest.approx(made["tokens"]["value"], rel=0.01)
    assert "far" not in loss["source"] or "times beyond its runs" in loss["source"]
    assert "assumed: " in capsys.readouterr().out


def test_days_and_dollars_buy_what_the_chips_compute():
    machine = budget.Machine("v5p", 128, budget.Figure(0.5, "assumed", ""), budget.Figure(2.0, "assumed", ""))
    laws = budget.read_law()
    week = budget.plan(budget.Asked(days=7), laws, machine)
    assert week["flops"].value == pytest.approx(128 * 459e12 * 0.5 * 7 * 86400) and week["days"].value == pytest.approx(
        7
    )
    assert week["dollars"].value == pytest.approx(128 * 7 * 24 * 2.0)
    paid = budget.plan(budget.Asked(dollars=week["dollars"].value), laws, machine)
    assert paid["parameters"].value == pytest.approx(week["parameters"].value)
    given = budget.plan(budget.Asked(parameters=7e9), laws, machine)
    again = budget.of_flops(laws.law, given["flops"].value)
    assert again.parameters == pytest.approx(7e9) and given["parameters"].source == "given"


def test_costs_that_were_published_follow():
    """Llama 3.1 405B on 15.6T tokens at 40 %: 26.6M H100-hours; DeepSeek-V3: 2.788M hours at 2 dollars are 5.576M."""
    size = budget.Size(405e9, 15.6e12)
    machine = budget.Machine("h100", 16384, budget.Figure(0.4, "assumed", ""), budget.Figure(2.0, "assumed", ""))
    assert size.flops / machine.flops_per_second / 3600 * machine.count == pytest.approx(26.6e6, rel=0.01)
    assert pytest.approx(machine.flops_per_dollar / (989e12 * 0.4 * 3600)) == 2.788e6 / (2.788e6 * 2.0)


def test_what_will_be_served_makes_the_model_smaller_and_its_training_longer():
    alone, used = budget.of_loss(LAW, 2.1), budget.of_loss(LAW, 2.1, served=2e12)
    assert float(LAW.loss(alone.parameters, alone.tokens)) == pytest.approx(2.1)
    assert float(LAW.loss(used.parameters, used.tokens)) == pytest.approx(2.1)
    assert used.parameters < 0.8 * alone.parameters and used.tokens > alone.tokens

    def total(size):
        return size.flops + 2 * size.parameters * 2e12

    assert total(used) < total(alone) and used.flops > alone.flops
    assert alone.flops == pytest.approx(budget.of_flops(LAW, alone.flops).flops)
    assert alone.parameters == pytest.approx(LAW.best_size(alone.flops), rel=1e-4)
    spent = budget.of_flops(LAW, total(used), served=2e12)
    assert total(spent) == pytest.approx(total(used)) and spent.parameters == pytest.approx(used.parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--days", "7"], "--days needs --chips CHIP:N"),
        (["--flops", "1e21", "--chips", "v9:4"], "the chip 'v9' is not known"),
        (["--flops", "1e21", "--chips", "h100:x"], "write their number"),
        (["--target-loss", "1.5"], "no model reaches a loss of 1.5"),
        (["--flops", "1e15", "--served-tokens", "1000T"], "serving 1e.15 tokens takes all"),
        (["--dollars", "100", "--chips", "b200:8"], "the price of b200 is not known: give --price"),
        (["--flops", "1e21", "--law", "missing.json"], "there is no law missing.json"),
        (["--flops", "1e21", "--run", "missing"], "give --mfu instead"),
        (["--dollars", "100", "--price", "0"], "the price of h100 is 0: give --price"),
        (["--flops", "1e300"], "no law tells of a run with more than 1e.18 parameters: give less"),
        (["--params", "0.5"], "fewer than 1e.04 parameters: give more"),
        (["--target-loss", "1e9"], "fewer than 1e.04 parameters: give less"),
    ],
)
def test_a_budget_that_buys_nothing_says_how_to_mend_it(words, message, capsys):
    import re

    assert cli.main(["budget", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_law_and_a_share_of_the_peak_may_be_ones_own(tmp_path):
    (tmp_path / "law.json").write_text(
        json.dumps({"E": 2.0, "A": 400.0, "B": 400.0, "alpha": 0.3, "beta": 0.3, "largest_flops": 1e18})
    )
    (tmp_path / "results.json").write_text(json.dumps({"train/mfu": 0.31}))
    machine = budget.Machine("h100", 8, budget.measured_mfu(tmp_path), budget.Figure(2.0, "assumed", ""))
    figures = budget.plan(budget.Asked(flops=1e20), budget.read_law(tmp_path / "law.json"), machine)
    assert figures["parameters"].value == pytest.approx(figures["tokens"].value)  # both terms are alike
    assert "more than 10 times beyond its runs" in figures["loss"].source and figures["loss"].low is None
    assert figures["days"].kind == "fitted" and "measured in" in figures["days"].source
    whole = {"E": 2.0, "A": 400.0, "B": 400.0, "alpha": 0.3, "beta": 0.3}
    for broken in (
        {},
        [],
        whole | {"E": "two"},
        whole | {"alpha": -0.3},
        whole | {"B": float("nan")},
        whole | {"resampled": [[1.0]]},
    ):
        (tmp_path / "law.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="is no law"):
            budget.read_law(tmp_path / "law.json")


def test_quantities_are_read_as_people_write_them():
    for text, value in (
        ("7B", 7e9), ("7b", 7e9), ("1.4T", 1.4e12), ("1E21", 1e21), ("1e+21", 1e21), ("5e-3", 0.005), (".5M", 5e5),
        ("1,000,000", 1e6), ("1_000", 1e3), ("25000", 25e3),
    ):  # fmt: skip
        assert quantity(text) == value
    for text in ("", ".", "0", "-1", "1e400", "nan", "inf", "1,00,000", "7 B x", "B", "1e", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="no number above 0"):
            quantity(text)


def test_what_no_config_has_is_said_and_three_chips_have_a_mesh(capsys):
    assert cli.main(["budget", "--params", "1e5"]) == 0
    assert "2.15M parameters (the nearest that a config has to 100K)" in capsys.readouterr().out
    assert cli.main(["budget", "--days", "0.001", "--chips", "h100:3"]) == 0
    assert "parallel.mesh=data=3" in capsys.readouterr().out


def test_a_torus_is_as_round_as_its_chips_allow():
    assert budget_run.topology("v5p", 128).shape == (4, 4, 8) and budget_run.topology("v5e", 16).shape == (4, 4)
    assert budget_run.topology("h100", 24).shape == (24,)


def test_shapes_have_about_the_parameters_asked_for():
    for parameters in (5e7, 1e9, 7e9, 7e10, 5e11):
        layers, width = budget_run.shape(parameters)
        assert 12 * layers * width**2 + budget_run.VOCABULARY * width == pytest.approx(parameters, rel=0.06)
        assert 50 < width / layers < 200


def test_rules_say_what_their_papers_say():
    assert published.step_law(1e9, 1e11).rate == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert published.deepseek(1e20).rate == pytest.approx(0.3118 * 1e20**-0.125)
    assert published.round_batch(1e6, length=2048) == 512 and published.round_batch(1.0, length=2048) == 1
