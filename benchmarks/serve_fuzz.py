"""Random and extreme requests to every path of the server: no answer may be 5xx, and no request may hang it.

    python -m venv .venv-fuzz && .venv-fuzz/bin/pip install "schemathesis>=4,<5"
    python benchmarks/serve_fuzz.py --python .venv-fuzz/bin/python --out results/serve_fuzz.json    about 5 minutes of a core

"schemathesis": requests that fit the server's own OpenAPI document, and requests that do not, until there are 10,000. Errors
must have the form that the document says. "numbers": every numeric field of every body with extreme values. The numbers of
requests and of their statuses are those that the server itself counts (`/metrics`). Afterwards the server must write the
same text as before. Without --workdir it serves a tiny model.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import types
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from common import make_parser, write
from serving import Process, served_run

from llmjax.serve.app import POSTS

CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance"
VALUES = (
    0, -0.0, 1, -1, 2, 3, 0.5, 1e-30, -1e-30, 1e6, -1e6, 1e300, -1e300, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64,
    -(2**63), 10**30, 10**4000, True, False, "1", "", [], [1], {}, float("nan"), float("inf"),
)  # fmt: skip
AT_ONCE = 8  # requests
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/v1/rerank": {"query": "a", "documents": ["a", "b"]},
    "/v1/fim/completions": {"prompt": "a", "suffix": "b", "max_tokens": 2},
    "/ask": {"question": "a", "files": [{"name": "a", "text": "a"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
    "/feedback": {"prompt": [], "completion": "a", "label": True},
}
GREEDY = {"prompt": "The", "max_tokens": 20, "temperature": 0, "logprobs": 1}


def numeric(kind: type[msgspec.Struct]) -> list[str]:
    """The fields of a body that are numbers, or have numbers in them."""

    def within(hint: Any) -> bool:
        if isinstance(hint, types.UnionType) or typing.get_origin(hint):
            return any(within(one) for one in typing.get_args(hint))
        return hint in (int, float)

    return [one.name for one in msgspec.structs.fields(kind) if within(one.type)]


def statuses(server: Process) -> Counter[tuple[str, str]]:
    """(route, status) -> requests, as the server counts them."""
    lines = re.findall(
        r'^llmjax_http_requests_total\{route="([^"]*)",status="(\d+)"\} ([\d.e+]+)$', server.get("/metrics"), re.M
    )
    return Counter({(route, status): int(float(count)) for route, status, count in lines})


def numbers(port: int) -> dict[str, Any]:
    """Every numeric field with every value: how many requests, and those whose answer is wrong."""
    bodies: list[tuple[str, str, Any]] = []
    for path, (_, kind) in POSTS.items():
        for name in numeric(kind):
            for value in VALUES:
                listed = name in ("logit_bias", "tokens", "prompt", "input")
                bodies += [(path, name, one) for one in ([value, [value], {"5": value}] if listed else [value])]

    def answered(one: tuple[str, str, Any]) -> str:
        path, name, value = one
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({**BASES[path], name: value})
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        error = json.loads(content).get("error", {}) if answer.status >= 400 else {"message": ""}
        good = answer.status < 500 and "message" in error
        return "" if good else f"{path} {name}={str(value)[:60]}: {answer.status} {content[:200]!r}"

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return {"requests": len(bodies), "wrong": list(filter(None, threads.map(answered, bodies)))}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, help="the run to serve (default: a tiny model)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python that has schemathesis")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=250, help="of schemathesis for each path, in each of its runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with served_run(args.workdir) as workdir:
        server = Process(workdir, 4, 256, ["--config.serve.queue=256"])
        try:
            before = server.get("/v1/completions", GREEDY)["choices"]
            of_numbers = numbers(server.port)
            print(of_numbers, flush=True)
            made: list[dict[str, Any]] = []
            while sum(one["requests"] for one in made) < args.requests:
                made.append(schemathesis(args, server, seed=args.seed + len(made)))
                print(made[-1], flush=True)
            again = server.get("/v1/completions", GREEDY)["choices"]
            counted = statuses(server)
        finally:
            status = server.end()
    by_status: Counter[str] = Counter()
    for (_, one), count in counted.items():
        by_status[one] += count
    results: dict[str, Any] = {
        "numbers": of_numbers, "schemathesis": made, "requests": sum(one["requests"] for one in made),
        "statuses": dict(sorted(by_status.items())),
        "server_errors": {f"{route} {one}": n for (route, one), n in counted.items() if one.startswith("5")},
        "same_text_afterwards": again == before, "exit_status": status,
    }  # fmt: skip
    failed = [out for one in made for out in one["failures"]]
    results["passes"] = (
        not results["server_errors"] and not of_numbers["wrong"] and not failed and again == before and status == 0
    )
    print(json.dumps(results, indent=1))
    write(results, args.out)
    return 0 if results["passes"] else 1


def schemathesis(args: argparse.Namespace, server: Process, *, seed: int) -> dict[str, Any]:
    """One run of schemathesis: its number of requests, and the failures that it tells."""
    before = sum(statuses(server).values())
    command = [
        str(args.python.absolute().with_name("schemathesis")), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", CHECKS,
        "--phases", "coverage,fuzzing", "--max-examples", str(args.examples), "--workers", str(AT_ONCE), "--seed", str(seed), "--continue-on-failure", "--no-shrink",
        "--suppress-health-check", "all", "--request-timeout", "60", "--warnings", "off",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # it keeps a cache where it runs
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    report = done.stdout + done.stderr
    requests = sum(statuses(server).values()) - before - 2  # without the document and the first of the two counts
    if requests < 10:
        raise SystemExit(f"schemathesis did not run:\n{report[-3000:]}")
    failures = re.findall(r"^- (.*)$", report, re.M) if done.returncode else []
    return {"seed": seed, "requests": requests, "failures": failures or ([report[-2000:]] if done.returncode else [])}


if __name__ == "__main__":
    sys.exit(main())
