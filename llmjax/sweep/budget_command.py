"""The verb `budget`: what FLOPs, days, dollars, a size or a loss buy. Imports are late: help is quick."""

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_0, SHARE_ABOVE_0, number
from llmjax.errors import UserError
from llmjax.verb import Verb

if TYPE_CHECKING:
    from llmjax.sweep.budget import Asked, Figure, Machine

DAYS = 30.0  # a run takes at most so long on the number of chips that is assumed
LEAST_CHIPS = 8
NEAR = 0.2  # how far the logarithm of a config's parameters may be from what was asked for, and nothing is said


def quantity(text: str) -> float:
    """A number above 0, with K, M, B or T: 7B, 1.4T, 1e21, 1,000,000. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(
        r"([0-9]+|[0-9]{1,3}(?:[,_][0-9]{3})+)?(\.[0-9]*)?(e[+-]?[0-9]+)?([kmbt]?)", text.strip().lower()
    )
    if match and (match[1] or (match[2] or "").strip(".")):
        whole = re.sub("[,_]", "", match[1] or "0")
        unit = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[4]]
        value = float(f"{whole}{match[2] or ''}{match[3] or ''}") * unit
        if 0 < value < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0: write 7B, 1.4T or 1e21")


def _add(verb: argparse.ArgumentParser) -> None:
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--flops", type=quantity, metavar="N", help="FLOPs, such as 1e21; with --served-tokens also those to serve"
    )
    which.add_argument("--days", type=quantity, metavar="N", help="days of --chips")
    which.add_argument("--dollars", type=quantity, metavar="N", help="US dollars, at --price")
    which.add_argument("--params", type=quantity, metavar="N", help="parameters, such as 7B")
    which.add_argument("--target-loss", type=quantity, metavar="L", help="the loss to reach with the fewest FLOPs")
    verb.add_argument(
        "--served-tokens",
        type=quantity,
        default=0.0,
        metavar="N",
        help="tokens that the model will read and write in use, such as 2T",
    )
    verb.add_argument(
        "--chips",
        default="",
        metavar="CHIP:N",
        help="chips and their number, such as v5p:128 (default: h100, as many as take at most 30 days)",
    )
    verb.add_argument(
        "--mfu",
        type=number(float, SHARE_ABOVE_0),
        metavar="X",
        help="share of the chips' peak that the training reaches (default: 0.4, assumed)",
    )
    verb.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="a finished run on such chips, whose measured share of the peak is taken",
    )
    verb.add_argument(
        "--price",
        type=number(float, AT_LEAST_0),
        metavar="USD",
        help="price of one chip for an hour (default: the list price)",
    )
    verb.add_argument(
        "--law",
        type=Path,
        metavar="FILE.json",
        help="a law by `llmjax laws RUN... --out FILE.json` (default: Chinchilla's)",
    )
    verb.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures as JSON")
    verb.add_argument("--write-config", type=Path, metavar="FILE.py", help="also write a config of the run")


def run(args: argparse.Namespace, c: ConfigDict) -> int:
    """Print the figures of a budget. Raises UserError for one that buys nothing, and for unknown chips."""
    from llmjax import storage
    from llmjax.sweep import budget, budget_run, cost, published

    cost.keep_off_accelerators()
    laws = budget.read_law(args.law)
    asked = budget.Asked(
        args.flops or 0.0, args.days or 0.0, args.dollars or 0.0, args.params or 0.0, args.target_loss or 0.0,
        args.served_tokens,
    )  # fmt: skip
    if asked.days and ":" not in args.chips:
        raise UserError("--days needs --chips CHIP:N, such as --chips v5p:128 --days 7")
    machine = _machine(args, asked)
    figures = budget.plan(asked, laws, machine)
    if not args.chips.partition(":")[2]:
        machine = budget.enough(machine, figures, days=DAYS, least=LEAST_CHIPS)
        figures = budget.plan(asked, laws, machine)
    size, length = figures["parameters"].value, figures["tokens"].value
    rules = published.rules(size, length)
    made = budget_run.make_config(size, length, rule=rules[0], devices=machine.count)
    made, fits = budget_run.fit(made, budget_run.topology(machine.chip, machine.count))
    lines = [*described(figures), *_rules(rules), *_run_lines(made, fits, machine, asked=size)]
    print("\n".join(lines))
    if args.out:
        tree: dict[str, Any] = {name: figure.as_json() for name, figure in figures.items()}
        tree["learning_rate"] = budget.Figure(made.optimizer.learning_rate, budget.FITTED, rules[0].source).as_json()
        tree["batch_tokens"] = budget.Figure(
            float(made.train.batch_size * made.train.sequence_length), budget.FITTED,
            f"{rules[0].source}, as a power of two that the devices divide",
        ).as_json()  # fmt: skip
        tree["rules"] = [vars(rule) for rule in rules]
        tree["chips"] = f"{machine.chip}:{machine.count}"
        tree["mesh"] = None if fits is None else vars(fits)
        storage.write_json(args.out, tree)
        print(f"written: {args.out}")
    if args.write_config:
        storage.write_text(args.write_config, budget_run.config_file(made, lines))
        print(f"written: {args.write_config}")
    return 0


def _machine(args: argparse.Namespace, asked: "Asked") -> "Machine":
    from llmjax.parallel.chips import CHIPS
    from llmjax.sweep import budget

    chip, _, count = (args.chips or budget.CHIP).partition(":")
    if chip not in CHIPS:
        raise UserError(f"--chips {args.chips!r}: the chip {chip!r} is not known; it can be {', '.join(CHIPS)}")
    if count and not (count.isdigit() and int(count)):
        raise UserError(f"--chips {args.chips!r}: write their number, such as {chip}:128")
    if args.mfu and args.run:
        raise UserError("--mfu and --run exclude each other: the run says what it measured")
    mfu = budget.Figure(budget.MFU, budget.ASSUMED, "assumed")
    if args.mfu:
        mfu = budget.Figure(args.mfu, budget.ASSUMED, "given")
    if args.run:
        mfu = budget.measured_mfu(args.run)
    listed = budget.Figure(CHIPS[chip].price, budget.ASSUMED, CHIPS[chip].sources.get("price", "not known"))
    price = listed if args.price is None else budget.Figure(args.price, budget.ASSUMED, "given")
    return budget.Machine(chip, int(count or LEAST_CHIPS), mfu, price)


def described(figures: "dict[str, Figure]") -> list[str]:
    """The figures as lines."""
    from llmjax import human

    shown = {"loss": lambda x: f"{x:.3f}", "days": lambda x: f"{x:.3g}", "dollars": lambda x: f"${x:,.0f}"}
    lines = []
    for name, one in figures.items():
        text = shown.get(name, lambda x: f"{x:.3g}" if x > 1e15 else human.count(x))
        between = f" ({text(one.low)} to {text(one.high)})" if one.low is not None and one.high is not None else ""
        lines.append(f"{name.replace('_', ' '):15} {text(one.value)}{between}   {one.kind}: {one.source}")
    return lines


def _rules(rules: Any) -> list[str]:
    from llmjax import human

    lines = []
    for rule in rules:
        rate = f"rate {rule.rate:.3g}, " if rule.rate else ""
        batch = f"batch {human.count(rule.batch_tokens)} tokens"
        lines.append(f"{rule.name:15} {rate}{batch}   fitted: {rule.source}")
    return lines


def _run_lines(c: ConfigDict, fits: Any, machine: "Machine", *, asked: float) -> list[str]:
    from llmjax import human
    from llmjax.sweep import budget_run

    count = budget_run.counted(c)
    shape = f"{c.model.layers} layers of {c.model.width}, {human.count(count)} parameters"
    if abs(math.log(count / asked)) > NEAR:
        shape += f" (the nearest that a config has to {human.count(asked)})"
    lines = [f"{'a config':15} {shape}, {c.train.batch_size} rows of {c.train.sequence_length}, {c.train.duration}"]
    where = f"{machine.count} x {machine.chip}"
    if fits is None:
        return [
            *lines,
            f"{'mesh':15} none that was tried fits {where}, by formula: give more chips, or search with "
            "`llmjax plan --config FILE --topology CHIP:SHAPE --search`",
        ]
    settings = ", ".join(f"{key}={value}" for key, value in fits.settings.items())
    use = f"{human.size(fits.memory)} of {human.size(fits.available)}"
    return [*lines, f"{'mesh':15} {settings}   by formula: {use} on {where}, at most {fits.mfu:.0%} of the peak"]


VERBS = {
    "budget": Verb(
        "say which model a budget buys: size, tokens, loss, days, dollars, batch and rates, and where each number is from",
        _add, run, config="none",
    ),
}  # fmt: skip
