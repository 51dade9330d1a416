"""The routes of the studio: the page, what it reads as JSON, and the chat."""

import json
import math
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmjax.errors import UserError
from llmjax.report import marks
from llmjax.serve.app import KINDS, PAGE_HEADERS
from llmjax.serve.guard import Access, Guard
from llmjax.serve.refusals import Refusal, json_response
from llmjax.studio import batch, rows, runs, studies
from llmjax.studio.chat import PREFIX, Chat
from llmjax.studio.places import Places
from llmjax.studio.watch import Followers

STATIC = Path(__file__).parent / "static"
MOST_RUNS = 12  # that are compared
MOST_CURVES = 64  # of a run in one answer
BODY_BYTES = 20_000


class Studio:
    """What the routes share."""

    def __init__(self, places: Places, chat: Chat) -> None:
        self.places, self.chat, self.followers = places, chat, Followers()
        self.heavy = threading.Semaphore(2)  # readings that take memory and time, at once


class Query:
    """The parameters of a request."""

    def __init__(self, request: Request) -> None:
        self._given = request.query_params

    def text(self, name: str, otherwise: str = "") -> str:
        return self._given.get(name, otherwise)

    def texts(self, name: str) -> list[str]:
        return self._given.getlist(name)

    def number(self, name: str, otherwise: int, *, most: int = 1 << 40) -> int:
        """A whole number from 0 to `most`. Raises Refusal."""
        text = self._given.get(name, str(otherwise))
        if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) > most:
            raise Refusal(400, f"{name} is a whole number from 0 to {most}", param=name)
        return int(text)


Reader = Callable[[Studio, Query], Any]


def list_runs(studio: Studio, query: Query) -> Any:
    """All runs, chains and studies."""
    return {"runs": runs.listed(studio.places)}


def places(studio: Studio, query: Query) -> Any:
    """The folders that are shown."""
    return {"places": studio.places.names}


def one_run(studio: Studio, query: Query) -> Any:
    """A run without its curves."""
    folder = runs.run_folder(studio.places, query.text("name"))
    curves, version = studio.followers.curves(folder / "metrics.jsonl")
    return {**runs.detail(studio.places, folder, curves), "metrics": sorted(curves.by_name), "version": version}


def curves_of(studio: Studio, query: Query) -> Any:
    """The curves of runs by metric ("NAME", or "PREFIX*"). A run whose `seen` is the version of its file is the same."""
    names, seen = query.texts("name")[:MOST_RUNS], query.texts("seen")
    metrics = query.texts("metric")[:MOST_CURVES]
    prefixes = tuple(metric[:-1] for metric in metrics if metric.endswith("*"))
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        folder = runs.run_folder(studio.places, name)
        state = runs.overview(folder)
        told = {key: state[key] for key in ("state", "error", "age", "step", "steps")}
        curves, version = studio.followers.curves(folder / "metrics.jsonl")
        if number < len(seen) and seen[number] == str(version):
            found[name] = {**told, "version": version, "same": True}
            continue
        asked = [k for k in curves.by_name if k in metrics or k.startswith(prefixes)]
        found[name] = {
            **told, "version": version, "rows": curves.rows, "metrics": sorted(curves.by_name), "curves": {k: runs.plain_curve(curves.by_name[k]) for k in asked},
            "bad_steps": curves.bad_steps, "bad_count": curves.bad_count, "last": curves.last,
        }  # fmt: skip
    return {"runs": found}


def compare(studio: Studio, query: Query) -> Any:
    """The differences between runs."""
    found = {}
    for name in dict.fromkeys(query.texts("name")[:MOST_RUNS]):
        folder = runs.run_folder(studio.places, name)
        found[name] = runs.read_run(folder, studio.followers.curves(folder / "metrics.jsonl")[0])
    return runs.compared(found)


def one_study(studio: Studio, query: Query) -> Any:
    """A study."""
    return studies.detail(studio.places, studio.places.path(query.text("name")))


def one_chain(studio: Studio, query: Query) -> Any:
    """A chain."""
    return studies.chain(studio.places, studio.places.path(query.text("name")))


def first_batch(studio: Studio, query: Query) -> Any:
    """The first batch of a run with its mask."""
    with studio.heavy:
        return batch.first_batch(runs.run_folder(studio.places, query.text("name")))


def scored_samples(studio: Studio, query: Query) -> Any:
    """The best and the worst answers of a run."""
    with studio.heavy:
        return {"groups": runs.samples(runs.run_folder(studio.places, query.text("name")))}


def rollouts(studio: Studio, query: Query) -> Any:
    """A round of samples."""
    folder = runs.run_folder(studio.places, query.text("name"))
    return {"rows": runs.rollouts(folder, query.number("round", 0, most=999_999))}


def files(studio: Studio, query: Query) -> Any:
    """A folder."""
    return rows.listing(studio.places, query.text("name"), query.text("place", "runs"))


def data_rows(studio: Studio, query: Query) -> Any:
    """A page of rows."""
    start, count = query.number("start", 0), query.number("count", 20, most=rows.MOST_TOKENS)
    with studio.heavy:
        return rows.page(studio.places, query.text("name"), query.text("place", "runs"), start=start, count=count)


