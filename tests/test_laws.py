"""Scaling laws against data with known answers."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from llmjax import cli
from llmjax.errors import UserError
from llmjax.sweep import isoflops, laws, laws_command, published
from llmjax.sweep.points import Points, read_runs, read_table

DATA = Path("../shared/data/scaling")
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs published points")
HOFFMANN = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])


def chinchilla() -> Points:
    columns = {"parameters": "Model Size", "flops": "Training FLOP", "loss": "loss"}
    return read_table(DATA / "chinchilla_epoch_svg.csv", **columns)


def made_up(noise: float = 0.0, *, sizes: int = 6, lengths: int = 6, seed: int = 0) -> tuple[laws.Law, Points]:
    """Runs that follow a law."""
    law = laws.Law(E=1.7, A=400.0, B=1500.0, alpha=0.34, beta=0.36)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 1e11, lengths)))
    loss = law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=n.shape))
    return law, Points(n, d, loss, tuple(f"run {i}" for i in range(len(n))))


def test_a_law_is_found_again_in_its_own_losses():
    law, points = made_up()
    fit = laws.fit(points, resamples=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-4)
    assert fit.agree > 0.5 and fit.error < 1e-6


def test_intervals_hold_the_truth_and_the_best_size_spends_the_budget():
    law, points = made_up(noise=0.003)
    fit = laws.fit(points, resamples=40)
    low, high = fit.interval(lambda one: one.exponent, share=0.98)
    assert low <= law.exponent <= high
    n, d = law.best_size(1e21), law.best_tokens(1e21)
    assert 6 * n * d == pytest.approx(1e21)
    for factor in (0.9, 1.1):
        assert law.loss(n * factor, d / factor) > law.loss(n, d)


def test_the_interval_of_a_prediction_holds_what_one_more_run_may_give():
    law, points = made_up(noise=0.01, sizes=5, lengths=5)
    fit = laws.fit(points, resamples=40)
    n, d = 2e9, 2e11
    found = fit.predict(n, d)
    assert found.loss == fit.law.loss(n, d) and found.low < law.loss(n, d) < found.high
    low, high = fit.interval(lambda one: float(one.loss(n, d)))
    assert found.low < low and high < found.high  # the law's own interval leaves out the noise of the run
    assert np.log(found.high / found.low) > 2 * 1.645 * 0.01  # 90 % of that noise
    wide = fit.predict(n, d, share=0.99)
    assert wide.low < found.low and found.high < wide.high
    with pytest.raises(UserError, match="--resamples 100"):
        laws.fit(points, resamples=0).predict(n, d)


def test_runs_that_follow_no_law_are_found_by_the_costliest_of_them():
    _, points = made_up(noise=0.001, sizes=4, lengths=4)
    straight = laws.fit(points, resamples=1)
    assert len(straight.beyond) == 4 and max(map(abs, straight.beyond)) < 0.005
    early = 1 + 0.5 * (points.tokens / points.tokens.min()) ** -1.5  # the first steps of a training are another regime
    bent = laws.fit(Points(points.parameters, points.tokens, points.loss * early, points.names), resamples=1)
    assert abs(np.mean(bent.beyond)) > 0.01
    said = [line for line in laws_command.trust(bent) if line.startswith("WARNING: that is more than noise")]
    assert said and not any("more than noise" in line for line in laws_command.trust(straight))
    few = np.isin(np.arange(16), (0, 5, 10, 15, 1, 6, 11))
    assert laws.fit(points.taken(few), resamples=1).beyond == ()  # five others hold no law


@pytest.mark.slow
def test_nine_of_ten_runs_are_inside_their_intervals():
    inside = []
    for seed in range(30):
        law, points = made_up(noise=0.005, sizes=4, lengths=4, seed=seed)
        found = laws.fit(points, resamples=40).predict(2e9, 2e11)
        runs = law.loss(2e9, 2e11) * np.exp(0.005 * np.random.default_rng(1000 + seed).normal(size=20))
        inside.append(np.mean((found.low < runs) & (runs < found.high)))
    assert 0.8 <= np.mean(inside) <= 0.99


@needs_data
def test_chinchillas_points_give_the_optimum_and_the_known_resamples():
    fit = laws.fit(chinchilla(), drop_highest=5, resamples=3)
    assert (len(fit.points), len(fit.dropped)) == (240, 5)
    assert fit.law.objective <= 0.0010182741
    assert fit.law.alpha == pytest.approx(0.347310, abs=1e-3) and fit.law.beta == pytest.approx(0.367172, abs=1e-3)
    assert pytest.approx(1.81722, abs=1e-3) == fit.law.E
    assert pytest.approx(477.83, rel=0.02) == fit.law.A and pytest.approx(2143.42, rel=0.02) == fit.law.B
    assert [one.A for one in fit.resamples] == pytest.approx([349.556, 487.836, 728.411], rel=1e-3)
    assert fit.law.best_tokens(5.76e23) / fit.law.best_size(5.76e23) == pytest.approx(17.9, abs=0.1)


@needs_data
def test_the_mean_of_the_losses_at_usual_tolerances_stops_where_it_began():
    points = chinchilla()
    points = points.taken(points.loss < np.sort(points.loss)[-5])
    n, d, y = np.log(points.parameters), np.log(points.tokens), np.log(points.loss)

    def mean(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = laws.objective(x, n, d, y, laws.HUBER)
        return value / len(y), gradient / len(y)

    naive = optimize.minimize(mean, HOFFMANN, jac=True, method="L-BFGS-B")
    assert naive.success and abs(naive.x[4] - HOFFMANN[4]) < 1e-3
    assert laws.objective(naive.x, n, d, y, laws.HUBER)[0] > 1.1 * laws.fit(points, resamples=0).law.objective


@needs_data
@pytest.mark.parametrize(("outliers", "exponent", "tokens"), [(True, 0.463, 16.1e12), (False, 0.500, None)])
def test_llama_3s_budgets_grow_as_published(outliers, exponent, tokens):
    with (DATA / "isoflops_openathena.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == "llama_3__raw_loss"]
    rows = [row for row in rows if outliers or row["outlier"] == "False"]
    n, d, loss, budgets = (np.array([float(row[k]) for row in rows]) for k in ("params", "tokens", "loss", "budget"))
    growth = isoflops.fit(Points(n, d, loss, ("",) * len(n)), budgets)
    assert growth.exponent == pytest.approx(exponent, abs=2e-3) and not growth.dropped
    assert tokens is None or growth.best_tokens(3.8e25) == pytest.approx(tokens, rel=0.01)


def test_budgets_whose_best_size_was_not_run_are_left_out_by_name():
    law, _ = made_up()
    budgets, n = np.repeat([1e18, 1e19, 1e20, 1e21], 7), []
    for budget in np.unique(budgets):
        n += list(law.best_size(budget) * np.geomspace(0.25, 4, 7) * (20 if budget == 1e21 else 1))
    n = np.array(n)
    points = Points(n, budgets / 6 / n, law.loss(n, budgets / 6 / n), ("",) * len(n))
    growth = isoflops.fit(points, budgets)
    assert growth.dropped == (1e21,) and growth.exponent == pytest.approx(law.exponent, abs=0.02)
    with pytest.raises(UserError, match="1 of 1 budgets|0 of 1 budgets"):
        isoflops.fit(points.taken(budgets == 1e18), budgets[budgets == 1e18])


def test_products_of_sizes_and_tokens_do_not_overflow(tmp_path):
    (tmp_path / "large.csv").write_text("n,d,loss\n" + "".join(f"{10**12},{10**13},{2 + i / 10}\n" for i in range(7)))
    points = read_table(tmp_path / "large.csv", parameters="n", tokens="d", loss="loss")
    assert points.flops.min() == 6e25


def test_the_command_prints_a_law_and_writes_it(tmp_path, capsys):
    law, points = made_up(noise=0.001)
    lines = [f"{a},{b},{x}" for a, b, x in zip(points.parameters, points.tokens, points.loss, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["size,data,nats", *lines]))
    words = ["laws", str(tmp_path / "runs.csv"), "--parameters", "size", "--tokens", "data", "--loss", "nats"]
    words += ["--drop-highest", "2", "--resamples", "20", "--predict", "parameters=3B, tokens=200B"]
    assert cli.main([*words, "--out", str(tmp_path / "law.json")]) == 0
    shown = capsys.readouterr().out
    assert "left out: 2 with the highest losses" in shown and "far from what was run" in shown
    assert "predicted for 3B parameters and 200B tokens, 6 times the largest budget: loss " in shown
    made = json.loads((tmp_path / "law.json").read_text())
    assert made["alpha"] == pytest.approx(law.alpha, abs=0.05) and made["runs"] == 34
    low, high = made["intervals"]["alpha"]
    assert low <= made["alpha"] <= high
    (one,) = made["predictions"]
    assert one["low"] < law.loss(3e9, 2e11) < one["high"] and (one["parameters"], one["tokens"]) == (3e9, 2e11)
    for refused in ("parameters=3B", "parameters=3B,tokens=2X", "size=3B,tokens=2B"):
        with pytest.raises(SystemExit):
            cli.main([*words, "--predict", refused])


def test_what_holds_no_law_is_refused_or_warned_of(tmp_path, capsys):
    _, points = made_up()
    with pytest.raises(UserError, match="5 runs cannot hold 5 constants"):
        laws.fit(points.taken(np.arange(len(points)) < 5))
    with pytest.raises(UserError, match="the runs have 1 sizes"):
        laws.fit(points.taken(points.parameters == points.parameters[0]).taken(np.ones(6, bool)), resamples=0)
    _, few = made_up(noise=0.001, sizes=3, lengths=3)
    lines = [f"{n},{d},{x}\n" for n, d, x in zip(few.parameters, few.tokens, few.loss, strict=True)]
    (tmp_path / "few.csv").write_text("".join(["n,d,l\n", *lines]))
    words = ["laws", str(tmp_path / "few.csv"), "--parameters", "n", "--tokens", "d", "--loss", "l", "--resamples", "0"]
    assert cli.main(words) == 0
    rising = Points(few.parameters, few.tokens, 6 - few.loss, few.names)
    with pytest.raises(UserError, match="do not fall with size"):
        laws.fit(rising, resamples=0)
    assert "WARNING: 9 runs are few for 5 constants" in capsys.readouterr().out
    for content, message in (
        ("n,d\n1,2\n", "no column 'l'"),
        ("", "has no rows"),
        ("n,d,l\n,,\n", "has no rows"),
        ("n,d,l\n1,2,x\n", "line 2: l is 'x'"),
        ("n,d,l\n\n1,inf,3\n", "line 3: d is 'inf'"),
        ("n,d,l\n1,000,2,3\n", "line 2, has 4 cells where the header has 3: put quotes"),
        ("n;d;l\n1,234;5;6\n", "line 2: n is '1,234'"),
        ("n,d,l,d\n1,2,3,4\n", "several columns 'd'"),
        ("n,d,l\n1,NaN,3\n", "no rows with 'n' and 'd' and 'l'"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / "bad.csv", parameters="n", tokens="d", loss="l")
    for more, message in (
        ({"flops": "l"}, "give two of"),
        ({"name": "x"}, "no column 'x'"),
        ({"tokens": "n"}, "are one column"),
    ):
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / "few.csv", **{"parameters": "n", "tokens": "d", "loss": "l"} | more)
    with pytest.raises(UserError, match="is no finished run"):
        read_runs([tmp_path])
    (tmp_path / "results.json").write_text(
        '{"train/parameters_without_embeddings": 5, "train/tokens": 7, "loss": null}'
    )
    with pytest.raises(UserError, match="is no finished run"):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("name,n , d,l\na,1e6,2e9,3.5\nb,3000000,4000000000,2.25\n", "utf-8-sig"),
        ("name\tn\td\tl\na\t1M\t2B\t3.5\nb\t3 000 000\t4.0b\t2.25\n", "utf-16"),
        ("name;n;d;l\na;1.000.000,0;2e9;3,5\n;;;\nb;3e6;4e9;2,25\n", "utf-8"),
        ('name,n,d,l\na,"1,000,000","2,000,000,000",3.5\nc,1,NaN,2\n\nd,,1,2\nb,3_000_000,4e9,2.25\ne,1\n', "utf-8"),
    ],
)
def test_tables_are_read_as_programs_write_them(text, encoding, tmp_path):
    """Spreadsheets and data frames: byte order marks, semicolons, tabs, grouped digits, units, missing cells."""
    (tmp_path / "runs.csv").write_bytes(text.encode(encoding))
    points = read_table(tmp_path / "runs.csv", parameters="n", tokens="d", loss="l", name="name")
    assert (points.parameters.tolist(), points.tokens.tolist()) == ([1e6, 3e6], [2e9, 4e9])
    assert points.loss.tolist() == [3.5, 2.25] and points.names == ("a", "b")
    assert points.missing == (("c", "d", "e") if "NaN" in text else ())


def test_rows_that_are_missing_or_repeated_are_told(tmp_path, capsys):
    _, points = made_up(noise=0.001)
    rows = list(zip(points.parameters, points.tokens, points.loss, strict=True))
    lines = [f"{n},{d},{x}\n" for n, d, x in [*rows, rows[0]]]
    (tmp_path / "runs.CSV").write_text("".join(["n,d,l\n", *lines, "1e9,,2\n"]))
    words = [
        "laws",
        str(tmp_path / "runs.CSV"),
        "--parameters",
        "n",
        "--tokens",
        "d",
        "--loss",
        "l",
        "--resamples",
        "0",
    ]
    assert cli.main([*words, "--out", str(tmp_path / "law.json")]) == 0
    shown = capsys.readouterr().out
    assert f"left out: 1 rows without a number (row {len(lines) + 2})" in shown
    assert "WARNING: 1 rows repeat others" in shown
    made = json.loads((tmp_path / "law.json").read_text())
    assert made["missing"] == [f"row {len(lines) + 2}"] and any("repeat" in line for line in made["warnings"])
    assert cli.main([*words, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err and not list(tmp_path.parent.glob(".*.tmp"))


# ------------------------------------------------------------------ other laws


def rows_of(name: str) -> list[dict[str, str]]:
    with (DATA / name).open() as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict[str, str]], *columns: str) -> list[np.ndarray]:
    return [np.array([float(row[column]) for row in rows]) for column in columns]


STEPS = {  # Porian et al. 2024, RefinedWeb: the exponent of N ~ C^a, one correction at a time
    "rw/base/long/kaplan/kaplan": 0.8338,
    "rw/base/long/kaplan/standard": 0.7009,
    "rw/base/short/kaplan/standard": 0.6035,
    "rw/base/short/chinchilla/standard": 0.5714,
    "rw/tuned/short/const/standard": 0.4970,
}


@needs_data
@pytest.mark.parametrize("setting", STEPS)
def test_the_five_steps_from_kaplans_exponent_to_chinchillas(setting):
    optima = [row for row in rows_of("porian_optimal_pairs.csv") if row["setting"] == setting and row["N_opt"]]
    flops, sizes = numbers(optima, "flops", "N_opt")
    assert isoflops.growth(flops, sizes).exponent == pytest.approx(STEPS[setting], abs=0.002)
    raw = [row for row in rows_of("porian_isoflop_points.csv") if row["setting"] == setting]
    n, d, loss, budgets = numbers(raw, "params", "tokens", "loss", "flops")
    found = isoflops.fit(Points(n, d, loss, ("",) * len(n)), budgets, curve="akima")
    assert found.exponent == pytest.approx(STEPS[setting], abs=0.003)


def test_kaplans_form_has_its_limits_and_its_exponent():
    assert published.kaplan_loss(1e9, 1e30) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert published.kaplan_loss(1e30, 1e10) == pytest.approx((5.4e13 / 1e10) ** 0.095)
    (low, small), (high, large) = published.kaplan_compute(1e20), published.kaplan_compute(1e22)
    assert high < low and np.log(large / small) / np.log(100) == pytest.approx(0.73)
    assert published.critical_batch(2.5) == pytest.approx(2e8 * 2.5 ** (-1 / 0.21))


def test_repeated_tokens_are_worth_less_and_less():
    """Muennighoff et al. 2023: four epochs cost almost nothing, sixteen keep half of the value, forty add nothing more."""
    law = published.DataConstrained()
    unique = 1e10
    epochs = np.array([1.0, 4.0, 16.0, 40.0, 80.0])
    effective = law.effective_tokens(epochs * unique, unique)
    assert effective[0] == pytest.approx(unique)
    worth = effective / (epochs * unique)
    assert worth[1] > 0.9 and 0.4 < worth[2] < 0.75 and worth[3] < 0.4
    assert effective[4] - effective[3] < 0.1 * effective[3]
    losses = law.loss(1e9, epochs * unique, unique)
    fresh = law.E + law.A * law.effective_parameters(1e9, unique) ** -law.alpha + law.B * (epochs * unique) ** -law.beta
    assert np.all(np.diff(losses) < 0) and np.all(losses >= fresh) and losses[1] - fresh[1] < 0.01
    assert law.effective_parameters(1e9, 1e15) == pytest.approx(1e9)  # enough data for it
    assert law.effective_parameters(1e11, unique) < 0.1 * 1e11


@needs_data
def test_repetition_explains_what_a_law_of_fresh_tokens_does_not():
    rows = rows_of("data_constrained_muennighoff.csv")
    n, d, unique, loss = numbers(rows, "params", "tokens", "unique_tokens", "val_loss")
    law = published.DataConstrained()
    ignoring = law.E + law.A * n**-law.alpha + law.B * d**-law.beta
    wrong, right = (float(np.median(np.abs(loss - one))) for one in (ignoring, law.loss(n, d, unique)))
    assert wrong == pytest.approx(0.52, abs=0.02) and right == pytest.approx(0.22, abs=0.03)


@needs_data
def test_step_laws_rate_and_batch_are_near_the_best_of_its_grids():
    grids: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows_of("steplaw_dense_lr_bs_loss.csv"):
        grids.setdefault((row["N"], row["D"]), []).append(row)
    lost = []
    for (parameters, tokens), rows in grids.items():
        rule = published.step_law(float(parameters), float(tokens))
        rates, batches, loss = numbers(rows, "lr", "bs", "smooth loss")
        near = np.log(rates / rule.rate) ** 2 + np.log(batches * 2048 / rule.batch_tokens) ** 2
        lost.append(loss[np.argmin(near)] / loss.min() - 1)
    assert len(lost) == 17 and np.mean(lost) == pytest.approx(0.00096, abs=2e-4) and max(lost) < 0.004
