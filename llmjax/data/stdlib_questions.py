"""Questions about the functions of the standard library, with answers: conversations, preferences and prompts, offline.

The sources "stdlib-answers", "stdlib-pairs", "stdlib-prompts" and "stdlib-test" of `data.sources` are made here, the same
on every machine with the same Python. The last one has the functions that are held out, one in ten: they share no name and
no docstring with the others. There are four kinds of questions:

    call     Call `def seek(offset, whence=0)` with whence=2 and offset=7.      seek(7, whence=2)
    default  What is the default of `whence` in `seek(offset, whence)`?         0
    module   Which module has `def proxy_bypass(host)`?                         urllib
    does     What does `def proxy_bypass(host)` do?                             Return True, if host should be bypassed.

A call gives required parameters by position and the others by keyword, both in the order of the signature. As the people
do who write examples, only some answers keep to that: others name every parameter, or give the values in the order in
which they were told, which may be wrong. Preferences and rewards prefer the first form. Half of the calls to learn from
have a name put together of two others, so that names are copied and not remembered. Prompts have `check`, a program
that ends well when the variable `answer` is right enough: a call with these arguments, the name of a module, a value.
"""

import ast
import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llmjax.data import stdlib_corpus

HELD_OUT = 10  # one function in so many
MOST_PARAMETERS, LONGEST = 4, 60  # parameters and characters of a signature
LONGEST_SENTENCE, LONGEST_DEFAULT = 72, 12  # characters
CALLS = 6  # questions about each function whose call is asked for
STRINGS = ("a", "b", "x", "key", "data", "name", "text", "line")
CLASSES = frozenset({"self", "cls", "mcs", "mcls", "metacls"})  # first parameters that a caller does not give


@dataclass(frozen=True)
class Parameter:
    """A parameter; `default` is its source, None: required."""

    name: str
    default: str | None
    keyword_only: bool


@dataclass(frozen=True)
class Function:
    """A function of the library. `module` is "" where several modules have the name, `sentence` without a docstring."""

    name: str
    parameters: tuple[Parameter, ...]
    module: str
    sentence: str  # the first one of its docstring
    docstring: str  # all of it, in lower case, with single spaces

    @property
    def signature(self) -> str:
        """The source of its parameters with their defaults, in brackets."""
        parts, starred = [], False
        for p in self.parameters:
            if p.keyword_only and not starred:
                parts.append("*")
                starred = True
            parts.append(p.name if p.default is None else f"{p.name}={p.default}")
        return f"{self.name}({', '.join(parts)})"

    @property
    def held_out(self) -> bool:
        return _number(self.name) % HELD_OUT == 0


@cache
def functions() -> tuple[Function, ...]:
    """One function for each name and each docstring, in an order that depends on names alone."""
    found: dict[str, tuple[ast.FunctionDef, str]] = {}
    modules: dict[str, set[str]] = {}
    for entry in stdlib_corpus.entries():
        if not entry.path.partition("#")[0].endswith(".py") or "#" in entry.path:
            continue
        text = entry.text or (entry.file.read_text(encoding="utf-8", errors="replace") if entry.file else "")
        for node in _definitions(text):
            modules.setdefault(node.name, set()).add(entry.group)
            found.setdefault(_plain(node.name), (node, entry.group))
    made, docstrings = [], set[str]()
    for node, group in found.values():
        function = _function(node, group if len(modules[node.name]) == 1 else "")
        if function is None or function.docstring in docstrings:
            continue
        docstrings |= {function.docstring} - {""}
        made.append(function)
    return tuple(sorted(made, key=lambda one: _number(f"order {one.name}")))


def _definitions(text: str) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # lib2to3 keeps sources of Python 2
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name.isascii():
            yield node


