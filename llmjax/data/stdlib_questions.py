"""Questions about the functions of the standard library, with answers: conversations, preferences and prompts, offline.

The sources "stdlib-answers", "stdlib-pairs", "stdlib-prompts" and "stdlib-test" of `data.sources` are made here, the same
on every machine with the same Python. The last one has the functions that are held out, one in ten: they share no name and
no docstring with the others. There are four kinds of questions:

    call      Which arguments call `def seek(offset, whence=0)` with whence=2 and offset=7?    (offset=7, whence=2)
    needed    Which parameters does `def seek(offset, whence=0)` need?                         offset
    optional  Which parameters of `def seek(offset, whence=0)` are optional?                   whence
    does      What does `def proxy_bypass(host)` do?                                           Return True, if host ...

A function with one parameter gets one or two more, from other functions, and each question chooses how many have a default.
So a question is seldom seen twice, and its answer must be read from it. Arguments are given by name, in the order of the
signature. Of the people who write examples, most do not keep to that: they give the values alone, in the order in which
they were told, which is often wrong. Preferences and rewards prefer the first form. Prompts have `check`, a program that
ends well when the variable `answer` is right enough: arguments with which the call is right, in any form, or the right
parameters in any order.
"""

import ast
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llmjax.data import stdlib_corpus

HELD_OUT = 10  # one function in so many
LONGEST = 60  # characters of a signature
LONGEST_SENTENCE, LONGEST_DEFAULT = 72, 12  # characters
FEWEST_PARAMETERS, MOST_PARAMETERS = 2, 3  # of a function whose call is asked for; the other questions have the most
EXAMPLES = {
    "call": 4,
    "needed": 1,
    "optional": 1,
    "does": 1,
}  # questions of each kind about each function to learn from
ASKED = ("call", "needed", "call", "optional")  # the kinds of prompts, in turn
HABITS = (2, 3)  # how often an example of a call has the preferred form, and the values alone
DEFAULTS = ("None", "0", "1", "True", "False", "''")
STRINGS = ("a", "b", "x", "key", "data", "name", "text", "line")
CLASSES = frozenset({"self", "cls", "mcs", "mcls", "metacls"})  # first parameters that a caller does not give


@dataclass(frozen=True)
class Parameter:
    """A parameter; `default` is its source, None: required."""

    name: str
    default: str | None


@dataclass(frozen=True)
class Function:
    """A function of the library."""

    name: str
    parameters: tuple[Parameter, ...]
    sentence: str  # the first one of its docstring; "": it has none that is short
    docstring: str  # all of it, in lower case, with single spaces

    @property
    def signature(self) -> str:
        """The source of its parameters with their defaults, in brackets."""
        return f"{self.name}({', '.join(_source(p) for p in self.parameters)})"

    @property
    def held_out(self) -> bool:
        return _number(self.name) % HELD_OUT == 0


def _source(p: Parameter) -> str:
    return p.name if p.default is None else f"{p.name}={p.default}"


@cache
def functions() -> tuple[Function, ...]:
    """One function for each name and each docstring, in an order that depends on names alone."""
    found: dict[str, ast.FunctionDef] = {}
    for entry in stdlib_corpus.entries():
        if not entry.path.partition("#")[0].endswith(".py") or "#" in entry.path:
            continue
        text = entry.text or (entry.file.read_text(encoding="utf-8", errors="replace") if entry.file else "")
        for node in _definitions(text):
            found.setdefault(_plain(node.name), node)
    made, docstrings = [], set[str]()
    for node in found.values():
        function = _function(node)
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


def _function(node: ast.FunctionDef) -> Function | None:
    """The function of a definition; None where its calls are not plain."""
    given = node.args
    if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
        return None
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(value) for value in given.defaults]
    named = [Parameter(one.arg, default) for one, default in zip(given.args, defaults, strict=True)]
    if named and named[0].name in CLASSES:
        named = named[1:]
    docstring = ast.get_docstring(node) or ""
    made = Function(node.name, tuple(named), _sentence(docstring), re.sub(r"\s+", " ", docstring).strip().lower())
    plain = all(p.name.isascii() and not p.name.startswith("_") for p in named)
    fits = 1 <= len(named) <= MOST_PARAMETERS and len(made.signature) <= LONGEST
    return made if plain and fits and made.signature.isascii() else None


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
        if not function.held_out:
            for kind, questions in EXAMPLES.items():
                for number in range(questions):
                    if asked := _ask(function, kind, number):
                        yield {"messages": [_said("user", asked["question"]), _said("assistant", asked["written"])]}


def pairs() -> Iterator[dict[str, Any]]:
    """Preferences between two forms of the same arguments."""
    for function in functions():
        if not function.held_out and (asked := _ask(function, "call", EXAMPLES["call"])):
            yield {
                "prompt": [_said("user", asked["question"])],
                "chosen": [_said("assistant", asked["answer"])],
                "rejected": [_said("assistant", asked["told"])],
            }


def prompts() -> Iterator[dict[str, Any]]:
    """Prompts with what rewards read, one about each function that is not held out."""
    return _prompts(held_out=False)


def test() -> Iterator[dict[str, Any]]:
    """Prompts of the same kinds about the functions that are held out."""
    return _prompts(held_out=True)


