"""Tools from an OpenAPI file: each operation is a tool, and a call is a request to the API's base URL.

A tool has the operation's parameters and, as `body`, its JSON. GET reads, DELETE asks, other methods write. What an operation
answers is checked against its own schema. The keys of an API are headers that the model never sees.

A request that fails because the server or the connection does is sent again if that is safe: a GET, or an operation with the header
Idempotency-Key, which every call fills with a key of its own. Where nobody knows whether such an operation was done, the same call has
the same key when the model makes it again.
"""

import functools
import http.client
import json
import re
import secrets
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmjax import storage
from llmjax.agents import network
from llmjax.agents.schemas import followed, narrowed, problem
from llmjax.agents.tools import NAME, FailedError, Tool
from llmjax.errors import UserError

EFFECTS = {"get": "read", "head": "read", "post": "write", "put": "write", "patch": "write", "delete": "ask"}
RESERVED = ("accept", "content-type", "authorization", "host", "cookie", "content-length", "transfer-encoding", "connection")  # fmt: skip
KEY = "idempotency-key"
AGAIN = (429, 500, 502, 503, 504)  # answers after which a request may be sent again
SECONDS, TRIES, PAUSE = 20.0, 3, 0.2  # of one try; tries; the first pause between them, which doubles
SHOWN = 500  # characters of an error


@dataclass(frozen=True)
class Api:
    """Where an API is, and how it is called."""

    base: str
    allowed: tuple[str, ...]  # hosts, see `network`
    headers: Mapping[str, str]  # with the keys of the API
    seconds: float = SECONDS
    tries: int = TRIES
    unknown: dict[tuple[str, bytes | None], str] = field(default_factory=dict)  # keys of calls that may have been done


@dataclass(frozen=True)
class Operation:
    """A method of a path."""

    method: str
    path: str
    places: Mapping[str, str]  # parameter -> path, query or header
    answer: Mapping[str, Any]  # the schema of its JSON
    keyed: bool  # whether it takes an Idempotency-Key


def read(path: Path) -> Mapping[str, Any]:
    """An OpenAPI file in JSON or YAML. Raises UserError for another file."""
    try:
        found = yaml.safe_load(storage.read_text(path))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON or YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} is no object")
    return found


def tools_of(
    document: Mapping[str, Any], *, base: str = "", allowed: Sequence[str] = (), headers: Mapping[str, str] | None = None,
    seconds: float = SECONDS, tries: int = TRIES,
) -> list[Tool]:  # fmt: skip
    """The tools of an OpenAPI document.

    Args:
        base: the URL in front of the paths (default: the document's first server).
        allowed: the hosts that may be called; that of the base must be one.
        headers: sent with every request, for instance the API's key.
        seconds, tries: of one request.

    Raises:
        UserError: for another version than 3, a base that may not be called, and a document without operations.
    """
    if not str(document.get("openapi", "")).startswith("3."):
        raise UserError("this is no OpenAPI 3 document: convert a document of version 2 (swagger) first")
    servers = document.get("servers") or [{}]
    base = (base or str(servers[0].get("url", ""))).rstrip("/")
    try:
        scheme, host, port, _ = network.host_of(base)
    except network.RefusedError as error:
        raise UserError(f"the base URL of the API cannot be used: {error}. Give it as FILE@URL") from error
    if not network.listed(allowed, host, port, default=network.PORTS[scheme]):
        raise UserError(f"{base} may not be called: give --allow-host {host}:{port} if it may")
    api = Api(base, tuple(allowed), dict(headers or {}), seconds, tries)
    found = list(_operations(document, api, f"{host}:{port}"))
    if not found:
        raise UserError("the OpenAPI document has no operations")
    return found


def _operations(document: Mapping[str, Any], api: Api, origin: str) -> Iterator[Tool]:
    names: set[str] = set()
    for path, item in (document.get("paths") or {}).items():
        item = _followed(item, document)
        for method, effect in EFFECTS.items():
            if method not in item:
                continue
            one = item[method]
            given = [_followed(each, document) for each in [*item.get("parameters", ()), *one.get("parameters", ())]]
            parameters = {str(each["name"]): each for each in given}  # those of the operation replace those of the path
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", str(one.get("operationId") or f"{method}{path}")).strip("_")[:64]
            if name in names or not NAME.fullmatch(name):
                raise UserError(f"two operations are called {name!r}: give {method.upper()} {path} another operationId")
            names.add(name)
            schema, places, keyed = _arguments(one, parameters, document)
            answers = one.get("responses", {})
            answer = next((_followed(answers[code], document) for code in answers if str(code).startswith("2")), {})
            operation = Operation(method.upper(), path, places, narrowed(_json(answer), document, closed=False), keyed)
            described = " ".join(str(one.get("summary") or one.get("description") or name).split())
            run = functools.partial(_call, api, operation)
            yield Tool(name, described, schema, run, effect, origin=origin, example=_example(parameters, schema))


