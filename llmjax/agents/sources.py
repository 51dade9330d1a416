"""Where tools come from: a Python file, an OpenAPI file, or a file of MCP servers; and what the user permits of them.

tools.py                          functions, see `tools`
api.yaml, api.json@https://HOST   an OpenAPI document, with another base URL behind @
servers.json                      {"mcpServers": {"NAME": {"command": ..., "args": [...]}, "OTHER": {"url": ...}}}
"""

import contextlib
import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmjax.agents import mcp_client, network, openapi, processes
from llmjax.agents.tools import EFFECTS, Tool
from llmjax.errors import UserError

DENY = "deny"


@contextlib.contextmanager
def opened(
    given: Sequence[str], *, allowed: Sequence[str] = (), headers: Mapping[str, str] | None = None,
    permits: Sequence[str] = (), pins: Path | None = None,
) -> Iterator[list[Tool]]:  # fmt: skip
    """The tools of sources, for as long as their servers are connected.

    Args:
        allowed: the hosts that may be called, HOST or HOST:PORT.
        headers: of requests to APIs.
        permits: PATTERN=EFFECT, see `permitted`.
        pins: the file with the hashes of tools of MCP servers.

    Raises:
        UserError: for a source that cannot be used, and for two tools of one name.
    """
    network.check_list(allowed)
    found: list[Tool] = []
    with contextlib.ExitStack() as stack:
        for one in given:
            path, _, base = one.partition("@") if "@http" in one else (one, "", "")
            if Path(path).suffix not in (".json", ".yaml", ".yml"):
                file = processes.File(Path(path))
                stack.callback(file.close)
                found += file.tools()
                continue
            document = openapi.read(Path(path))
            if "mcpServers" not in document:
                found += openapi.tools_of(document, base=base, allowed=allowed, headers=headers)
                continue
            servers = document["mcpServers"]
            if not isinstance(servers, dict) or not all(isinstance(one, dict) for one in servers.values()):
                raise UserError(
                    f"{path}: mcpServers must be an object with an object for each server, see docs/agents.md"
                )
            for name, server in servers.items():
                connected = mcp_client.connected(name, server, allowed=allowed)
                own = stack.enter_context(connected)
                if pins is not None:
                    mcp_client.pinned(own, pins)
                found += own
        names = [tool.name for tool in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two tools are called {twice[0]!r}: rename one")
        yield permitted(found, permits)


def permitted(given: Sequence[Tool], permits: Sequence[str]) -> list[Tool]:
    """The tools with the effects that the user gives them, as NAME=EFFECT or with * in the name; "deny" takes a tool away.

    The last entry that fits a tool counts. Raises UserError for an entry that fits none.
    """
    found = {tool.name: tool for tool in given}
    for entry in permits:
        pattern, _, effect = entry.partition("=")
        names = [tool.name for tool in given if fnmatch.fnmatchcase(tool.name, pattern)]
        if effect not in (*EFFECTS, DENY):
            raise UserError(f"--permit {entry}: give NAME=EFFECT with one of {', '.join((*EFFECTS, DENY))}")
        if not names:
            raise UserError(
                f"--permit {entry} fits no tool: there are {', '.join(sorted(tool.name for tool in given))}"
            )
        for name in names:
            found[name] = dataclasses.replace(found[name], effect=effect)
    return [tool for tool in found.values() if tool.effect != DENY]


def headers_of(given: Sequence[str]) -> dict[str, str]:
    """Headers as the command gives them, NAME=VARIABLE: the value is that of the environment variable.

    Raises UserError for a variable that is not set.
    """
    found = {}
    for one in given:
        name, _, variable = one.partition("=")
        if not name or not os.environ.get(variable):
            raise UserError(
                f"--header {one}: give NAME=VARIABLE, such as Authorization=API_TOKEN, and set the variable"
            )
        found[name] = os.environ[variable]
    return found
