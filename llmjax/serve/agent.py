"""POST /agent: a model reaches a goal by calling tools of the server's operator. POST /agent/permission: a user's word on a call.

The loop, its permissions and its budget are those of `llmjax agent`. A call that the command asks for is asked of the client
in its stream, if the client says that it answers (`asks`), and is denied otherwise. Every run is kept in a transcript, which
`llmjax agent --replay` reads, also a run whose client left. Then no further call runs.
"""

import functools
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmjax import storage
from llmjax.infer.asking import Conversation
from llmjax.serve.asks import checked
from llmjax.serve.calls import Call
from llmjax.serve.conversing import Talk
from llmjax.serve.messages import AgentBody, PermissionBody
from llmjax.serve.refusals import Refusal, unsupported
from llmjax.serve.server import new_id

if TYPE_CHECKING:
    from llmjax.agents.react import Budget, Step
    from llmjax.agents.react import Call as ToolCall
    from llmjax.agents.tools import Tool

T = TypeVar("T")
AGENT = "tools"  # its name among the sources
METHODS = ("react", "vote", "dfs", "plan")
TRIES, MOST_TRIES = 4, 16
SHOWN = 20_000  # characters of a result that clients get; the transcript has all of it
MOST_CALLS = 32  # of tools at a time, with those of clients that left
LEFT = "the run was ended from outside"
BUSY = f"the tool is not called: {MOST_CALLS} others are running; try again"


@dataclass(frozen=True)
class Question:
    """A call that waits for a user's word."""

    key: str  # of the API, that the run was asked with
    said: "Future[bool]"


@dataclass(frozen=True)
class Agents:
    """What agents of a server have and may do.

    Args:
        budget: the most of one run; a request may ask for less.
        writes: whether tools that write run without a question, until text of a stranger was read.
        transcript: the file that keeps every run.
    """

    tools: "Sequence[Tool]"
    budget: "Budget"
    writes: bool
    transcript: Path
    questions: dict[str, Question] = field(default_factory=dict)
    running: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_CALLS))

    @property
    def listed(self) -> dict[str, Any]:
        """The entry of GET /sources."""
        tools = [{"name": one.name, "effect": one.effect, "description": one.description} for one in self.tools]
        return {"id": AGENT, "object": "source", "kind": "agent", "tools": tools}

    def keep(self, row: Mapping[str, Any]) -> None:
        """Append a row to the transcript."""
        storage.append_line(self.transcript, json.dumps(row))


@dataclass
class _Run:
    """One run. `approve`, `execute` and `told` are called by its threads."""

    call: Call
    agents: Agents
    asks: bool
    tell: Callable[[dict[str, Any]], None]
    own: str
    goal: str
    seconds: float  # that a question waits
    steps: "list[Step]" = field(default_factory=list)
    open: set[str] = field(default_factory=set)  # ids of its questions
    ended: bool = False

    def approve(self, tool: "Tool", call: "ToolCall") -> bool:
        """Ask the client whether a call may run. Who does not answer within the run's time denies it."""
        if not self.asks or self.ended:
            return False
        own, said = secrets.token_urlsafe(16), Future[bool]()
        self.agents.questions[own] = Question(self.call.key, said)
        self.open.add(own)
        self.tell({"type": "question", "id": own, **_described(tool, call)})
        if self.ended:  # it ended before the question was known
            self.end()
        try:
            return said.result(self.seconds)
        except TimeoutError:
            return False
        finally:
            self.agents.questions.pop(own, None)

    def execute(self, tool: "Tool", call: "ToolCall", seconds: float) -> tuple[str, bool]:
        """Run a tool, and say so before."""
        from llmjax.agents.react import run_tool

        if self.ended:
            return LEFT, True
        if not self.agents.running.acquire(blocking=False):
            return BUSY, True
        try:
            self.tell({"type": "call", **_described(tool, call)})
            return run_tool(tool, call, seconds)
        finally:
            self.agents.running.release()

    def told(self, step: "Step") -> None:
        """Tell a call with its verdict and result. A result that comes after the end is kept too."""
        if self.ended:
            late = {"error": LEFT, "steps": [step.row()]}
            self.agents.keep({"id": self.own, "goal": self.goal, "setting": {}, "asked": [], "answer": late})
            return
        self.steps.append(step)
        self.tell({"type": "result", **_shown(step)})

    def end(self) -> None:
        """Deny what is open, and let no further call run."""
        self.ended = True
        for own in list(self.open):
            if (question := self.agents.questions.pop(own, None)) is not None and not question.said.done():
                question.said.set_result(False)


