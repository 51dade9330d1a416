"""The description of the interface in OpenAPI 3.1, made of the routes and of the types of their bodies."""

from collections.abc import Mapping
from typing import Any

import msgspec

from llmjax.serve.calls import Handler
from llmjax.serve.messages import Body
from llmjax.version import __version__

NAMES = {"message": "string", "type": "string", "param": ["string", "null"], "code": "string"}
ERROR = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {
            "type": "object", "required": list(NAMES), "properties": {name: {"type": kind} for name, kind in NAMES.items()}
        }
    },
}  # fmt: skip


def document(posts: Mapping[str, tuple[Handler, type[Body]]], gets: Mapping[str, Handler]) -> dict[str, Any]:
    """The document of routes. The docstrings of their handlers describe them.

    Args:
        posts: path -> handler and type of the body.
        gets: path -> handler; `{name:path}` is a parameter.
    """
    bodies = [kind for _, kind in posts.values()]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for (path, (handler, _)), schema in zip(posts.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {**_operation(handler), "requestBody": body}}
    for path, handler in gets.items():
        name = path.partition("{")[2].partition(":")[0]
        named = {"in": "path", "name": name, "required": True, "schema": {"type": "string", "minLength": 1}}
        paths[path.replace(":path}", "}")] = {
            "get": {**_operation(handler), **({"parameters": [named]} if name else {})}
        }
    return {
        "openapi": "3.1.0", "info": {"title": "llmjax", "version": __version__}, "paths": paths,
        "components": {"schemas": {**components, "Error": ERROR}},
    }  # fmt: skip


def _operation(handler: Handler) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "operationId": handler.__name__, "summary": (handler.__doc__ or "").strip().partition("\n")[0],
        "responses": {
            "200": {"description": "The answer; with stream, events.", "content": {"*/*": {}}},
            "default": {"description": "An error.", "content": error},
        },
    }  # fmt: skip
