"""The airline's world over HTTP with faults: success by final state, with and without the filter of broken endpoints.

    python benchmarks/airline_http.py --tasks FILE.json [--data DIR] [--slack N] [--out FILE.json]

The world is served on this machine, and an agent gets tools from its OpenAPI file. Every endpoint that reads is there several times, under
names that say nothing: one works, and each of the others has a fault: gone (404), hangs, schema (another form of answer), stale (the state
before anything was done), flaky (503 every other time). Endpoints that write lose their first answer after the write.

A script makes the reference actions of each task at an endpoint chosen at random. When a call fails, it chooses again.
Its budget is the number of actions plus N calls. A try succeeds if the final state is that after the reference actions.
The filter calls every reading endpoint with an example before the task (llmjax/agents/probes.py); the script reports
these calls separately. The agent sends writes again under the same Idempotency-Key, and each write must happen once.
"""

import contextlib
import http.server
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
from airline import actions_of, goal_of, replay
from airline_world import RefusedError, World, read_data

from llmjax.agents import openapi, probes
from llmjax.agents.react import Budget, react
from llmjax.agents.tools import Tool
from llmjax.eval.statistics import mean
from llmjax.infer import asking

FAULTS = ("gone", "hangs", "schema", "stale", "flaky")
SECONDS = 0.5  # of a request
EXAMPLES = {
    "user_id": "mia_li_3668", "reservation_id": "4WQ150", "origin": "JFK", "destination": "SEA", "date": "2024-05-20",
    "flight_number": "HAT001", "expression": "1 + 1", "thought": "hm", "summary": "none",
}  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """A world at endpoints with faults."""

    daemon_threads = True

    def __init__(self, data: Mapping[str, Any], seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.world, self.before = World(data), World(data)
        self.lock = threading.Lock()
        self.requests, self.done = 0, 0  # requests; writes that were done
        self.counts: dict[str, int] = {}
        self.answers: dict[str, bytes] = {}  # by key, of writes that were done
        luck = random.Random(seed)
        self.endpoints: dict[str, tuple[str, str]] = {}  # name -> function, fault
        self.tools = {one.name: one for one in self.world.tools()}
        for name, one in self.tools.items():
            faults = ["", *luck.sample(FAULTS, 3)] if one.effect == "read" else ["lost"]
            for fault in luck.sample(faults, len(faults)):
                self.endpoints[f"{name}_{luck.randrange(1 << 32):08x}"] = (name, fault)

    def document(self) -> dict[str, Any]:
        """The OpenAPI document of the endpoints."""
        paths = {}
        for endpoint, (name, _) in self.endpoints.items():
            one = self.tools[name]
            answer = {"200": {"description": "", "content": {"application/json": {"schema": ANSWERS.get(name, {})}}}}
            operation: dict[str, Any] = {"operationId": endpoint, "summary": one.description, "responses": answer}
            if one.effect == "read":
                operation["parameters"] = [
                    {"name": key, "in": "query", "required": True, "schema": schema, "example": EXAMPLES[key]}
                    for key, schema in one.schema["properties"].items()
                ]  # fmt: skip
            else:
                operation["parameters"] = [{"name": "Idempotency-Key", "in": "header"}]
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": dict(one.schema)}},
                }
            paths[f"/{endpoint}"] = {"get" if one.effect == "read" else "post": operation}
        return {"openapi": "3.1.0", "paths": paths}

    def answer(self, endpoint: str, arguments: Mapping[str, Any], key: str) -> tuple[int, bytes]:
        """The status and the body of a request."""
        name, fault = self.endpoints[endpoint]
        with self.lock:
            self.requests += 1
            number = self.counts[endpoint] = self.counts.get(endpoint, 0) + 1
            if fault == "gone" or (fault == "flaky" and number % 2):
                return (404 if fault == "gone" else 503), b"{}"
            if fault == "schema":
                return 200, b'{"data": null}'
            if key and key in self.answers:
                return 200, self.answers[key]
            world = self.before if fault == "stale" else self.world
            try:
                made = json.dumps(getattr(world, name)(**arguments), default=str).encode()
            except RefusedError as error:
                return 422, json.dumps({"error": str(error)}).encode()
            if key:
                self.answers[key] = made
                self.done += 1
        if fault == "hangs" or fault == "lost":
            time.sleep(2 * SECONDS)
        return 200, made