def _prompts(*, held_out: bool) -> Iterator[dict[str, Any]]:
    chosen = (function for function in functions() if function.held_out == held_out)
    for function, kind in zip(chosen, itertools.cycle(ASKED)):
        asked = _ask(function, kind, EXAMPLES[kind] + 1)
        assert asked is not None
        kept = {name: asked[name] for name in ("answer", "check")}
        yield {"prompt": [_said("user", asked["question"])], "kind": kind, "function": function.name, **kept}


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@cache
def _names() -> tuple[str, ...]:
    """The names of the parameters of all functions, as often as they occur: held-out functions have no others."""
    return tuple(p.name for one in functions() for p in one.parameters if len(p.name) <= LONGEST_DEFAULT)


# The kinds of questions.


def _ask(function: Function, kind: str, number: int) -> dict[str, str] | None:
    """Question `number` of a kind: question, answer, written (the answer as an example has it), check; None: there is none."""
    rng = random.Random(_number(f"{kind} {number} {function.name}"))
    fewest = FEWEST_PARAMETERS if kind == "call" else MOST_PARAMETERS
    return _KINDS[kind](function if kind == "does" else _filled(function, rng, fewest), rng)


def _filled(function: Function, rng: random.Random, fewest: int) -> Function:
    """A function with `fewest` to MOST_PARAMETERS parameters, of which at least one has a default and one has none."""
    names = [p.name for p in function.parameters]
    size = max(len(names), rng.randint(fewest, MOST_PARAMETERS))
    while len(names) < size:
        names += [name for name in [rng.choice(_names())] if name not in names]
    own = {p.name: p.default for p in function.parameters if p.default and len(p.default) <= LONGEST_DEFAULT}
    required = rng.randint(1, size - 1)
    made = [
        Parameter(name, None if i < required else own.get(name) or rng.choice(DEFAULTS)) for i, name in enumerate(names)
    ]
    return replace(function, parameters=tuple(made))


def _call(function: Function, rng: random.Random) -> dict[str, str]:
    """Values for the required parameters and for one or all of the others."""
    optional = [p.name for p in function.parameters if p.default is not None]
    left_out = set(rng.sample(optional, rng.randint(0, len(optional) - 1)))
    values = {p.name: _value(rng) for p in function.parameters if p.name not in left_out}
    told = rng.sample(list(values), len(values))
    answer = f"({', '.join(f'{name}={value}' for name, value in values.items())})"
    in_order = f"({', '.join(values[name] for name in told)})"
    bound = {p.name: values.get(p.name, p.default) for p in function.parameters}
    parameters = ", ".join(
        p.name if p.default is None else f"{p.name}={_compared(p.default)}" for p in function.parameters
    )
    check = (
        f"import ast\ndef {function.name}({parameters}):\n    return {', '.join(bound)},\n"
        f"written = '{function.name}' + answer.strip()\ncall = ast.parse(written, mode='eval').body\n"
        f"assert isinstance(call, ast.Call) and not any(isinstance(n, ast.Call) for n in ast.walk(call) if n is not call)\n"
        f"assert eval(written) == ({', '.join(_compared(value) for value in bound.values())},)\n"
    )
    said = " and ".join(f"{name}={values[name]}" for name in told)
    return {
        "question": f"Which arguments call `def {function.signature}` with {said}?",
        "answer": answer,
        "written": rng.choices((answer, in_order), HABITS)[0],
        "told": in_order,
        "check": check,
    }


def _compared(source: str | None) -> str:
    """The source of a value as a check compares it: a literal is itself, anything else its source as a text."""
    try:
        return repr(ast.literal_eval(source or ""))
    except (ValueError, SyntaxError):
        return repr(f"source {source}")


def _needed(function: Function, rng: random.Random) -> dict[str, str]:
    required = [p.name for p in function.parameters if p.default is None]
    return _listed(f"Which parameters does `def {function.signature}` need?", required)


def _optional(function: Function, rng: random.Random) -> dict[str, str]:
    optional = [p.name for p in function.parameters if p.default is not None]
    return _listed(f"Which parameters of `def {function.signature}` are optional?", optional)


def _listed(question: str, names: Sequence[str]) -> dict[str, str]:
    answer = ", ".join(names)
    check = f"assert sorted(one.strip() for one in answer.split(',')) == {sorted(names)}\n"
    return {"question": question, "answer": answer, "written": answer, "check": check}


def _does(function: Function, rng: random.Random) -> dict[str, str] | None:
    if not function.sentence:
        return None
    said = {"question": f"What does `def {function.signature}` do?", "answer": function.sentence}
    return {**said, "written": function.sentence, "check": ""}


_KINDS: dict[str, Callable[[Function, random.Random], dict[str, str] | None]] = {
    "call": _call,
    "needed": _needed,
    "optional": _optional,
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

ASKED_CALL = re.compile(r"Which arguments call `.*` with (.*)\?")
SIGNATURE = re.compile(r"`def \w+\((.*)\)`")


def _template_answers(question: str) -> Iterator[tuple[str, str]]:
    """(name of a template, its answer) for each template that fits the question."""
    if match := ASKED_CALL.fullmatch(question):
        told = match[1].split(" and ")
        yield "values in the order told", f"({', '.join(one.partition('=')[2] for one in told)})"
        yield "values by name", f"({', '.join(told)})"
    elif match := SIGNATURE.search(question):
        names = [one.partition("=")[0] for one in match[1].split(", ")]
        yield "the first parameter", names[0]
        yield "the last parameter", names[-1]
        yield "all parameters", ", ".join(names)


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
