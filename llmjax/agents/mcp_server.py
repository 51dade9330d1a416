"""Tools of ours for other programs, as an MCP server over stdio or streamable HTTP, by the official package (the extra `mcp`).

Only tools that read are offered, and those that write where the user allows it. Calls are checked against the schema here again. Over
HTTP the server listens on this machine alone, and checks the headers Host and Origin.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax.agents.mcp_client import MISSING
from llmjax.agents.react import Call, run_tool
from llmjax.agents.schemas import problem, settled
from llmjax.agents.tools import Tool
from llmjax.errors import UserError
from llmjax.version import __version__

SECONDS = 120.0  # of a call
HOST = "127.0.0.1"


def offered(tools: Sequence[Tool], *, writes: bool = False) -> list[Tool]:
    """The tools that run without a question: there is no user to ask. Raises UserError if there are none."""
    found = [tool for tool in tools if tool.effect == "read" or (writes and tool.effect == "write")]
    if not found:
        raise UserError(
            "no tool may be offered: mark those that only read with @tool(effect='read'), or give --permit NAME=read"
        )
    return found


def make_server(tools: Sequence[Tool]) -> Any:
    """The server of tools. Raises UserError if the package is missing."""
    try:
        import anyio.to_thread
        import mcp_types as types
        from mcp.server import Server
    except ImportError as error:
        raise UserError(MISSING) from error
    known = {tool.name: tool for tool in tools}
    listed = [
        types.Tool(
            name=tool.name, description=tool.description, input_schema=dict(tool.schema),
            annotations=types.ToolAnnotations(read_only_hint=tool.effect == "read"),
        )
        for tool in tools
    ]  # fmt: skip

    async def list_tools(context: Any, params: Any) -> Any:
        return types.ListToolsResult(tools=listed)

    async def call_tool(context: Any, params: Any) -> Any:
        tool, arguments = known.get(params.name), params.arguments or {}
        wrong = f"there is no tool {params.name!r}" if tool is None else problem(arguments, tool.schema)
        if wrong or tool is None:
            return types.CallToolResult(content=[types.TextContent(text=wrong)], is_error=True)
        call = Call(tool.name, settled(arguments, tool.schema))
        text, failed = await anyio.to_thread.run_sync(run_tool, tool, call, SECONDS)
        return types.CallToolResult(content=[types.TextContent(text=text)], is_error=failed)

    return Server("llmjax", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)


def serve_stdio(server: Any) -> None:
    """Serve until the client closes the input."""
    import anyio
    from mcp.server.stdio import stdio_server

    async def serve() -> None:
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())
            sys.stdout.flush()  # what tools printed goes to stderr, as long as the output is the protocol's

    anyio.run(serve)


def serve_http(server: Any, port: int) -> None:
    """Serve at http://127.0.0.1:PORT/mcp until Ctrl-C; port 0 is a free one, which is printed."""
    import socket

    import uvicorn

    listening = socket.create_server((HOST, port))
    with listening:
        print(f"serving MCP at http://{HOST}:{listening.getsockname()[1]}/mcp", flush=True)
        config = uvicorn.Config(server.streamable_http_app(host=HOST), log_level="warning")
        uvicorn.Server(config).run(sockets=[listening])


def text_tool(name: str, description: str, parameter: str, about: str, run: Any) -> Tool:
    """A tool that reads, with one parameter of text."""
    properties = {parameter: {"type": "string", "description": about}}
    schema = {"type": "object", "properties": properties, "required": [parameter], "additionalProperties": False}
    return Tool(name, description, schema, run, "read")


def model_tool(engine: Any, *, max_new_tokens: int) -> Tool:
    """A tool that answers a message with a model. Calls wait for each other: one thread owns an engine."""
    import threading

    from llmjax.infer import asking

    busy = threading.Lock()

    def write(message: str) -> str:
        def conversation() -> asking.Conversation[str]:
            return (
                yield asking.Ask("answer", ([{"role": "user", "content": message}],), max_new_tokens=max_new_tokens)
            )

        with busy:
            (one,) = asking.run(engine, [(None, conversation)])
        if one.result is None:
            raise UserError(one.error)
        return one.result

    return text_tool("ask_model", "The answer of the language model of this server.", "message", "what to ask", write)


def documents_tool(folder: Path) -> Tool:
    """A tool that searches the index of documents in a folder. Each call opens it, because calls run in threads of their own."""
    from llmjax.retrieve.documents import ask
    from llmjax.retrieve.documents.index import Index

    def search(question: str) -> list[dict[str, Any]]:
        with Index(folder) as index:
            found = ask.search(index, question)
        return [{name: getattr(one, name) for name in ("path", "start", "end", "heading", "text")} for one in found]

    about = "The passages of the documents that fit a question best, with their places."
    return text_tool("search_documents", about, "question", "words to search for", search)
