"""Jinja templates whose output says, character by character, what the template wrote and what it was handed.

Every string that stands in a template is a `Written` (`written.py`). What a template is handed stays a mere string.
"""

import contextlib
import datetime
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llmjax.data.written import GENERATED, Written, by_template, flags_of, joined

_MOMENT: ContextVar[datetime.datetime | None] = ContextVar("moment", default=None)


@contextlib.contextmanager
def one_moment() -> Iterator[None]:
    """Within it every template reads the same time, so that texts which are compared differ by their messages alone."""
    before = _MOMENT.set(_MOMENT.get() or datetime.datetime.now())
    try:
        yield
    finally:
        _MOMENT.reset(before)


class Template:
    """A chat template in a sandbox, with the functions and filters that templates of Hugging Face expect."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters |= {"tojson": _to_json, "joined": lambda parts: joined(map(str, parts))}
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: (_MOMENT.get() or datetime.datetime.now()).strftime(form),
            "dict": _make_dict,
            "namespace": _Namespace,
        }
        literals = _Literals()
        tree = literals.visit(environment.parse(source))
        tree.set_environment(environment)
        self._literals = literals.names
        code = environment.compile(tree)
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    @property
    def literals(self) -> list[str]:
        """Every string that stands in the template."""
        return list(self._literals.values())

    def render(self, variables: Mapping[str, Any]) -> Written:
        """What the template writes. Raises what its expressions raise, jinja2.TemplateError among it."""
        return joined([self._template.render({**variables, **self._literals})])


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """The template of this source. Raises jinja2.TemplateSyntaxError."""
    return Template(source)


class _Environment(ImmutableSandboxedEnvironment):
    concat = staticmethod(joined)


class _Literals(NodeTransformer):
    """Puts a variable in the place of every string of a template; `names` says what each of them holds."""

    def __init__(self) -> None:
        self.names: dict[str, Written] = {}

    def _variable(self, text: str, line: int) -> nodes.Name:
        name = f"template_literal_{len(self.names)}"
        self.names[name] = by_template(text)
        return nodes.Name(name, "load", lineno=line)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        return self._variable(node.value, node.lineno) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return self._variable(node.data, node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Jinja joins what stands around `~` by a function of its own, which would forget the flags."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the model is to learn to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Any) -> Written:
        text = caller()
        return Written(text, bytes(flag | GENERATED for flag in flags_of(text)))


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without the names through which Python's own objects are reached."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace of a chat template cannot have {name!r}")


def _make_dict(*arguments: Any, **named: Any) -> dict[Any, Any]:
    return dict(*arguments, **named)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes it: Jinja's own filter would write "<" as "\\u003c"."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