READERS: dict[str, Reader] = {
    "/api/runs": list_runs,
    "/api/places": places,
    "/api/run": one_run,
    "/api/curves": curves_of,
    "/api/compare": compare,
    "/api/study": one_study,
    "/api/chain": one_chain,
    "/api/batch": first_batch,
    "/api/samples": scored_samples,
    "/api/rollouts": rollouts,
    "/api/files": files,
    "/api/rows": data_rows,
}


def make_app(studio: Studio, *, hosts: Collection[str], origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application of the studio.

    Args:
        hosts: names by which it may be asked.
        origins: sites whose pages may ask.
    """
    pages = {f"/{path.name}": path for path in sorted(STATIC.iterdir())} | {"/": STATIC / "index.html"}
    app = Starlette(
        routes=[
            *(Route(path, _reading(studio, reader), methods=["GET"]) for path, reader in READERS.items()),
            *(Route(path, _file(file), methods=["GET"]) for path, file in pages.items()),
            Route("/api/chat", _chat_state(studio), methods=["GET"]),
            Route("/api/chat", _open_chat(studio), methods=["POST"]),
            Route("/api/marks", _write_marks(studio), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        inner = studio.chat if scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/") else app
        await inner(scope, receive, send)

    return Guard(routed, Access(hosts, (), tuple(origins), frozenset(pages)))


def _reading(studio: Studio, reader: Reader) -> Callable[[Request], Any]:
    """The endpoint of a reader. What changed on disk while it was read is an answer that asks to try again."""

    async def endpoint(request: Request) -> Response:
        try:
            found = await run_in_threadpool(reader, studio, Query(request))
            return json_response(finite(found), headers={"cache-control": "no-store"})
        except Refusal as refusal:
            return refusal.response()
        except UserError as error:
            return Refusal(409, str(error), code="unreadable").response()
        except OSError as error:
            message = f"a file cannot be read ({error.strerror}): it may have been replaced just now"
            return Refusal(409, message, code="unreadable", again=True).response()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return Refusal(500, "the studio failed; its terminal says where", code="internal_error").response()

    return endpoint


def finite(value: Any) -> Any:
    """A value with None for numbers that JSON does not have, and without half characters."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {finite(str(key)): finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _file(path: Path) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        return Response(path.read_bytes(), headers=PAGE_HEADERS, media_type=KINDS[path.suffix])

    return endpoint


def _chat_state(studio: Studio) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        return json_response(finite(studio.chat.state), headers={"cache-control": "no-store"})

    return endpoint


def _open_chat(studio: Studio) -> Callable[[Request], Any]:
    """Load the model of {"name": RUN, "step": STEP}; a name of null frees the one that is there."""

    async def endpoint(request: Request) -> Response:
        try:
            name, step = await _asked(request)
            if name is None:
                await studio.chat.close()
                return json_response(studio.chat.state)
            folder = runs.run_folder(studio.places, name)
            shown = name or folder.name
            if step is not None:
                folder, shown = folder / "checkpoints" / str(step), f"{shown}@{step}"
            await studio.chat.open(shown, folder)
            return json_response(finite(studio.chat.state))
        except Refusal as refusal:
            return refusal.response()
        except UserError as error:
            return Refusal(409, str(error), code="unusable_model").response()

    return endpoint


def _write_marks(studio: Studio) -> Callable[[Request], Any]:
    """Replace the marks of {"name": RUN, "tags": [TAG, ...], "note": TEXT}."""

    async def endpoint(request: Request) -> Response:
        try:
            body = await _body(request)
            name, tags, note = body.get("name"), body.get("tags"), body.get("note")
            texts = isinstance(tags, list) and all(isinstance(one, str) for one in tags)
            if not isinstance(tags, list) or not texts or not isinstance(name, str) or not isinstance(note, str):
                raise Refusal(400, 'send {"name": RUN, "tags": [TAG, ...], "note": TEXT}')
            folder, found = runs.marked_folder(studio.places, name), marks.checked(tags, note)
            await run_in_threadpool(marks.write, folder, found)
            return json_response({"tags": found.tags, "note": found.note})
        except Refusal as refusal:
            return refusal.response()
        except UserError as error:
            return Refusal(400, str(error), param="tags").response()
        except OSError as error:
            return Refusal(409, f"the run's folder cannot be written: {error.strerror}", code="unwritable").response()

    return endpoint


async def _asked(request: Request) -> tuple[str | None, int | None]:
    """The name and the step of a body. Raises Refusal."""
    body = await _body(request)
    name, step = body.get("name", 0), body.get("step")
    if not isinstance(name, str | None) or not (step is None or (type(step) is int and 0 <= step < 1 << 40)):
        raise Refusal(400, 'send {"name": RUN} or {"name": RUN, "step": STEP}', param="name")
    return name, step


async def _body(request: Request) -> dict[str, Any]:
    """The object of a body; {}: it is none. Raises Refusal; JSON must say that it is JSON, which forms of other sites cannot."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal(415, "send JSON, with content-type: application/json", code="unsupported_media_type")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > BODY_BYTES:
            raise Refusal(413, f"a request has at most {BODY_BYTES:,} bytes", code="too_large")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) else {}


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return Refusal(
        status, f"there is nothing at {request.method} {request.url.path[:200]}", code="not_found"
    ).response()