def _arguments(
    one: Mapping[str, Any], parameters: Mapping[str, Any], document: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], bool]:
    """The schema of an operation's arguments, where each parameter goes, and whether there is a key for repetitions."""
    properties: dict[str, Any] = {}
    needed, places, keyed = [], {}, False
    for name, each in parameters.items():
        place = each.get("in")
        if place == "header" and name.lower() == KEY:
            keyed = True
        if place not in ("path", "query", "header") or (place == "header" and name.lower() in (KEY, *RESERVED)):
            continue
        places[name] = place
        properties[name] = narrowed(each.get("schema", {}), document)
        if each.get("description"):
            properties[name]["description"] = " ".join(str(each["description"]).split())
        if each.get("required") or place == "path":
            needed.append(name)
    body = _followed(one.get("requestBody", {}), document)
    if "application/json" in body.get("content", {}):
        properties["body"] = narrowed(_json(body), document)
        needed += ["body"] * bool(body.get("required"))
    schema = {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}
    return schema, places, keyed


def _example(parameters: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that the file gives as examples; None if one that is needed has none."""
    found = {}
    for name in schema["properties"]:
        each = parameters.get(name, {})
        inner = each.get("schema", {})
        value = each.get("example", inner.get("example", inner.get("default")) if isinstance(inner, Mapping) else None)
        if value is not None:
            found[name] = value
    return found if found.keys() >= set(schema["required"]) else None


def _followed(value: Any, document: Mapping[str, Any]) -> Mapping[str, Any]:
    found = followed(str(value["$ref"]), document) if isinstance(value, Mapping) and "$ref" in value else value
    return found if isinstance(found, Mapping) else {}


def _json(body: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = body.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _call(api: Api, operation: Operation, **arguments: Any) -> Any:
    """The answer of an operation: JSON as it is, other text as text. Raises FailedError and RefusedError."""
    url, headers = _request(api, operation, arguments)
    body = json.dumps(arguments["body"]).encode() if "body" in arguments else None
    headers |= {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body is not None else {})
    if operation.keyed:
        key = headers["Idempotency-Key"] = api.unknown.setdefault((url, body), secrets.token_hex(16))
    answer = _sent(api, operation, url, headers, body)
    if operation.keyed and answer.status not in AGAIN and api.unknown.get((url, body)) == key:
        del api.unknown[url, body]
    text = _hidden(answer.text, api)
    if answer.status >= 400:
        raise FailedError(f"{answer.status} {http.client.responses.get(answer.status, '')}: {text[:SHOWN]}")
    if "json" not in answer.kind:
        if operation.answer:
            raise FailedError(f"the answer is {answer.kind or 'empty'} and no JSON: {text[:SHOWN]}")
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FailedError(f"the answer is no JSON: {error}") from None
    if wrong := problem(value, operation.answer, "the answer"):
        raise FailedError(wrong[:SHOWN])
    return value


def _sent(api: Api, operation: Operation, url: str, headers: Mapping[str, str], body: bytes | None) -> network.Answer:
    """The answer to a request, which is sent again while it fails, where that is safe. Raises FailedError and RefusedError."""
    again = operation.method in ("GET", "HEAD") or operation.keyed
    for left in reversed(range(api.tries if again else 1)):
        try:
            answer = network.request(
                operation.method, url, allowed=api.allowed, headers=headers, body=body, seconds=api.seconds
            )
            if not left or answer.status not in AGAIN:
                return answer
        except (OSError, http.client.HTTPException) as error:
            if not left:
                raise FailedError(_hidden(f"{type(error).__name__}: {error}", api)) from None
        time.sleep(PAUSE * 2 ** (api.tries - 1 - left))
    raise AssertionError("the last try returns or raises")


def _request(api: Api, operation: Operation, arguments: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The URL of a call, and its headers."""
    path, query, headers = operation.path, [], dict(api.headers)
    for name, place in operation.places.items():
        if name not in arguments or arguments[name] is None:
            continue
        values = [_text(one) for one in (arguments[name] if isinstance(arguments[name], list) else [arguments[name]])]
        if place == "query":
            query += [(name, value) for value in values]
        elif place == "header":
            headers[name] = ",".join(values)
        else:
            value = ",".join(values)
            if not value or {".", ".."} & set(re.split(r"[/\\]", value)):
                raise FailedError(f"{name} may not be {value!r}, which would be another path")
            path = path.replace(f"{{{name}}}", urllib.parse.quote(value, safe=""))
    return f"{api.base}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else ""), headers


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hidden(text: str, api: Api) -> str:
    """The text without the API's keys, in case the server repeats them."""
    for value in api.headers.values():
        for part in (value, value.rpartition(" ")[2]):
            text = text.replace(part, "[removed]") if len(part) > 5 else text
    return text
