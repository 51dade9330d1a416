"""Random and extreme requests to every path of the server: no answer may be 5xx, and no request may hang it.

    python -m venv .venv-fuzz && .venv-fuzz/bin/pip install "schemathesis>=4,<5"
    python benchmarks/serve_fuzz.py --python .venv-fuzz/bin/python --out results/serve_fuzz.json    about 5 minutes of a core

"schemathesis": requests that fit the server's own OpenAPI document, and requests that do not, until there are 10,000. Errors
must have the form that the document says. "numbers": every numeric field of every body with extreme values; "texts": every
field of text with odd ones. Both also ask a database, documents, an agent with a tool, and a persona, which the server gets beside
the model. The numbers of requests and of their statuses are those that the server itself counts (`/metrics`). Afterwards the
server must write the same text as before. Without --workdir it serves a tiny model. --requests 0 leaves schemathesis out.
"""

import argparse
import base64
import http.client
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import types
import typing
import urllib.error
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from common import make_parser, write
from serving import Process, served_run

from llmjax.persona import card, rights, style, threshold
from llmjax.retrieve.documents.index import Index
from llmjax.serve.app import POSTS

CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance"
VALUES = (
    0, -0.0, 1, -1, 2, 3, 0.5, 1e-30, -1e-30, 1e6, -1e6, 1e300, -1e300, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64,
    -(2**63), 10**30, 10**4000, True, False, "1", "", [], [1], {}, float("nan"), float("inf"),
)  # fmt: skip
AT_ONCE = 8  # requests
DATABASE, DOCUMENTS, PERSONA = "songs", "papers", "keeper"  # names that the server gives what `beside` makes
HI = [{"role": "user", "content": "hi"}]
BASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 2, "logprobs": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Delete all songs"}], "source": DATABASE}),
    ("/v1/chat/completions", {"messages": HI, "model": PERSONA}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
    ("/v1/embeddings", {"input": "hi"}),
    ("/v1/rerank", {"query": "a", "documents": ["a", "b"]}),
    ("/v1/fim/completions", {"prompt": "a", "suffix": "b", "max_tokens": 2}),
    ("/ask", {"question": "a", "files": [{"name": "a", "text": "a"}]}),
    ("/ask", {"question": "Which songs are there?", "source": DATABASE}),
    ("/ask", {"question": "Which ship sank?", "source": DOCUMENTS, "transcript": True}),
    ("/agent", {"goal": "Look at the mail.", "calls": 1, "tokens": 48}),
    ("/agent/permission", {"id": "a", "allow": True}),
    ("/read", {"name": "a.html", "data": base64.b64encode(b"<p>A page with a text.</p>").decode()}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [5]}),
    ("/feedback", {"prompt": HI, "completion": "a", "label": True}),
)
TEXTS = (
    "", " ", "\n", "\0", "a\0b", "\u202e", "\ufeff", "\U0001f600" * 30, "e\u0301" * 99, "<|im_end|>", "<s>", "{{ 7 * 7 }}", "${x}", "%s%n",
    "' OR 1=1; --", '") OR rank', "NEAR(a b) AND *", "../../etc/passwd", "/dev/null", "a.pdf", "a.eml", "con", "(" * 500, "a" * 1999, "\u00e4 " * 990, "=" * 5000,
    "data:text/html;base64,AAAA", "\ud800",
)  # fmt: skip
TOOLS = """
def look(where: str) -> str:
    \"""Look somewhere.\"""
    return f"nothing in {where}"
"""
GREEDY = {"prompt": "The", "max_tokens": 20, "temperature": 0, "logprobs": 1}


def fields_of(kind: type[msgspec.Struct], *wanted: type) -> list[str]:
    """The fields of a body that are of these types, or have such values in them."""

    def within(hint: Any) -> bool:
        if isinstance(hint, types.UnionType) or typing.get_origin(hint):
            return any(within(one) for one in typing.get_args(hint))
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            return False
        return hint in wanted

    return [one.name for one in msgspec.structs.fields(kind) if within(one.type)]


