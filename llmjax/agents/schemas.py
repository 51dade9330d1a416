"""The subset of JSON Schema that describes the arguments of tools: one check, and the way from any schema to the subset.

The subset has type, enum, anyOf, items, properties, required, additionalProperties and description. Both the grammar of calls and
the check before a call read it, so they agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmjax.errors import UserError

DEPTH, NODES = 24, 5000  # of a schema; what lies deeper may be any value, and a larger one is refused
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}  # names of Python, as BFCL writes them
KINDS: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict,
}  # fmt: skip


def problem(value: Any, schema: Mapping[str, Any], where: str = "arguments") -> str:
    """Why a value is not of a schema of the subset; "" if it is."""
    if "anyOf" in schema:
        found = [problem(value, one, where) for one in schema["anyOf"]]
        return "" if "" in found else found[0]
    if "enum" in schema:
        return (
            ""
            if any(_same(value, one) for one in schema["enum"])
            else f"{where} is {value!r}, which is none of {schema['enum']}"
        )
    kind = schema.get("type")
    if kind is None:
        return ""
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()  # 50.0 is an integer of JSON Schema
    if not (isinstance(value, KINDS[kind]) or whole) or (isinstance(value, bool) and kind != "boolean"):
        return f"{where} is {value!r}, which is no {kind}"
    if kind == "array" and "items" in schema:
        return next((p for i, one in enumerate(value) if (p := problem(one, schema["items"], f"{where}[{i}]"))), "")
    if kind == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            return f"{where} lacks {missing[0]!r}"
        for name, one in value.items():
            if name not in known and more is False:
                return f"{where} has {name!r}, which is none of {sorted(known)}"
            inner = known.get(name, more)
            if isinstance(inner, Mapping) and (found_one := problem(one, inner, f"{where}.{name}")):
                return found_one
    return ""


def settled(value: Any, schema: Mapping[str, Any]) -> Any:
    """A value without a `problem`, of the types that a function expects: 50.0 is 50 where the schema wants an integer."""
    if "anyOf" in schema:
        return settled(value, next(one for one in schema["anyOf"] if not problem(value, one)))
    if "enum" in schema:
        return next(one for one in schema["enum"] if _same(value, one))
    kind = schema.get("type")
    if kind == "integer":
        return int(value)
    if kind == "array" and "items" in schema:
        return [settled(one, schema["items"]) for one in value]
    if kind == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        inner = {name: known.get(name, more) for name in value}
        return {
            name: settled(one, inner[name]) if isinstance(inner[name], Mapping) else one for name, one in value.items()
        }
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal in JSON, where 1.0 is 1 and true is not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def narrowed(schema: Any, root: Mapping[str, Any] | None = None, *, closed: bool = True) -> dict[str, Any]:
    """The schema in the subset, for any JSON Schema, also of OpenAPI 3.0.

    References within `root` (default: the schema) are followed. Where a schema contains itself, any value is allowed. Limits such as
    pattern and maximum are left to whoever gets the value.

    Args:
        closed: whether an object with properties allows no others where it does not say so.

    Raises:
        UserError: for a reference that leads out of `root`, or nowhere, and for a schema that is too large.
    """
    return _Narrowing(schema if root is None else root, closed).of(schema, ())


@dataclass
class _Narrowing:
    """See `narrowed`. `seen` has a part for each level: the reference that was followed there, or ""."""

    root: Any
    closed: bool
    nodes: int = 0

    def of(self, schema: Any, seen: tuple[str, ...]) -> dict[str, Any]:
        self.nodes += 1
        if self.nodes > NODES:
            raise UserError(f"a schema has more than {NODES:,} parts: make it smaller, or leave its tool out")
        if not isinstance(schema, Mapping) or len(seen) > DEPTH:
            return {}
        if "$ref" in schema:
            name = str(schema["$ref"])
            return {} if name in seen else self.of(followed(name, self.root), (*seen, name))
        seen = (*seen, "")
        described = {"description": " ".join(str(schema["description"]).split())} if schema.get("description") else {}
        if schema.get("allOf"):
            return described | _merged([self.of(one, seen) for one in [*schema["allOf"], _without(schema, "allOf")]])
        ways = schema.get("anyOf") or schema.get("oneOf")
        kind = schema.get("type")
        if isinstance(kind, list):
            ways = [{**schema, "type": one} for one in kind]
        if schema.get("nullable") is True:
            ways = [*(ways or [_without(schema, "nullable")]), {"type": "null"}]
        if ways:
            found = [_without(self.of(one, seen), "description") for one in ways]
            return described | ({} if {} in found else {"anyOf": found})
        enum = schema.get("enum")
        if kind == "array" and isinstance(enum, list) and not any(isinstance(one, list) for one in enum):
            # A common slip: the values of the items stand beside them.
            return described | {"type": "array", "items": {"enum": list(enum)}}
        if "const" in schema or isinstance(enum, list):
            return described | {"enum": [schema["const"]] if "const" in schema else list(schema["enum"])}
        kind = TYPES.get(str(kind), kind)
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else None
        if kind not in KINDS:
            return described
        made: dict[str, Any] = {"type": kind}
        if kind == "array" and schema.get("items") and (items := self.of(schema["items"], seen)):
            made["items"] = items
        if kind == "object":
            made |= self._properties(schema, seen)
        return described | made

    def _properties(self, schema: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
        given = schema.get("properties")
        properties = {str(name): self.of(one, seen) for name, one in (given or {}).items() if one is not False}
        more = schema.get("additionalProperties", given is None or not self.closed)
        kept = self.of(more, seen) if isinstance(more, Mapping) else bool(more)
        needed = [name for name in schema.get("required") or () if name in properties]
        return {"properties": properties, "required": needed, "additionalProperties": kept}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Objects as one object. Of other schemas the last that says something counts."""
    made: dict[str, Any] = {}
    for part in parts:
        if part.get("type") == made.get("type") == "object":
            part = part | {
                "properties": {**made.get("properties", {}), **part.get("properties", {})},
                "required": list(dict.fromkeys([*made.get("required", ()), *part.get("required", ())])),
            }
        made |= {key: value for key, value in part.items() if key != "description" or "description" not in made}
    return made


def followed(name: str, root: Any) -> Any:
    """What a reference such as #/components/schemas/Pet names. Raises UserError if that is not in the file."""
    found = root
    if not name.startswith("#/"):
        raise UserError(f"$ref {name!r} leads out of the file: put what it names into the file, as #/...")
    for part in name[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or part not in found:
            raise UserError(f"$ref {name!r} leads nowhere in the file")
        found = found[part]
    return found


def _without(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}


def undescribed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without descriptions, which constrain nothing."""
    kept = {key: value for key, value in schema.items() if key != "description"}
    if "properties" in kept:
        kept["properties"] = {name: undescribed(one) for name, one in kept["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), Mapping):
            kept[key] = undescribed(kept[key])
    if "anyOf" in kept:
        kept["anyOf"] = [undescribed(one) for one in kept["anyOf"]]
    return kept
