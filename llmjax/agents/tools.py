"""Tools: Python functions with a JSON schema made of their signatures.

    from llmjax.agents import tool

    @tool(effect="read")
    def weather(city: str, day: Literal["today", "tomorrow"] = "today") -> str:
        '''The weather of a city.

        Args:
            city: its name in English.
        '''

The effect decides who must agree to a call: "read" runs freely, "write" asks unless writes are allowed, "ask" always asks.
Types are str, int, float, bool, None, Literal, Enum, lists, dicts with text keys, unions, dataclasses and TypedDicts.
The function gets values of these types. It may be asynchronous, and it may yield its results.
"""

import asyncio
import dataclasses
import enum
import functools
import importlib.util
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmjax.agents.schemas import problem
from llmjax.errors import UserError

EFFECTS = ("read", "write", "ask")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"}, type(None): {"type": "null"},
}  # fmt: skip


class FailedError(Exception):
    """A call without a usable result."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    schema: Mapping[str, Any]  # of the arguments: an object without further properties
    run: Callable[..., Any]
    effect: str = "ask"
    trusted: bool = False  # whether what it returns comes from the user, so that it cannot carry an attack
    origin: str = ""  # the server that its arguments go to; "": they stay on this machine
    example: Mapping[str, Any] | None = None  # arguments that it takes, for `probes`
    # Runs a call for so many seconds at most, after which nothing of it goes on: (the result as text, whether it failed). None: `run`
    # is called in a thread, which cannot be ended.
    within: Callable[[Mapping[str, Any], float], tuple[str, bool]] | None = None


DESCRIBED = ("name", "description", "schema", "effect", "trusted")  # what another process is told of a tool


def tool(*, effect: str, trusted: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function of a file of tools. See the module and `Tool`."""
    if effect not in EFFECTS:
        raise UserError(f"effect={effect!r} is not known: give one of {', '.join(EFFECTS)}")

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__tool__ = (effect, trusted)  # type: ignore[attr-defined]
        return function

    return mark


