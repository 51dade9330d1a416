"""What messages and helps name exists: options, settings, values, verbs, extras, files. What they say to type is accepted."""

import argparse
import ast
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from llmjax import cli, config
from llmjax.errors import UserError

ROOT = Path(__file__).parent.parent
FOREIGN = {  # options of SentencePiece's trainer, a variable of a page
    "--pad_id", "--bos_id", "--eos_id", "--unk_id", "--byte_fallback", "--normalization_rule_name",
    "--add_dummy_prefix", "--remove_extra_whitespaces", "--sans",
}  # fmt: skip
HOLE = "HOLE"  # in the place of what a message fills in
OTHERS = {"infer.png", "tokenizer.ggml"}  # a file and keys of GGUF, which look like settings


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    (verbs,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings of a source that hold a space, without docstrings and parts of other strings."""
    tree, inside = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node)} - {id(node)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            if " " in text:
                yield node.lineno, text


@functools.cache
def said() -> list[tuple[str, str]]:
    """(where, text) of every string of the package, and of the help of every verb."""
    found = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in sorted((ROOT / "llmjax").rglob("*.py"))
        for line, text in texts(path)
    ]
    for verb, one in parsers().items():
        found.append((f"llmjax {verb} --help", re.sub(r"\s+", " ", re.sub(r"-\n\s+", "-", one.format_help()))))
    return found


def known() -> dict[str, set[str]]:
    settings = config.flatten(config.base().to_dict())
    groups = {".".join(key.split(".")[:i]) for key in settings for i in range(1, key.count(".") + 1)}
    actions = [action for one in parsers().values() for action in one._actions]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {
        "option": {name for action in actions for name in action.option_strings} | FOREIGN | {"--version"},
        "setting": {*settings, *groups, *OTHERS},
        "verb": set(parsers()),
        "extra": set(extras),
    }


SECTIONS = "|".join(sorted(key for key, value in config.base().to_dict().items() if isinstance(value, dict)))


def named(text: str) -> Iterator[tuple[str, str]]:
    """(kind, name) of what a text names."""
    yield from (("option", name) for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if name != "--config")
    yield from (("setting", name) for name in re.findall(r"--config\.([a-z_.0-9]+[a-z_0-9])", text))
    for name in re.findall(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_0-9.]*[a-z_0-9])(?![(\w])", text):
        if not name.endswith((".py", ".json", ".jsonl", ".md")):
            yield "setting", name
    yield from (("verb", name) for name in re.findall(r"`llmjax ([a-z][a-z-]*)", text))
    yield from (("extra", name) for name in re.findall(r"llmjax\[(\w+)\]", text))
    rooms = "configs|docs|launch|benchmarks|llmjax|results|tests"
    yield from (
        ("file", name) for name in re.findall(rf"(?<![\w./-])((?:{rooms})/[\w./-]*\w)", text) if HOLE not in name
    )


def test_what_messages_and_helps_name_exists():
    there, counted, wrong = known(), dict[str, int](), []
    for where, text in said():
        for kind, name in named(text):
            counted[kind] = counted.get(kind, 0) + 1
            if HOLE not in name and not ((ROOT / name).exists() if kind == "file" else name in there[kind]):
                wrong.append(f"{where}: there is no {kind} {name}")
    assert not wrong
    assert min(counted.values()) > 20 and len(counted) == 5, counted


def test_a_value_that_a_message_gives_to_a_setting_is_one_of_its_values():
    c, wrong, tried = config.base(), [], set[tuple[str, str]]()
    keys = config.flatten(c.to_dict())
    for where, text in said():
        if "--sweep" in text:  # ranges of values
            continue
        for key, value in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_0-9.]+)=('[^']*'|\([^)]*\)|[^\s,;:)`\"']+)", text):
            if key not in keys or HOLE in value or value in ("RUN", "FILE", "None") or (key, value) in tried:
                continue
            tried.add((key, value))
            try:
                config.override(c, [f"{key}={value.strip(chr(39)).rstrip('.')}"])
            except UserError as error:  # that other settings must change too is another matter
                if re.search("this key takes|is not known|is not understood", str(error)):
                    wrong.append(f"{where}: {error}")
    assert not wrong
    assert len(tried) > 60


def test_a_command_that_a_message_gives_can_be_typed(capsys):
    wrong, tried = [], 0
    for where, text in said():
        for command in re.findall(r"`(llmjax [^`]+)`", text):
            words = [word for word in shlex.split(command)[1:] if not word.startswith("--config.")]
            if words[0] == HOLE:  # a stage
                words[0] = "train"
            tried += 1
            try:
                args = [word.replace("CHIP:SHAPE", "v5p:2x2x1") for word in words]
                cli._parser().parse_args(args)
            except SystemExit:
                if words != [words[0]]:  # of a verb alone the message says the rest
                    wrong.append(f"{where}: {command}: {capsys.readouterr().err.splitlines()[-1]}")
    assert not wrong
    assert tried > 25


PATH_BEHIND = re.compile(r"(--config\.[\w.]+=|--(workdir|from|to|config|base|also|adapter|out) |llmjax persona \w+ )$")


def unquoted(path: Path) -> Iterator[str]:
    """Where a message writes a path into a command without quotes: `llmjax train --workdir my runs/a`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        for before, hole in zip(node.values, node.values[1:], strict=False):
            if (
                isinstance(before, ast.Constant)
                and isinstance(hole, ast.FormattedValue)
                and PATH_BEHIND.search(before.value)
            ):
                # "--to FOLDER is a file" names what was given, and is no advice
                given = re.match(r"--\w+ $", before.value) and before is node.values[0]
                if not given and not ast.unparse(hole.value).startswith("shlex.quote("):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(hole.value)}"


def test_paths_in_commands_that_are_advised_are_quoted():
    assert [one for path in sorted((ROOT / "llmjax").rglob("*.py")) for one in unquoted(path)] == []
