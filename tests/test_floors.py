"""The floors of the house: which room imports which, read from the source."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A room is a folder or a file of llmjax/; it imports from its own floor and from those below it.
# Rooms that are not built yet have their floor already.
FLOORS = (
    ("errors", "human", "progress", "storage", "verb", "version"),
    ("config", "startup"),
    ("data", "model", "objectives", "parallel"),
    ("prepare",),
    ("train", "infer", "interop"),
    ("post", "eval", "scaling"),
    ("serve", "retrieve", "persona", "agents", "apply", "synth"),
    ("recipe", "report", "sweep", "studio"),
    ("cli", "start", "__main__", "__init__"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """The name of a source file after "llmjax.": train.loop, or objectives for objectives/__init__.py."""
    parts = path.relative_to(ROOT / "llmjax").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "llmjax").rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[str]:
    """The dotted names that a piece of source imports, inside functions too, but not for types alone.

    The name of a function to be imported later, "llmjax.room.module:function", is an import too.
    """
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{name.name}" for name in node.names)
    elif isinstance(node, ast.Constant) and re.fullmatch(r"llmjax(\.\w+)+:\w+", str(node.value)):
        yield str(node.value).partition(":")[0]
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def modules_read(module: str) -> set[str]:
    """The modules of llmjax that a module imports."""
    found = set()
    for name in imported(ast.parse(MODULES[module].read_text())):
        first, *rest = name.split(".")
        if first == "llmjax":
            longest = (".".join(rest[:n]) for n in range(len(rest), 0, -1))
            found.add(next((known for known in longest if known in MODULES), "__init__"))
    return found - {module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports. It is read in a test, as every worker collects the tests."""
    return {module: modules_read(module) for module in MODULES}


@functools.cache
def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, reads in graph().items():
        found.setdefault(room_of(module), set()).update(map(room_of, reads))
    return {room: reads - {room} for room, reads in found.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of a circle of the graph, or []."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_a_floor() -> None:
    assert rooms().keys() <= FLOOR_OF.keys()


def test_a_room_imports_from_its_own_floor_and_below() -> None:
    assert [
        f"{module} imports {read}"
        for module, reads in graph().items()
        for read in reads
        if FLOOR_OF[room_of(read)] > FLOOR_OF[room_of(module)]
    ] == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    assert circle(rooms()) == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert circle(graph()) == []
