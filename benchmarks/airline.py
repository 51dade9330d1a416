"""Agents in an airline's world: 300 flights, 2,000 reservations, 500 users, judged by the final state.

    python benchmarks/airline.py --tasks FILE.json [--data DIR] [--workdir RUN] [--limit N] [--out FILE.json]

The tasks have the form of tau2-bench: user_scenario, and evaluation_criteria with the reference actions and the facts that
must be said. DIR (by default that of the tasks) has flights, reservations and users as .json.gz, and policy.md. The world is in
`airline_world.py`.

A try succeeds if the final state equals that after the reference actions and the answer has every fact. The path is
free. All reference actions must replay without an error. Two scripts go through the agent's own loop, grammar of calls
and permissions: "reference" writes the reference actions and must reach 1; "idle" answers at once, and reaches the
share of tasks in which nothing is to be done. With --workdir, the model of that run acts; the user's wishes are its
first message, and the user agrees to every call.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
from airline_world import RefusedError, World, read_data

from llmjax.agents import schemas
from llmjax.agents.react import Budget, Trace, react
from llmjax.eval.statistics import mean
from llmjax.infer import asking


def main() -> None:
    parser = common.make_parser(__doc__, out=common.ROOT / "results" / "airline.json")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--workdir", type=Path, metavar="RUN", help="a chat model")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N tasks")
    args = parser.parse_args()
    data = read_data(args.data or args.tasks.parent)
    tasks = common.read_rows(args.tasks, "id", "user_scenario", "evaluation_criteria")
    tasks = tasks[: args.limit] if args.limit else tasks
    replays = [replay(data, task) for task in tasks]
    results: dict[str, Any] = {
        "tasks": len(tasks),
        "reference_actions": sum(len(actions_of(task)) for task in tasks),
        "reference_errors": [error for _, errors in replays for error in errors],
    }
    states = [state for state, _ in replays]
    for name, script in (("reference", referring), ("idle", idle)):
        results[name] = judged(tasks, states, [scripted(data, task, script(task)) for task in tasks])
    if args.workdir:
        policy = ((args.data or args.tasks.parent) / "policy.md").read_text(encoding="utf-8")
        results["model"] = judged(tasks, states, of_model(args.workdir, data, tasks, policy))
    print(json.dumps(results, indent=1))
    common.write(results, args.out)


def actions_of(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference actions of a task."""
    return (task["evaluation_criteria"] or {}).get("actions") or []


def facts_of(task: Mapping[str, Any]) -> list[str]:
    """What the answer must say."""
    return [str(fact) for fact in (task["evaluation_criteria"] or {}).get("communicate_info") or []]


def replay(data: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The state after the reference actions, and their errors."""
    world, errors = World(data), []
    known = {one.name: one for one in world.tools()}
    for action in actions_of(task):
        one = known.get(action["name"])
        wrong = "there is no such tool" if one is None else schemas.problem(action["arguments"], one.schema)
        try:
            if one is not None and not wrong:
                one.run(**copy.deepcopy(action["arguments"]))
        except RefusedError as error:
            wrong = str(error)
        if wrong:
            errors.append(f"task {task['id']}, {action['name']}: {wrong}")
    return world.state(), errors


Try = tuple[Trace, str]  # what was done, and the final state


def scripted(data: Mapping[str, Any], task: Mapping[str, Any], write: Callable[[asking.Ask], str]) -> Try:
    """A try in which a script writes the steps."""
    world = World(data)
    budget = Budget(calls=40, tokens=1 << 20)
    conversation = react(goal_of(task), world.tools(), budget=budget, approve=lambda tool, call: True)
    return asking.scripted(conversation, write)[0], world.state()


def referring(task: Mapping[str, Any]) -> Callable[[asking.Ask], str]:
    """A script that writes the reference actions and says the facts."""
    steps = [{"thought": "", "tool": one["name"], "arguments": one["arguments"]} for one in actions_of(task)]
    said = {"thought": "", "answer": " ".join(facts_of(task) or ["Done."])}
    left = iter([*steps, said])
    return lambda asked: json.dumps(next(left))


def idle(task: Mapping[str, Any]) -> Callable[[asking.Ask], str]:
    """A script that does nothing."""
    return lambda asked: json.dumps({"thought": "", "answer": "No."})


def of_model(workdir: Path, data: Mapping[str, Any], tasks: list[dict[str, Any]], policy: str) -> list[Try]:
    """The tries of a run's model."""
    import llmjax

    model = llmjax.load(workdir)
    length = min(8192, model.config.model.max_length)
    engine = model.engine(slots=2, length=length)
    # The policy fits only models that read far; others get its first rule.
    policy = policy if length > 6000 else "You are an agent of an airline. The time is 2024-05-15 15:00."
    worlds = [World(data) for _ in tasks]
    jobs = [
        (i, functools.partial(react, goal_of(task), worlds[i].tools(), policy=policy, approve=lambda tool, call: True, budget=Budget(calls=8)))
        for i, task in enumerate(tasks)
    ]  # fmt: skip
    found = {one.key: one.result or Trace("", ended=one.error) for one in asking.run(engine, jobs)}
    return [(found[i], world.state()) for i, world in enumerate(worlds)]


def goal_of(task: Mapping[str, Any]) -> str:
    """What the user says first."""
    told = task["user_scenario"]["instructions"]
    if isinstance(told, str):
        return told
    parts = (told.get(name) for name in ("reason_for_call", "known_info", "task_instructions"))
    return "\n".join(part for part in parts if part)


def judged(tasks: list[dict[str, Any]], states: list[str], tries: list[Try]) -> dict[str, Any]:
    """Shares of tasks with the right state and facts, and of calls that were wrong or failed."""
    success = []
    for task, state, (trace, final) in zip(tasks, states, tries, strict=True):
        facts = facts_of(task)
        said = trace.answer.replace(",", "").casefold()
        success.append(float(final == state and all(fact.replace(",", "").casefold() in said for fact in facts)))
    steps = [step for trace, _ in tries for step in trace.steps]
    one = mean(success)
    return {
        "success": {
            "value": round(one.value, 4),
            "error": round(one.error, 4) if one.count > 1 else None,
            "count": one.count,
        },
        "calls": len(steps),
        "invented_or_malformed": sum(step.verdict.startswith("wrong") for step in steps),
        "failed": sum(step.failed for step in steps),
        "unfinished": sum(trace.ended != "answer" for trace, _ in tries),
    }


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