def beside(folder: Path, workdir: Path) -> list[str]:
    """A database, documents, a tool and a persona for a server of a run, as its arguments."""
    with sqlite3.connect(folder / f"{DATABASE}.sqlite") as db:
        db.execute('CREATE TABLE "Song of € \'x\'" (Id INTEGER PRIMARY KEY, "Title <b>" TEXT, Length REAL)')
        db.executemany(
            "INSERT INTO \"Song of € 'x'\" VALUES (?, ?, ?)", [(i, f"<b>{i}</b>", i * 0.1) for i in range(30)]
        )
    db.close()
    (folder / DOCUMENTS).mkdir()
    (folder / DOCUMENTS / "ships.md").write_text("# Ships\n\nThe Vasa sank in 1628 before Stockholm.\n")
    (folder / "tools.py").write_text(TOOLS)
    own = rights.Rights("Ann", "letters", "public domain", "she died in 1850", "the benchmark")
    limits = threshold.Threshold(0.4, 20, 20, 0.1, 0.9, "none")
    figures = style.figures(["The oil lasts."])
    made = card.Persona("Ann Keeper", str(workdir.resolve()), "", False, own, limits, figures, folder=folder / PERSONA)
    with Index(made.folder / card.INDEX) as index:
        index.add_texts([("a.txt", "The oil of the lamp lasts until the morning.")])
    card.write(made)
    return [
        "--db", str(folder / f"{DATABASE}.sqlite"), "--docs", str(folder / DOCUMENTS), "--tools", str(folder / "tools.py"),
        "--adapter", f"{PERSONA}={made.folder}", "--calls", "2", "--seconds", "20", "--tokens", "64",
    ]  # fmt: skip


def statuses(server: Process) -> Counter[tuple[str, str]]:
    """(route, status) -> requests, as the server counts them."""
    lines = re.findall(
        r'^llmjax_http_requests_total\{route="([^"]*)",status="(\d+)"\} ([\d.e+]+)$', server.get("/metrics"), re.M
    )
    return Counter({(route, status): int(float(count)) for route, status, count in lines})


def odd(port: int, values: Sequence[Any], *wanted: type) -> dict[str, Any]:
    """Every field of these types with every value: how many requests, and those whose answer is wrong."""
    bodies: list[tuple[str, str, Any]] = []
    for path, base in BASES:
        for name in fields_of(POSTS[path][1], *wanted):
            for value in values:
                listed = name in ("logit_bias", "tokens", "prompt", "input", "stop", "documents")
                bodies += [
                    (path, name, {**base, name: one}) for one in ([value, [value], {"5": value}] if listed else [value])
                ]
        for value in values if str in wanted else ():
            if "messages" in base:
                bodies.append((path, "messages", {**base, "messages": [{"role": "user", "content": value}]}))
            if "files" in base:
                bodies.append((path, "files", {**base, "files": [{"name": value, "text": value}]}))

    def answered(one: tuple[str, str, Any]) -> str:
        path, name, given = one
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", path, json.dumps(given), {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        error = json.loads(content).get("error", {}) if answer.status >= 400 else {"message": ""}
        good = answer.status < 500 and "message" in error
        return "" if good else f"{path} {name}={str(given[name])[:60]!r}: {answer.status} {content[:200]!r}"

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return {"requests": len(bodies), "wrong": list(filter(None, threads.map(answered, bodies)))}


def plain(server: Process, path: str, body: dict[str, Any]) -> str:
    """What a path says where it refuses a body that is not odd."""
    try:
        server.get(path, body)
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.dumps(body)[:100]}: {error.read().decode()[:300]}"
    return ""


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, help="the run to serve (default: a tiny model)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python that has schemathesis")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=250, help="of schemathesis for each path, in each of its runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    longer = ["--config.model.max_length=2048"]  # so that prompts with a schema or tools fit
    with served_run(args.workdir, longer) as workdir, tempfile.TemporaryDirectory() as folder:
        server = Process(workdir, 4, 2048, ["--config.serve.queue=256", *beside(Path(folder), workdir)])
        try:
            before = server.get("/v1/completions", GREEDY)["choices"]
            refused = {path: said for path, body in BASES if (said := plain(server, path, body))}
            print(refused, flush=True)
            of_numbers, of_texts = odd(server.port, VALUES, int, float), odd(server.port, TEXTS, str)
            print(of_numbers, of_texts, flush=True)
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
        "numbers": of_numbers, "texts": of_texts, "refused_plain": refused, "schemathesis": made, "requests": sum(one["requests"] for one in made),
        "statuses": dict(sorted(by_status.items())),
        "server_errors": {f"{route} {one}": n for (route, one), n in counted.items() if one.startswith("5")},
        "same_text_afterwards": again == before, "exit_status": status,
    }  # fmt: skip
    failed = [out for one in made for out in one["failures"]]
    # No question for permission is open, and few models were taught to fill in the middle.
    results["passes"] = (
        refused.keys() <= {"/agent/permission", "/v1/fim/completions"}
        and not results["server_errors"]
        and not of_numbers["wrong"]
        and not of_texts["wrong"]
        and not failed
        and again == before
        and status == 0
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
