"""Agents by method at one budget: a script of a known chance, exactly, and a chat model in a small shop.

    python benchmarks/methods.py [--workdir RUN] [--out results/methods.json]

"exact": a way of three calls, each right with the chance p; a wrong call ends the way. Every outcome of the six calls of
the budget is gone through, so the numbers have no error. "vote" here is told when its try is lost, as "dfs" is.

With --workdir, the model of that run answers 16 questions about the goods of a shop that it can look up: half need one
call, half two. The methods have the same budget of calls and tokens. An answer is right if it has the number. "none" is
the same model without tools, asked once: what it guesses. `calls` are the mean of a question. `invalid` counts calls of
a tool or with an argument that does not exist: the schema of a step admits none.
A method of SmolLM2-135M takes at most three minutes of 2 idle cores; the script skips those that --out has.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, cpu_seconds, make_parser, write

from llmjax.agents import methods, tools
from llmjax.agents.methods import Outcome, World
from llmjax.agents.react import Budget
from llmjax.eval.statistics import mean
from llmjax.infer import asking
from llmjax.infer.asking import Ask

METHODS = ("react", "vote", "dfs", "plan")
CALLS = 6  # of the exact way
SHOP_CALLS, SHOP_TOKENS = 4, 6 * 256  # the budget of a question of the shop
CHANCES = (0.3, 0.6, 0.9)
DEPTH = 3  # calls of the exact way


# ------------------------------------------------------------------ exactly


@dataclasses.dataclass
class Way:
    """A way of DEPTH right calls; a wrong one ends it."""

    place: int = 0

    def go(self, right: bool) -> str:
        """Take the next part of the way."""
        self.place = self.place + 1 if right and self.place >= 0 else -1
        return "lost" if self.place < 0 else "arrived" if self.place == DEPTH else "on the way"

    def world(self) -> World:
        tool = tools.from_function(self.go, effect="read", trusted=True)
        return World([tool], lambda: dataclasses.replace(self).world(), lambda: str(self.place))


def walking(luck: tuple[bool, ...]) -> Callable[[Ask], str]:
    """A script whose calls are right or wrong as `luck` says. It gives up where it is lost, if it may."""
    left = list(luck)

    def write_step(asked: Ask) -> str:
        last = asked.prompts[0][-1]["content"]
        step: dict[str, Any] = {"tool": "go", "arguments": {"right": left[0] if left else False}}
        if '"tool"' not in asked.json_schema or "<data>\narrived" in last:
            step = {"answer": "done"}
        elif "<data>\nlost" in last and "led nowhere" not in last:
            step = {"give_up": True} if "give_up" in asked.json_schema else {"answer": "lost"}
        else:
            left.pop(0)
        return json.dumps({"thought": "", **step})

    return write_step


def exact(method: str, chance: float) -> float:
    """The chance that the method arrives: the sum over all outcomes of its calls."""
    found = 0.0
    for luck in itertools.product((True, False), repeat=CALLS):
        start = methods.run(method, "arrive", Way().world(), tries=CALLS, budget=Budget(calls=CALLS, tokens=1 << 20))
        (_, world), _ = asking.scripted(start, walking(luck))
        found += (world.state() == str(DEPTH)) * chance ** sum(luck) * (1 - chance) ** (CALLS - sum(luck))
    return found


# ------------------------------------------------------------------ a model in a shop

PRICES = {"cheese": 68, "honey": 83, "bread": 31, "coffee": 95}  # fmt: skip
STOCK = {"cheese": 29, "honey": 57, "bread": 38, "coffee": 115}  # fmt: skip
MAKERS = {"Ada": "cheese", "Ben": "honey", "Carla": "bread", "Eva": "coffee"}


def price(item: str) -> str:
    """The price of an item in cents.

    Args:
        item: for example bread
    """
    return f"{item} costs {PRICES[item.casefold()]} cents"


def stock(item: str) -> str:
    """How many pieces of an item the shop has.

    Args:
        item: for example bread
    """
    return f"the shop has {STOCK[item.casefold()]} pieces of {item}"


def product(person: str) -> str:
    """The item that a person makes.

    Args:
        person: for example Ada
    """
    return f"{person} makes {MAKERS[person.title()]}"


def shop() -> World:
    made = World([tools.from_function(one, effect="read", trusted=True) for one in (price, stock, product)])
    return dataclasses.replace(made, copy=shop)


def questions() -> Iterator[tuple[str, int]]:
    """(question, the number of its answer): with one call, then with two."""
    for person, item in MAKERS.items():
        yield f"What is the price of {item} in cents?", PRICES[item]
        yield f"How many pieces of {item} are in stock?", STOCK[item]
        yield f"What is the price in cents of the item that {person} makes?", PRICES[item]
        yield f"How many pieces of the item that {person} makes are in stock?", STOCK[item]


def right(answer: str, number: int) -> bool:
    return number in [int(one) for one in re.findall(r"\d+", answer)]


def of_model(workdir: Path, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method that is not known yet, with its success, calls and CPU seconds."""
    import llmjax

    model = llmjax.load(workdir)
    engine = model.engine(slots=4, length=min(4096, model.config.model.max_length))
    asked = list(questions())
    for method in (one for one in ("none", *METHODS) if one not in known):
        tried = "react" if method == "none" else method
        world = World([]) if method == "none" else shop()
        budget = Budget(calls=SHOP_CALLS, tokens=SHOP_TOKENS)
        jobs = [
            (i, functools.partial(methods.run, tried, question, world, tries=3, budget=budget))
            for i, (question, _) in enumerate(asked)
        ]
        began = cpu_seconds()
        found: dict[int, Outcome | None] = {one.key: one.result for one in asking.run(engine, jobs)}
        traces = [found[i][0] if found[i] else None for i in range(len(asked))]  # type: ignore[index]
        good = [trace is not None and right(trace.answer, number) for trace, (_, number) in zip(traces, asked, strict=True)]  # fmt: skip
        steps = [step for trace in traces if trace for step in trace.steps]
        two = [" makes" in question for question, _ in asked]
        yield (
            method,
            {
                "questions": len(asked),
                "success": _share(good),
                "one_call": _share([one for one, hard in zip(good, two, strict=True) if not hard]),
                "two_calls": _share([one for one, hard in zip(good, two, strict=True) if hard]),
                "calls": len(steps) / len(asked),
                "failed_calls": sum(step.failed for step in steps),
                "invalid": sum(step.verdict.startswith("wrong") for step in steps),
                "errors": sum(trace is None for trace in traces),
                "cpu_seconds": cpu_seconds() - began,
            },
        )


def _share(values: list[bool]) -> dict[str, float]:
    found = mean([float(one) for one in values])
    return {"value": round(found.value, 4), "error": round(found.error, 4), "count": len(values)}


def main() -> int:
    """See the module."""
    parser = make_parser(__doc__, out=ROOT / "results" / "methods.json")
    parser.add_argument("--workdir", type=Path, metavar="RUN", help="a chat model")
    args = parser.parse_args()
    table = {f"{chance:g}": {method: exact(method, chance) for method in METHODS[:3]} for chance in CHANCES}
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    budget = {"exact": {"calls": CALLS}, "model": {"calls": SHOP_CALLS, "tokens": SHOP_TOKENS}}
    results: dict[str, Any] = {"budget": budget, "exact": table, "model": before.get("model", {})}
    for method, row in of_model(args.workdir, results["model"]) if args.workdir else ():
        results["model"][method] = row
        print(method, json.dumps(row), flush=True)
        write(results, args.out)
    print(json.dumps(results, indent=1))
    write(results, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