def _function(node: ast.FunctionDef, module: str) -> Function | None:
    """The function of a definition; None where its calls are not plain."""
    given = node.args
    if given.vararg or given.kwarg or (given.posonlyargs and given.defaults):
        return None
    ordinary = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordinary) - len(given.defaults)) + [ast.unparse(value) for value in given.defaults]
    named = [Parameter(one.arg, default, False) for one, default in zip(ordinary, defaults, strict=True)]
    named += [
        Parameter(one.arg, None if value is None else ast.unparse(value), True)
        for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if named and named[0].name in CLASSES:
        named = named[1:]
    docstring = ast.get_docstring(node) or ""
    made = Function(
        node.name, tuple(named), module, _sentence(docstring), re.sub(r"\s+", " ", docstring).strip().lower()
    )
    plain = all(p.name.isascii() and not p.name.startswith("_") for p in named)
    short = 1 <= len(named) <= MOST_PARAMETERS and len(made.signature) <= LONGEST
    return made if plain and short and made.signature.isascii() else None


def _sentence(docstring: str) -> str:
    """The first sentence of a docstring, if it is a short one of words."""
    first = re.split(r"\n\s*\n|(?<=[.!?])\s", docstring.strip())[0]
    text = " ".join(first.split())
    fits = 8 <= len(text) <= LONGEST_SENTENCE and text.isascii() and text[0].isupper() and "->" not in text
    return text if fits else ""


# The sources.


def answers() -> Iterator[dict[str, Any]]:
    """Conversations to learn from, about the functions that are not held out."""
    for function in functions():
        if function.held_out:
            continue
        kinds = ["call"] * CALLS + ["default", "module", "does"]
        for number, kind in enumerate(kinds):
            asked = _ask(_renamed(function, number) if kind == "call" else function, kind, number)
            if asked:
                yield {"messages": [_said("user", asked["question"]), _said("assistant", asked["written"])]}


def pairs() -> Iterator[dict[str, Any]]:
    """Preferences between two forms of the same call."""
    for function in functions():
        asked = None if function.held_out else _ask(_renamed(function, CALLS), "call", CALLS)
        if asked and (others := [one for one in (asked["named"], asked["told"]) if one != asked["answer"]]):
            rejected = others[_number(f"rejected {function.name}") % len(others)]
            yield {
                "prompt": [_said("user", asked["question"])],
                "chosen": [_said("assistant", asked["answer"])],
                "rejected": [_said("assistant", rejected)],
            }


def prompts() -> Iterator[dict[str, Any]]:
    """Prompts with what rewards read, one about each function that is not held out."""
    return (_prompt(function) for function in functions() if not function.held_out and _kind(function))


def test() -> Iterator[dict[str, Any]]:
    """Prompts of the same kinds about the functions that are held out."""
    return (_prompt(function) for function in functions() if function.held_out and _kind(function))


def _kind(function: Function) -> str:
    """The kind of the function's only prompt, so chosen that about half of all prompts are calls; "": there is none."""
    turn = _number(f"kind {function.name}") % 4
    if len(function.parameters) > 1:
        kinds = ("default" if turn == 0 else "", "call")
    else:
        kinds = ("default", "module" if turn == 0 else "")
    return next((kind for kind in kinds if kind and _ask(function, kind, CALLS + 1)), "")


def _prompt(function: Function) -> dict[str, Any]:
    kind = _kind(function)
    function = _renamed(function, CALLS + 1) if kind == "call" and not function.held_out else function
    asked = _ask(function, kind, CALLS + 1)
    assert asked is not None
    kept = {name: asked[name] for name in ("answer", "check")}
    return {"prompt": [_said("user", asked["question"])], "kind": kind, "function": function.name, **kept}


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _renamed(function: Function, number: int) -> Function:
    """Half of the calls to learn from are of a name put together of two others, so that names are copied, not remembered."""
    rng = random.Random(_number(f"name {number} {function.name}"))
    names, known = _names()
    made = f"{rng.choice(names).split('_')[0]}_{rng.choice(names).split('_')[-1]}"
    return function if rng.random() < 0.5 or _plain(made) in known else replace(function, name=made)


@cache
def _names() -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of the functions that are not held out; all names, without what two spellings differ by."""
    every = functions()
    return tuple(one.name for one in every if not one.held_out), frozenset(_plain(one.name) for one in every)


# The kinds of questions.


def _ask(function: Function, kind: str, number: int) -> dict[str, str] | None:
    """Question `number` of a kind: question, answer, written (the answer as an example has it), check; None: there is none."""
    return _KINDS[kind](function, random.Random(_number(f"{kind} {number} {function.name}")))


def _call(function: Function, rng: random.Random) -> dict[str, str] | None:
    required = [p for p in function.parameters if p.default is None]
    optional = [p for p in function.parameters if p.default is not None]
    if len(function.parameters) < 2:
        return None
    chosen = {p.name for p in (*required, *rng.sample(optional, rng.randint(not required, len(optional))))}
    values = {p.name: _value(rng) for p in function.parameters if p.name in chosen}
    told = rng.sample(list(values), len(values))
    said = " and ".join(f"{name}={values[name]}" for name in told)
    by_place = [values[p.name] for p in required if not p.keyword_only]
    by_name = [f"{p.name}={values[p.name]}" for p in function.parameters if p.name in values]
    answer = f"{function.name}({', '.join([*by_place, *by_name[len(by_place) :]])})"
    named = f"{function.name}({', '.join(f'{name}={values[name]}' for name in told)})"
    in_order = f"{function.name}({', '.join(values[name] for name in told)})"
    bound = {**{p.name: p.default for p in optional}, **values}
    names = ", ".join(p.name for p in function.parameters)
    check = (
        f"import ast\ndef {function.name}({', '.join(_accepted(function))}):\n    return {names},\n"
        f"call = ast.parse(answer.strip(), mode='eval').body\n"
        f"assert isinstance(call, ast.Call) and not any(isinstance(n, ast.Call) for n in ast.walk(call) if n is not call)\n"
        f"assert eval(answer.strip()) == ({', '.join(_compared(bound[p.name]) for p in function.parameters)},)\n"
    )
    return {
        "question": f"Call `def {function.signature}` with {said}.",
        "answer": answer,
        "written": rng.choices((answer, named, in_order), (4, 3, 3))[0],
        "named": named,
        "told": in_order,
        "check": check,
    }


def _accepted(function: Function) -> list[str]:
    """Parameters for the check: the source of a default, which may name what is not there, stands as a text."""
    parts, starred = [], False
    for p in function.parameters:
        parts += ["*"] * (p.keyword_only and not starred)
        starred |= p.keyword_only
        parts.append(p.name if p.default is None else f"{p.name}={_compared(p.default)}")
    return parts


def _compared(source: str | None) -> str:
    """The source of a value as a check compares it: a literal is itself, anything else its source as a text."""
    try:
        return repr(ast.literal_eval(source or ""))
    except (ValueError, SyntaxError):
        return repr(f"source {source}")


def _default(function: Function, rng: random.Random) -> dict[str, str] | None:
    usable = [p for p in function.parameters if p.default is not None and len(p.default) <= LONGEST_DEFAULT]
    if not usable:
        return None
    asked = rng.choice(usable)
    names = ", ".join(p.name for p in function.parameters)
    return {
        "question": f"What is the default of `{asked.name}` in `{function.name}({names})`?",
        "answer": str(asked.default),
        "written": str(asked.default),
        "check": "import ast\nast.parse(answer.strip(), mode='eval')\n",
    }


def _module(function: Function, rng: random.Random) -> dict[str, str] | None:
    if not function.module:
        return None
    return {
        "question": f"Which module has `def {function.signature}`?",
        "answer": function.module,
        "written": function.module,
        "check": "import sys\nassert answer.strip() in sys.stdlib_module_names\n",
    }


def _does(function: Function, rng: random.Random) -> dict[str, str] | None:
    if not function.sentence:
        return None
    said = {"question": f"What does `def {function.signature}` do?", "answer": function.sentence}
    return {**said, "written": function.sentence, "check": ""}


_KINDS: dict[str, Callable[[Function, random.Random], dict[str, str] | None]] = {
    "call": _call,
    "default": _default,
    "module": _module,
    "does": _does,
}


def _value(rng: random.Random) -> str:
    return rng.choice((str(rng.randint(0, 99)), str(rng.randint(0, 9)), repr(rng.choice(STRINGS)), "True", "None"))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _plain(name: str) -> str:
    """What two spellings of a name share: getName and get_name."""
    return name.replace("_", "").lower()


# What a model must beat: answers without a model.

TOLD = re.compile(r"Call `def (\w+)\(.*\)` with (.*)\.")


def _template_answers(question: str) -> Iterator[tuple[str, str]]:
    """(name of a template, its answer) for each template that fits the question."""
    if match := TOLD.fullmatch(question):
        told = match[2].split(" and ")
        yield "values in the order told", f"{match[1]}({', '.join(one.partition('=')[2] for one in told)})"
        yield "values by name", f"{match[1]}({', '.join(told)})"
    elif match := re.search(r"`def ([a-z]+)", question):
        yield "the beginning of the name", match[1]


def baseline(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answers to prompts by what is best on the training prompts of their kind: a template, or the commonest answer.

    Rows have `question` and `kind`.
    """
    right: dict[str, Counter[str]] = {}
    common: dict[str, Counter[str]] = {}
    for known in prompts():
        common.setdefault(known["kind"], Counter())[known["answer"]] += 1
        hits = right.setdefault(known["kind"], Counter())
        tried = _template_answers(known["prompt"][0]["content"])
        hits.update(name for name, answer in tried if answer == known["answer"])
    found = []
    for row in rows:
        kind, (answer, count) = row["kind"], common[row["kind"]].most_common(1)[0]
        best = max(right[kind], key=right[kind].__getitem__, default="")
        made = dict(_template_answers(row["question"]))
        found.append(made[best] if best in made and right[kind][best] > count else answer)
    return found