def from_function(function: Callable[..., Any], *, effect: str = "", trusted: bool = False) -> Tool:
    """The tool of a function; without `effect` that of its mark, or "ask".

    Raises UserError for a parameter without a type, or of one that JSON does not have.
    """
    name = function.__name__
    if not NAME.fullmatch(name):
        raise UserError(f"the tool {name!r} must have a name of letters, digits, _ and -, at most 64 of them")
    marked = getattr(function, "__tool__", ("ask", False))
    described, about = _described(inspect.getdoc(function) or "")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise UserError(f"a type of the tool {name!r} is not known: {error}") from error
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        where = f"the parameter {parameter.name!r} of the tool {name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(f"{where} must be a plain one with a name")
        if parameter.name not in hints:
            raise UserError(f"{where} has no type: write one, such as {parameter.name}: str")
        properties[parameter.name] = schema_of(hints[parameter.name], where)
        if parameter.name in about:
            properties[parameter.name]["description"] = about[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    run = functools.partial(_called, function, hints) if any(map(_is_made, hints.values())) else function
    return Tool(name, described, schema, run, effect or marked[0], trusted or marked[1])


def _called(function: Callable[..., Any], hints: Mapping[str, Any], **arguments: Any) -> Any:
    return function(**{name: _made(value, hints[name]) for name, value in arguments.items()})


def _is_made(hint: Any) -> bool:
    """Whether values of a type are not those of JSON: members of an Enum, and dataclasses, also within others."""
    if dataclasses.is_dataclass(hint) or (inspect.isclass(hint) and issubclass(hint, enum.Enum)):
        return True
    inner = typing.get_type_hints(hint).values() if typing.is_typeddict(hint) else typing.get_args(hint)
    return typing.get_origin(hint) is not typing.Literal and any(map(_is_made, inner))


def _made(value: Any, hint: Any) -> Any:
    """A value of JSON, which is of the type's schema, as a value of the type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _made(value, arguments[0])
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin in (typing.Union, types.UnionType):
        fits = (one for one in arguments if not problem(value, schema_of(one, "")))
        return _made(value, next(fits, Any))
    if origin in (list, Sequence):
        return [_made(one, arguments[0]) for one in value]
    if origin in (dict, Mapping):
        return {name: _made(one, arguments[1]) for name, one in value.items()}
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _made(one, hints[name]) for name, one in value.items()})
    return value


def outcome(tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """What a call returns, as text, and whether it failed, which is a result too, because the model may mend it."""
    try:
        return _text_of(_finished(tool.run(**arguments))), False
    except BaseException as error:  # sys.exit too
        return f"{type(error).__name__}: {error}", True


def _text_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that are no texts, or a value within itself
        return str(value)


def _finished(value: Any) -> Any:
    """What a function returned, when it is done: the result of a coroutine, and all that a generator yields."""
    if inspect.isawaitable(value) or inspect.isasyncgen(value):
        return asyncio.run(_awaited(value))
    return list(value) if isinstance(value, Iterator) else value


async def _awaited(value: Any) -> Any:
    return [one async for one in value] if inspect.isasyncgen(value) else await value


def load(path: Path) -> list[Tool]:
    """The tools of a Python file: its marked functions, or else all public functions that it defines.

    The file is run. Raises UserError for a file without tools.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} with tools")
    spec = importlib.util.spec_from_file_location(f"llmjax_tools_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no file of tools: give a Python file (.py), or an OpenAPI file (.yaml, .json)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where types of the file are looked up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{where} cannot be run: {type(error).__name__}: {error}") from error
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == spec.name]
    marked = [f for f in own if hasattr(f, "__tool__")] or [f for f in own if not f.__name__.startswith("_")]
    if not marked:
        raise UserError(f"{path} defines no function, so it has no tools")
    return [from_function(function) for function in marked]


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type. Raises UserError for one that JSON does not have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return schema_of(arguments[0], where)
    if hint in PLAIN:
        return dict(PLAIN[hint])
    values = [one.value for one in hint] if inspect.isclass(hint) and issubclass(hint, enum.Enum) else arguments
    if values is not arguments or origin is typing.Literal:
        if wrong := [one for one in values if type(one) not in PLAIN]:
            raise UserError(f"{where} may be {wrong[0]!r}, which JSON does not have: use texts and numbers")
        return {"enum": list(values)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(one, where) for one in arguments]}
    if hint is list or origin in (list, Sequence):
        return {"type": "array", **({"items": schema_of(arguments[0], where)} if arguments else {})}
    if origin in (dict, Mapping) and arguments[0] is str:
        return {"type": "object", "additionalProperties": schema_of(arguments[1], where)}
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        needed = (
            [f.name for f in dataclasses.fields(hint) if f.default is f.default_factory is dataclasses.MISSING]
            if dataclasses.is_dataclass(hint)
            else sorted(hint.__required_keys__, key=list(hints).index)
        )
        properties = {name: schema_of(one, where) for name, one in hints.items()}
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}
    raise UserError(
        f"{where} has the type {hint!r}, which JSON does not have: use one that llmjax/agents/tools.py lists"
    )


def listed(tools: Sequence[Tool]) -> str:
    """A line for each tool, as a model is shown them."""
    return "\n".join(
        f"- {one.name}: {one.description} Arguments: {json.dumps(one.schema['properties'])}" for one in tools
    )


def _described(doc: str) -> tuple[str, dict[str, str]]:
    """The text above "Args:" of a docstring, and what it says of each parameter."""
    head, _, rest = doc.partition("\nArgs:\n")
    about: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        match = re.match(r"    (\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if match and not line.startswith("      "):
            name, about[match[1]] = match[1], match[2].strip()
        elif name and line.strip():
            about[name] += f" {line.strip()}"
    return " ".join(head.split()), about
