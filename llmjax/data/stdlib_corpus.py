"""The default corpus: the standard library of the running Python, so nothing is downloaded.

Its documents are every .py source of the library, every topic of `pydoc_data`, and for every built-in or extension
module a stub with the signatures and docstrings of its compiled code. Docstrings of modules written in Python are not
documents of their own, since the sources hold them.

Python's regression tests are a separate corpus ("stdlib-tests"). They are repetitive and larger than the library, and
many distributions leave them out, so the default would not be the same text everywhere. A test's group is that of the
module it tests, so both are held out together.
"""

import importlib
import importlib.machinery
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ClassMethodDescriptorType, ModuleType
from typing import Any

# Importing readline may write an escape sequence to the terminal; the others talk to the desktop or the network.
NOT_IMPORTED = frozenset({"readline", "_scproxy"})
TOPICS = "pydoc_data/topics.py"  # read topic by topic, not as a source


@dataclass(frozen=True)
class Entry:
    """A document of the corpus: a file to read, or the text itself where there is no file."""

    path: str  # relative, the same on every machine
    group: str
    file: Path | None = None
    text: str = ""


TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def entries() -> Iterator[Entry]:
    """All documents of the library in an order that depends on names only; parts not installed are left out."""
    for path, file in source_files():
        if path != TOPICS and not _is_test(path):
            yield Entry(path, group_of(path), file=file)
    yield from _topics()
    yield from _compiled_modules()


def test_entries() -> Iterator[Entry]:
    """The sources of the regression tests, nothing where they are not installed."""
    for path, file in source_files():
        if _is_test(path):
            yield Entry(path, group_of(path), file=file)


def _is_test(path: str) -> bool:
    return not TEST_FOLDERS.isdisjoint(path.split("/")[:-1])


def source_files() -> list[tuple[str, Path]]:
    """(relative path, file) of every .py file, sorted by the relative path.

    Only modules that Python itself names as its own are taken, so what a distribution or a build adds to the folder
    (site-packages, dist-packages, sitecustomize, _sysconfigdata with its install paths) stays out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sys.stdlib_module_names | {"test"}
    found = []
    for top in sorted(p for p in root.iterdir() if p.name.removesuffix(".py") in names):
        files = top.rglob("*.py") if top.is_dir() else [top]
        found += [
            (file.relative_to(root).as_posix(), file) for file in files if file.suffix == ".py" and file.is_file()
        ]
    return sorted(found)


def group_of(path: str) -> str:
    """The group of a source file: its top-level module, and for a test the module that it tests.

    json/decoder.py, json/tests/x.py, test/test_json/x.py, test/test_json_y.py and _json.py are all "json". What tests
    no module (test/support) is "test".
    """
    parts = path.removesuffix(".py").split("/")
    if parts[0] != "test":
        return _public(parts[0])
    for part in parts[1:]:
        match = re.fullmatch(r"_?test_+(.+)|(.+?)_tests?|(.+)tester", part)
        if match:
            return _public(match[match.lastindex or 0])
    return "test"


def _public(name: str) -> str:
    """The module that users know: _pyio -> io, _json -> json, xml_etree -> xml; other names stay as they are."""
    known = sys.stdlib_module_names
    name = name.strip("_")
    if name.startswith("py") and f"_{name}" in known and name.removeprefix("py") in known:
        return name.removeprefix("py")
    words = name.split("_")
    prefixes = ["_".join(words[:n]) for n in range(len(words), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in known), name)


def _topics() -> Iterator[Entry]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some distributions package it apart
        return
    for name, text in sorted(topics.items()):
        yield Entry(f"{TOPICS}#{name}", f"topic {name}", text=text)


def _compiled_modules() -> Iterator[Entry]:
    for name in sorted(sys.stdlib_module_names - NOT_IMPORTED):
        if not _is_compiled(name):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some modules announce their removal
                module = importlib.import_module(name)
        except ImportError:  # built, but a shared library that it needs is not installed (tkinter)
            continue
        if text := stub(module):
            yield Entry(f"docstrings/{name}.py", _public(name), text=text)


def _is_compiled(name: str) -> bool:
    if name in sys.builtin_module_names:
        return True
    spec = importlib.machinery.PathFinder.find_spec(name)
    return spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


def stub(module: ModuleType) -> str:
    """A compiled module's functions and classes as Python text: signatures and docstrings; "" if it has none."""
    blocks = [_docstring(module, "")] if _doc(module) else []
    for name, member in sorted(vars(module).items()):
        own = module.__name__ == "builtins" or getattr(member, "__module__", "") != "builtins"
        if name.startswith("_") or not _doc(member) or not own:
            continue
        if inspect.isclass(member) and member.__name__ == name:
            blocks.append(_class_stub(member))
        elif inspect.isbuiltin(member):
            blocks.append(_function_stub(name, member, ""))
    return "\n\n".join(blocks) + "\n" if blocks else ""


def _class_stub(cls: type) -> str:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    blocks = [f"class {cls.__name__}({bases}):" if bases else f"class {cls.__name__}:"]
    blocks[0] += "\n" + _docstring(cls, "    ")
    for name, wrapped in sorted(vars(cls).items()):
        member = getattr(wrapped, "__func__", wrapped)
        if name.startswith("_") or not _doc(member):
            continue
        if inspect.isgetsetdescriptor(member) or inspect.ismemberdescriptor(member):
            blocks.append(f"    @property\n    def {name}(self):\n{_docstring(member, ' ' * 8)}")
        elif callable(member):
            kinds = {staticmethod: "    @staticmethod\n", ClassMethodDescriptorType: "    @classmethod\n"}
            blocks.append(kinds.get(type(wrapped), "") + _function_stub(name, member, "    "))
    return "\n\n".join(blocks)


def _function_stub(name: str, function: Any, indent: str) -> str:
    return f"{indent}def {name}{_signature(name, function)}:\n{_docstring(function, indent + '    ')}"


def _signature(name: str, function: Any) -> str:
    """The signature that the compiled code states, else the one that opens its docstring, else (*args, **kwargs)."""
    # inspect.signature would evaluate the defaults, and with them bring in values of this machine.
    stated = getattr(function, "__text_signature__", None) or ""
    candidates = [
        re.sub(r"^\(\$module(, /(?=,|\)))?(, )?", "(", stated).replace("$type", "cls").replace("$self", "self")
    ]
    opening = re.match(r"(?:\w+\.)*(\w+)(\([^()]*\))", _doc(function))
    if opening and opening[1] == name:
        candidates.append(opening[2])
    return next((candidate for candidate in candidates if candidate and _parses(candidate)), "(*args, **kwargs)")


def _parses(signature: str) -> bool:
    try:  # some state defaults such as <unrepresentable>, or optional arguments in brackets
        compile(f"def f{signature}: pass", "signature", "exec")
    except SyntaxError:
        return False
    return True


def _docstring(member: Any, indent: str) -> str:
    text = _doc(member).replace('"""', "'''").strip()
    quote = 'r"""' if "\\" in text else '"""'
    if text.endswith(('"', "\\")):
        text += " "
    return "\n".join(f"{indent}{line}" if line else "" for line in f'{quote}{text}"""'.split("\n"))


def _doc(member: Any) -> str:
    # inspect.getdoc would also give what is inherited, which the base class's stub already shows.
    text = getattr(member, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""
