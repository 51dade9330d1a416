"""Tools of MCP servers, over stdio or streamable HTTP, by the official package (the extra `mcp`).

What a server says is a stranger's text: the names, descriptions and schemas of its tools, its hints about them, and its results.
So every tool asks before it runs, unless the user permits it by name. Descriptions are cut. Their hashes are kept, and a tool that
changes after it was first seen is refused (`pinned`). A server over stdio gets a scrubbed environment. One over HTTP must be on the
list of hosts, and the connection goes to the address that was checked.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax import storage
from llmjax.agents import network
from llmjax.agents.schemas import narrowed
from llmjax.agents.tools import FailedError, Tool
from llmjax.errors import UserError

TOOLS, DESCRIPTION, RESULT = (
    128,
    1000,
    100_000,
)  # the most tools of a server; characters of a description and of a result
SECONDS = 60.0  # of a call
MISSING = "tools of MCP servers need the package mcp: pip install 'llmjax[mcp]'"


@contextlib.contextmanager
def connected(
    name: str, server: Mapping[str, Any], *, allowed: Sequence[str] = (), folder: Path | None = None
) -> Iterator[list[Tool]]:
    """The tools of a server while it is connected, each called NAME__TOOL.

    Args:
        server: command, and maybe args and env (a server over stdio, which is started); or url, and maybe headers.
        allowed: the hosts that may be called.
        folder: where a server over stdio runs.

    Raises:
        UserError: if the package is missing, the entry is wrong, or the server cannot be reached or has too many tools.
    """
    try:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client
    except ImportError as error:
        raise UserError(MISSING) from error
    with contextlib.ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        try:
            transport = portal.call(functools.partial(_transport, name, server, allowed=allowed, folder=folder))
            client = stack.enter_context(
                portal.wrap_async_context_manager(Client(transport, read_timeout_seconds=SECONDS))
            )
            listed: list[Any] = []
            cursor = None
            while len(listed) <= TOOLS:
                page = portal.call(functools.partial(client.list_tools, cursor=cursor))
                listed += page.tools
                if (cursor := page.next_cursor) is None:
                    break
        except UserError:
            raise
        except Exception as error:  # of the process, the connection or the protocol, often in a group
            raise UserError(f"the MCP server {name!r} cannot be used: {_said(error)}") from error
        if len(listed) > TOOLS:
            raise UserError(f"the MCP server {name!r} has more than {TOOLS} tools")
        origin = f"mcp {server.get('url', name)}"
        tools = [
            Tool(
                _name(name, one.name), " ".join((one.description or one.title or one.name).split())[:DESCRIPTION],
                _schema(one.input_schema), functools.partial(_call, portal, client, one.name), origin=origin,
            )
            for one in listed
        ]  # fmt: skip
        if len({tool.name for tool in tools}) < len(tools):
            raise UserError(f"the MCP server {name!r} has two tools of one name")
        yield tools


def pinned(tools: Sequence[Tool], path: Path) -> None:
    """Keep the hashes of tools in a file, and compare those that are in it.

    Raises UserError for a tool whose description or schema is not what it was, which the user must look at.
    """
    known: dict[str, str] = storage.read_json(path, mend=f"delete {path}") if path.is_file() else {}
    found = {
        tool.name: hashlib.sha256(json.dumps([tool.description, tool.schema], sort_keys=True).encode()).hexdigest()
        for tool in tools
    }
    if changed := sorted(name for name in found if known.get(name, found[name]) != found[name]):
        raise UserError(
            f"the description or the schema of the tool {changed[0]!r} is not what it was when it was first used: look at it, "
            f"and delete {path} if you trust it"
        )
    if found.keys() - known.keys():
        storage.write_json(path, known | found)


async def _transport(name: str, server: Mapping[str, Any], *, allowed: Sequence[str], folder: Path | None) -> Any:
    from mcp import StdioServerParameters

    if isinstance(server.get("command"), str):
        arguments, environment = [str(one) for one in server.get("args", ())], dict(server.get("env") or {})
        return StdioServerParameters(command=server["command"], args=arguments, env=environment, cwd=folder)
    if not isinstance(server.get("url"), str):
        raise UserError(f"the MCP server {name!r} needs a command or a url")
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    try:
        network.place_of(server["url"], allowed)
    except network.RefusedError as error:
        raise UserError(f"the MCP server {name!r} may not be called: {error}") from error
    headers = {str(key): str(value) for key, value in (server.get("headers") or {}).items()}
    client = httpx2.AsyncClient(
        headers=headers, timeout=httpx2.Timeout(30.0, read=300.0), transport=_checked(allowed), trust_env=False
    )
    return streamable_http_client(server["url"], http_client=client)


def _checked(allowed: Sequence[str]) -> Any:
    """A transport of httpx2 that sends only to hosts of the list, at the address that was checked."""
    import anyio.to_thread
    import httpx2

    class Checked(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: Any) -> Any:
            place = await anyio.to_thread.run_sync(network.place_of, str(request.url), allowed)
            request.extensions = {**request.extensions, "sni_hostname": place.host}
            request.url = request.url.copy_with(host=place.addresses[0])  # the header Host has the name already
            return await super().handle_async_request(request)

    return Checked(trust_env=False)


def _name(server: str, tool: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", f"{server}__{tool}")[:64]


def _schema(given: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: always an object, and without properties only an empty one."""
    found = narrowed(given)
    properties = found.get("properties", {})
    return {
        "type": "object",
        "properties": properties,
        "required": found.get("required", []),
        "additionalProperties": found.get("additionalProperties", False) if properties else False,
    }


def _call(portal: Any, client: Any, tool: str, **arguments: Any) -> str:
    """The text of a result. Raises FailedError for one that the server calls an error."""
    result = portal.call(functools.partial(client.call_tool, tool, arguments))
    parts = [one.text if one.type == "text" else f"[{one.type}]" for one in result.content]
    text = "\n".join(parts) if parts else json.dumps(result.structured_content)
    if result.is_error:
        raise FailedError(text[:RESULT])
    return text[:RESULT]


def _said(error: BaseException) -> str:
    """The message of an error, of a group that of its first part."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
