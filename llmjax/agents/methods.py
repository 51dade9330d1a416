"""Ways to spend one budget: one way to an answer, a vote of several tries, a depth-first search over calls, a plan.

    react   one way (Yao et al. 2023)
    vote    several tries, each from the beginning; the end that most of them reach (ReAct@N, by self-consistency, Wang et al. 2023)
    dfs     a search over calls: the model may give up a branch, and then another call is tried one step before (Qin et al. 2023)
    plan    all calls are written before any result is read, so that no result can add or change one

All take calls, tokens and seconds from one budget. Going back is sound only over reads, or in a world that can be copied: elsewhere a
vote is among tries that only read, and a search does not go back behind a write.
"""

import collections
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.agents.react import STEP_TOKENS, THOUGHT_LENGTH, Call, Session, Trace, branch, undescribed
from llmjax.agents.tools import Tool
from llmjax.infer.asking import Ask, Conversation

TEMPERATURE = 0.7  # of tries and branches, which must differ
PLAN_TOKENS = 4 * STEP_TOKENS


@dataclass(frozen=True)
class World:
    """What an agent acts in."""

    tools: Sequence[Tool]
    copy: Callable[[], "World"] | None = None  # None: there is only this one
    state: Callable[[], str] = lambda: ""  # what votes compare; "": they compare answers


Outcome = tuple[Trace, World]  # what was done, and the world that it left


def run(method: str, goal: str, world: World, *, tries: int = 4, **settings: Any) -> Conversation[Outcome]:
    """The conversation of a method.

    Args:
        tries: of a vote; of a search the most calls that are tried at one place.
        settings: of `react.Session`.
    """
    session = Session(goal, **settings)
    trace = session.trace
    if method == "vote":
        world = yield from _vote(session, world, tries)
    elif method == "dfs":
        search = _Search(session, tries)
        found = yield from search.explore(world, [])
        trace.answer, trace.ended, world = found or ("", "gave up", world)
    elif method == "plan":
        trace.answer, trace.ended = yield from _planned(session, world)
    else:
        trace.answer, trace.ended = yield from branch(session, world.tools)
    trace.branch = session.branch if method == "dfs" else trace.branch
    return trace, world


def _vote(session: Session, world: World, tries: int) -> Conversation[World]:
    """The world in which most tries ended; its answer is that of the trace."""
    found: list[tuple[str, str, int, World]] = []
    for number in range(tries):
        session.branch = number
        own = (
            world.copy()
            if world.copy
            else World([one for one in world.tools if one.effect == "read"], None, world.state)
        )
        answer, ended = yield from branch(session, own.tools, may_give_up=True, temperature=TEMPERATURE, seed=number)
        found.append((answer, ended, number, own))
        if session.calls >= session.budget.calls or ended not in ("answer", "gave up"):
            break
    whole = [one for one in found if one[1] == "answer"] or found[-1:]
    ends = [one[3].state() or " ".join(one[0].casefold().split()) for one in whole]
    chosen = whole[ends.index(collections.Counter(ends).most_common(1)[0][0])]
    session.trace.answer, session.trace.ended, session.trace.branch, last = chosen
    return last


@dataclass
class _Search:
    session: Session
    width: int
    committed: bool = False  # something was written that cannot be taken back
    asked: int = 0

    def explore(self, world: World, turns: list[tuple[str, str, str]]) -> Conversation[tuple[str, str, World] | None]:
        """The answer from a place on, why it ended, and its world; None: it was given up."""
        tried: list[str] = []
        while len(tried) < self.width or self.committed:
            used_up = self.session.begin_turn()
            note = f"These calls were tried here and led nowhere: {'; '.join(tried)}. Take another." if tried else ""
            self.asked += 1
            text, step = yield from self.session.step(
                turns, world.tools, may_call=not used_up, may_give_up=not self.committed, note=note,
                temperature=TEMPERATURE, seed=self.asked,
            )  # fmt: skip
            if step is not None and "answer" in step:
                return step["answer"], used_up or "answer", world
            if used_up:
                return "", used_up, world
            if step is None or "give_up" in step:
                return None
            call = Call(step["tool"], step["arguments"])
            self.session.branch += bool(tried)
            own = world.copy() if world.copy else world
            done = self.session.act(call, own.tools)
            effect = next((one.effect for one in own.tools if one.name == call.name), "read")
            if not world.copy and effect != "read" and done.verdict in ("allowed", "agreed"):
                self.committed = True
            found = yield from self.explore(own, [*turns, (text, call.name, done.result)])
            if found is not None:
                return found
            tried.append(json.dumps({"tool": call.name, "arguments": dict(call.arguments)}))
        return None


def _planned(session: Session, world: World) -> Conversation[tuple[str, str]]:
    """Write all calls, run them, and answer from their results."""
    session.begin_turn()
    calls = [
        {
            "type": "object", "properties": {"tool": {"const": one.name}, "arguments": undescribed(one.schema)},
            "required": ["tool", "arguments"], "additionalProperties": False,
        }
        for one in world.tools
    ]  # fmt: skip
    properties = {
        "thought": {"type": "string", "maxLength": THOUGHT_LENGTH},
        "plan": {"type": "array", "items": {"anyOf": calls}, "maxItems": session.budget.calls},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    text = yield Ask("plan", session.prompts([], world.tools, PLAN), json_schema=json.dumps(schema), max_new_tokens=PLAN_TOKENS)  # fmt: skip
    session.written += PLAN_TOKENS
    turns: list[tuple[str, str, str]] = []
    for one in _plan_of(text):
        if used_up := session.begin_turn():
            break
        call = Call(one["tool"], one["arguments"])
        turns.append((json.dumps(one), call.name, session.act(call, world.tools, planned=True).result))
    else:
        used_up = session.begin_turn()
    _, step = yield from session.step(turns, world.tools, may_call=False)
    return (step or {}).get("answer", ""), used_up or "answer"


PLAN = "Write the plan now: all calls, in order. None can be added later, and none can use the result of another."


def _plan_of(text: str) -> list[dict[str, Any]]:
    """The calls of a plan; none if it was cut."""
    try:
        plan: list[dict[str, Any]] = json.loads(text)["plan"]
    except (ValueError, KeyError, TypeError):
        return []
    return plan