async def agent(call: Call) -> None:
    """Reach a goal by calling tools."""
    from llmjax.agents import methods

    body = call.read(AgentBody)
    served, agents = call.server.writer(body.model), _agents(call)
    goal = checked(body.goal, "goal")
    if body.asks and not body.stream:
        raise Refusal(400, "asks needs stream: true, because questions come in the stream", param="asks")
    budget = _budget(body, agents.budget)
    tries = _within("tries", body.tries, TRIES, MOST_TRIES)
    method = body.method or METHODS[0]
    if method not in METHODS:
        raise Refusal(400, f"method must be one of {', '.join(METHODS)}", param="method")
    setting = {"method": method, "tries": tries, "writes": agents.writes}
    own = new_id("agent")
    with call.server.ticket(served, 1, call.key) as ticket:
        talk = Talk(call, served, ticket, streams=bool(body.stream), on_news=functools.partial(_send, call))
        tell = talk.tell if body.stream else _silent
        run = _Run(call, agents, bool(body.asks), tell, own, goal, budget.seconds)
        conversation = methods.run(
            goal=goal, world=methods.World(agents.tools), budget=budget, approve=run.approve, execute=run.execute,
            on_step=run.told, **setting,
        )  # fmt: skip
        kept = {"id": own, "goal": goal, "setting": {**setting, "budget": vars(budget)}, "asked": talk.transcript}
        try:
            trace, _ = await talk.result(_overheard(conversation, tell))
        except BaseException as error:
            run.end()
            failed = {"error": str(error) or LEFT, "steps": [step.row() for step in run.steps]}
            agents.keep({**kept, "answer": failed})
            raise
        row = {**kept, "answer": trace.row()}
        await call.server.prepare(agents.keep, row)
    answer = {"answer": _clean(trace.answer), "ended": trace.ended, "branch": trace.branch, "read": trace.read}
    replayed = {"transcript": json.dumps(row)} if body.transcript else {}
    head = {"id": own, "object": "agent.answer", "model": body.model or served.name, **answer, "usage": talk.usage}
    if body.stream:
        await _send(call, {"type": "answer", **head, **replayed})
        await call.reply.end()
    else:
        await call.reply.json({**head, "steps": [_shown(step) for step in trace.steps], **replayed})


async def permission(call: Call) -> None:
    """Allow or deny a call of an agent that waits for it. Only the key of its run may."""
    body = call.read(PermissionBody)
    agents = _agents(call)
    question = agents.questions.get(body.id)
    if question is None or question.key != call.key or agents.questions.pop(body.id, None) is None:
        raise Refusal(
            404, "there is no such question: it was answered, or its run has ended", code="question_not_found", param="id"
        )  # fmt: skip
    question.said.set_result(body.allow)
    await call.reply.json({"status": "allowed" if body.allow else "denied"})


def _agents(call: Call) -> Agents:
    if call.server.agents is None:
        raise unsupported("agent", "the server has no tools: start it with --tools")
    return call.server.agents


def _budget(body: AgentBody, most: "Budget") -> "Budget":
    from llmjax.agents.react import Budget

    return Budget(
        _within("calls", body.calls, most.calls, most.calls), _within("seconds", body.seconds, most.seconds, most.seconds),
        _within("tokens", body.tokens, most.tokens, most.tokens),
    )  # fmt: skip


def _within(param: str, given: Any, default: Any, most: Any) -> Any:
    """A number of a request, from more than 0 to the most that the server permits."""
    if given is None:
        return default
    if not 0 < given <= most:
        raise Refusal(400, f"{param}={given} must be above 0 and at most {most:g}", param=param)
    return given


def _overheard(conversation: Conversation[T], tell: Callable[[dict[str, Any]], None]) -> Conversation[T]:
    """The conversation, whose thoughts are told."""
    asked = next(conversation)
    while True:
        text = yield asked
        try:
            thought = json.loads(text).get("thought")
        except (ValueError, AttributeError):
            thought = None
        if isinstance(thought, str) and thought.strip():
            tell({"type": "thought", "text": _clean(thought)})
        try:
            asked = conversation.send(text)
        except StopIteration as end:
            result: T = end.value
            return result


async def _send(call: Call, news: Mapping[str, Any]) -> None:
    await call.reply.event(news["type"], news)


def _silent(news: Mapping[str, Any]) -> None:
    """Who has no stream is told nothing before the end."""


def _described(tool: "Tool", call: "ToolCall") -> dict[str, Any]:
    return {"tool": tool.name, "effect": tool.effect, "arguments": json.dumps(dict(call.arguments))}


def _shown(step: "Step") -> dict[str, Any]:
    result = _clean(step.result)
    cut = {"cut": True} if len(result) > SHOWN else {}
    arguments = json.dumps(dict(step.call.arguments))
    return {
        "tool": step.call.name, "arguments": arguments, "verdict": _clean(step.verdict), "result": result[:SHOWN],
        "failed": step.failed, **cut,
    }  # fmt: skip


def _clean(text: str) -> str:
    """A text of a tool or of JSON, which may have half a character, as UTF-8 has it."""
    return text.encode("utf-8", "replace").decode()
