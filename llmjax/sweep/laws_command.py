"""The verb `laws`: from runs or a table to a law, its intervals, and whether to trust it. Imports are late: help is quick."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_0, number
from llmjax.errors import UserError
from llmjax.sweep.budget_command import quantity
from llmjax.verb import Verb

if TYPE_CHECKING:
    from llmjax.sweep.laws import Fit, Prediction

ENOUGH = 20  # runs: four for each of the five constants
BEYOND = 3  # powers of ten beyond the largest fitted budget, up to which the table of best sizes goes
CONSTANTS = ("E", "A", "B", "alpha", "beta")
OFF = 0.01  # mean error in ln loss on the costliest runs, from which a law is warned of
FAR = 10.0  # times the largest fitted budget, from where a prediction is marked


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("given", nargs="+", type=Path, metavar="RUN|FILE.csv", help="finished runs, or one table")
    for name, about in (
        ("parameters", "of a table: the column of parameters"),
        ("tokens", "the column of training tokens"),
        ("flops", "the column of training FLOPs, 6 N D, in place of one of the two"),
        ("loss", "the column of losses"),
        ("name", "the column of the runs' names"),
    ):
        verb.add_argument(f"--{name}", default="", metavar="COLUMN", help=about)
    verb.add_argument(
        "--drop-highest", type=number(int, AT_LEAST_0), default=0, metavar="N",
        help="leave out the losses that are not below the N-th highest (Epoch's fit of Chinchilla: 5)",
    )  # fmt: skip
    verb.add_argument(
        "--resamples", type=number(int, AT_LEAST_0), default=1000, metavar="N",
        help="fits of runs drawn with replacement, for the intervals (default: 1000)",
    )  # fmt: skip
    verb.add_argument(
        "--predict", type=size, action="append", default=[], metavar="parameters=N,tokens=D",
        help="also predict the loss of such a run, with an interval that holds it in 90 %% of cases: parameters=7B,tokens=1.4T; may be repeated",
    )  # fmt: skip
    verb.add_argument("--out", type=Path, metavar="FILE.json", help="also write the law as JSON")


def size(text: str) -> tuple[float, float]:
    """Parameters and tokens from parameters=7B,tokens=1.4T. Raises ArgumentTypeError for anything else."""
    parts = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    if set(parts) != {"parameters", "tokens"}:
        raise argparse.ArgumentTypeError(f"{text!r} is no run: write parameters=7B,tokens=1.4T")
    return quantity(parts["parameters"]), quantity(parts["tokens"])


def run(args: argparse.Namespace, c: ConfigDict) -> int:
    """Fit E + A / N^alpha + B / D^beta and print it. Raises UserError for points that hold no law."""
    from llmjax.sweep import laws, points

    tables = [path for path in args.given if path.is_file() or path.suffix.lower() in (".csv", ".tsv")]
    if tables and len(args.given) > 1:
        raise UserError("give one table, or runs: their losses are not of the same text")
    if tables and not args.loss:
        raise UserError("a table needs --loss COLUMN, and two of --parameters, --tokens and --flops")
    if tables:
        columns = {name: getattr(args, name) for name in ("parameters", "tokens", "flops", "loss", "name")}
        found = points.read_table(tables[0], **columns)
    else:
        found = points.read_runs(args.given)
    fit = laws.fit(found, drop_highest=args.drop_highest, resamples=args.resamples)
    predictions = [fit.predict(*asked) for asked in args.predict]
    print("\n".join([*described(fit), *predicted(fit, predictions), *trust(fit)]))
    if args.out:
        from llmjax import storage

        storage.write_json(args.out, as_json(fit) | {"predictions": [vars(one) for one in predictions]})
        print(f"written: {args.out}")
    return 0


def described(fit: "Fit") -> list[str]:
    """The law and its best sizes for budgets, as lines."""
    from llmjax import human

    law, least, most = fit.law, float(fit.points.flops.min()), float(fit.points.flops.max())
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta, of {len(fit.points)} runs"]
    if fit.dropped:
        shown = ", ".join(fit.dropped[:8]) + (", ..." if len(fit.dropped) > 8 else "")
        lines.append(f"left out: {len(fit.dropped)} with the highest losses ({shown})")
    if missing := fit.points.missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        lines.append(f"left out: {len(missing)} rows without a number ({shown})")
    for name in ("E", "A", "B", "alpha", "beta", "exponent"):
        value = getattr(law, name)
        title = "a of N ~ C^a" if name == "exponent" else name
        between = ""
        if fit.resamples:
            low, high = fit.interval(lambda one, name=name: getattr(one, name))  # type: ignore[misc]
            between = f"   90 % of resamples: {low:.4g} to {high:.4g}"
        lines.append(f"  {title:13}{value:12.5g}{between}")
    lines.append(f"{'FLOPs':>8} {'parameters':>12} {'tokens':>10} {'tokens each':>12} {'loss':>8}")
    for power in range(math.floor(math.log10(least)), math.floor(math.log10(most)) + BEYOND + 1):
        flops = 10.0**power
        n, d = law.best_size(flops), law.best_tokens(flops)
        mark = "   far from what was run" if flops > FAR * most else ""
        lines.append(
            f"{flops:8.0e} {human.count(n):>12} {human.count(d):>10} {d / n:12.1f} {float(law.loss(n, d)):8.3f}{mark}"
        )
    return lines


def predicted(fit: "Fit", predictions: "Sequence[Prediction]") -> list[str]:
    """Predictions as lines."""
    from llmjax import human

    most = float(fit.points.flops.max())
    return [
        f"predicted for {human.count(one.parameters)} parameters and {human.count(one.tokens)} tokens, {one.flops / most:.3g} "
        f"times the largest budget: loss {one.loss:.4f}, of one run in 90 % of cases {one.low:.4f} to {one.high:.4f}"
        for one in predictions
    ]


def trust(fit: "Fit") -> list[str]:
    """The fit's diagnostics and warnings."""
    import numpy as np

    lines = [
        f"root mean square error of ln loss: {fit.error:.4f}",
        f"{fit.agree:.0%} of other starts end at the same optimum",
    ]
    off = sum(fit.beyond) / max(len(fit.beyond), 1)
    if fit.beyond:
        worst = max(map(abs, fit.beyond))
        lines.append(
            f"a law of the other runs errs on the {len(fit.beyond)} costliest by {off:+.4f} in ln loss on average, {worst:.4f} at most"
        )
    if abs(off) > OFF:
        lines.append(
            "WARNING: that is more than noise: the runs follow no such law; leave out the shortest ones, or run longer"
        )
    if fit.agree < 0.5:
        lines.append("WARNING: most starts end elsewhere: the points do not hold the constants; add sizes and lengths")
    if len(fit.points) < ENOUGH:
        lines.append(f"WARNING: {len(fit.points)} runs are few for 5 constants: give {ENOUGH} or more")
    table = np.stack([fit.points.parameters, fit.points.tokens, fit.points.loss], axis=1)
    if repeated := len(table) - len(np.unique(table, axis=0)):
        lines.append(
            f"WARNING: {repeated} rows repeat others in size, tokens and loss: they count twice, so intervals are too narrow"
        )
    if fit.resamples:
        low, high = fit.interval(lambda one: one.exponent)
        if high - low > 0.2:
            lines.append(f"WARNING: a lies between {low:.2f} and {high:.2f}: sizes for larger budgets are guesses")
    return lines


def as_json(fit: "Fit") -> dict[str, Any]:
    """The law, its resamples (each E, A, B, alpha, beta), and the intervals that hold 90 % of them, for JSON."""
    names = (*CONSTANTS, "exponent")
    made: dict[str, Any] = {name: getattr(fit.law, name) for name in (*names, "objective")}
    if fit.resamples:
        made["resampled"] = [[float(f"{getattr(one, name):.7g}") for name in CONSTANTS] for one in fit.resamples]
        made["intervals"] = {name: fit.interval(lambda one, name=name: getattr(one, name)) for name in names}  # type: ignore[misc]
    return made | {
        "runs": len(fit.points),
        "largest_flops": float(fit.points.flops.max()),
        "dropped": fit.dropped,
        "missing": fit.points.missing,
        "error": fit.error,
        "agree": fit.agree,
        "beyond": fit.beyond,
        "warnings": [line for line in trust(fit) if line.startswith("WARNING")],
    }


VERBS = {
    "laws": Verb(
        "Fit a scaling law to runs or a table: the best size and length for a budget, with intervals.", _add, run,
        config="none",
    ),
}  # fmt: skip