# The top of what each reading function answers.
ANSWERS: dict[str, Any] = {
    "get_user_details": {"type": "object", "required": ["payment_methods", "reservations"], "properties": {"payment_methods": {"type": "object"}, "reservations": {"type": "array"}}},
    "get_reservation_details": {"type": "object", "required": ["reservation_id", "flights"], "properties": {"reservation_id": {"type": "string"}, "flights": {"type": "array"}}},
    **{key: {"type": "array"} for key in ("list_all_airports", "search_direct_flight", "search_onestop_flight")},
    **{key: {"type": "string"} for key in ("calculate", "get_flight_status", "think", "transfer_to_human_agents")},
}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands requests to the server."""

    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self._answer(path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.path, json.loads(body), self.headers["Idempotency-Key"])

    def _answer(self, path: str, arguments: dict[str, Any], key: str) -> None:
        status, body = self.server.answer(path.strip("/"), arguments, key)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client no longer waits
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(data: Mapping[str, Any], seed: int) -> Iterator[tuple[Server, list[Tool]]]:
    """A server, and the tools of its OpenAPI document."""
    with Server(data, seed) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        yield (
            server,
            openapi.tools_of(server.document(), base=f"http://{host}", allowed=[host], seconds=SECONDS, tries=2),
        )
        server.shutdown()


def script(task: Mapping[str, Any], server: Server, names: list[str], seed: int) -> Callable[[asking.Ask], str]:
    """Writes the reference actions, each at an endpoint of its function that is chosen at random until one works."""
    luck, left = random.Random(seed), list(actions_of(task))
    failed: set[str] = set()
    used = ""

    def write(asked: asking.Ask) -> str:
        nonlocal used
        last = asked.prompts[0][-1]["content"]
        if used and "<data>\nFailedError" in last:
            failed.add(used)
        elif used:
            left.pop(0)
        if not left or '"tool"' not in asked.json_schema:
            return json.dumps({"thought": "", "answer": "Done."})
        name, arguments = left[0]["name"], left[0]["arguments"]
        offered = [one for one in names if server.endpoints[one][0] == name]
        used = luck.choice([one for one in offered if one not in failed] or offered)
        given = arguments if server.tools[name].effect == "read" else {"body": arguments}
        return json.dumps({"thought": "", "tool": used, "arguments": given})

    return write


def attempt(
    data: Mapping[str, Any], task: Mapping[str, Any], wanted: str, *, slack: int, filtered: bool, seed: int
) -> dict[str, Any]:
    """One try: whether the final state is right, the calls that failed, and what the filter cost and said."""
    with serving(data, seed) as (server, tools):
        verdicts: dict[str, str] = {}
        if filtered:
            found = probes.probe(tools, tries=2)
            tools = probes.without_broken(tools, found)
            verdicts = {server.endpoints[one.tool][1] or "works": one.verdict for one in found if one.calls}
        before = server.requests
        budget = Budget(calls=len(actions_of(task)) + slack, tokens=1 << 20)
        conversation = react(goal_of(task), tools, budget=budget, approve=lambda tool, call: True)
        trace, _ = asking.scripted(conversation, script(task, server, [one.name for one in tools], seed))
        writes = sum(
            server.tools[server.endpoints[step.call.name][0]].effect != "read" and not step.failed
            for step in trace.steps
        )
        return {
            "success": float(server.world.state() == wanted), "calls": len(trace.steps), "failed": sum(step.failed for step in trace.steps),
            "probes": before, "verdicts": verdicts, "done_twice": server.done - writes,
        }  # fmt: skip


def main() -> None:
    parser = common.make_parser(__doc__, out=common.ROOT / "results" / "airline_http.json")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument(
        "--slack", type=int, default=1, metavar="N", help="calls beyond the reference actions (default: 1)"
    )
    args = parser.parse_args()
    openapi.PAUSE = 0.01
    data = read_data(args.data or args.tasks.parent)
    tasks = json.loads(args.tasks.read_text(encoding="utf-8"))
    results: dict[str, Any] = {"tasks": len(tasks), "slack": args.slack, "faults": FAULTS}
    for name, filtered in (("without filter", False), ("with filter", True)):
        with ThreadPoolExecutor(8) as pool:  # they mostly wait for time-outs
            jobs = [
                pool.submit(attempt, data, task, replay(data, task)[0], slack=args.slack, filtered=filtered, seed=seed)
                for seed, task in enumerate(tasks)
            ]
            made = [job.result() for job in jobs]
        success = mean([one["success"] for one in made])
        results[name] = {
            "success": {"value": round(success.value, 4), "error": round(success.error, 4), "count": success.count},
            **{key: sum(one[key] for one in made) for key in ("calls", "failed", "probes", "done_twice")},
        }  # fmt: skip
        if filtered:
            results[name]["verdicts"] = {fault: verdict for one in made for fault, verdict in one["verdicts"].items()}
    print(json.dumps(results, indent=1))
    common.write(results, args.out)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
