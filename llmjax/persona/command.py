"""The command `llmjax persona`. Imports are late, so that --help is quick."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.config.ranges import Range, number
from llmjax.errors import UserError
from llmjax.startup import timings
from llmjax.verb import Verb

BASE = Path("runs/assistant")
LENGTH = 4096  # tokens of a conversation, where infer.length and the model permit
MOST_TURNS = 100
ACTIONS = {"make": "", "ask": "DIR QUESTION", "chat": "DIR", "talk": "DIR DIR", "remove": "DIR"}


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "action", nargs="?", choices=ACTIONS, default="make",
        help="make a persona (the default, with --texts, --name and --rights); ask DIR QUESTION; chat DIR; talk DIR DIR: two "
        "personas converse; remove DIR: delete a persona, its weights and its index",
    )  # fmt: skip
    verb.add_argument("given", nargs="*", metavar="DIR", help="folders of personas, and a question")
    verb.add_argument("--texts", type=Path, metavar="DIR", help="the writings: a file, or a folder of text, Markdown, HTML, PDF and mail")  # fmt: skip
    verb.add_argument("--name", metavar="NAME", help="whom the persona simulates")
    verb.add_argument(
        "--rights", type=Path, metavar="FILE", help="the rights statement, a JSON file; see docs/persona.md"
    )
    verb.add_argument(
        "--speaker", default="", metavar="NAME", help="take only the lines of this speaker of plays or novels"
    )
    verb.add_argument("--base", type=Path, default=BASE, metavar="RUN", help="the model, with a chat template (default: runs/assistant)")  # fmt: skip
    verb.add_argument("--to", type=Path, metavar="DIR", help="the folder of the persona (default: runs/NAME)")
    verb.add_argument(
        "--learn", choices=("texts", "replies", "nothing"), default="texts",
        help="texts: the model goes on learning the writings; replies: what a speaker replies to others; nothing: it only finds and quotes (default: texts)",
    )  # fmt: skip
    verb.add_argument(
        "--weights", choices=("adapters", "all"), default="adapters", help="what learns (default: adapters)"
    )
    verb.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the training, such as train.duration='200 steps'; may be repeated")  # fmt: skip
    verb.add_argument("--questions", type=Path, metavar="FILE", help="measure which questions to decline with these: rows of question and inside (true or false)")  # fmt: skip
    verb.add_argument("--again", action="store_true", help="let changed texts or settings replace the training")
    verb.add_argument("--turns", type=number(int, Range(1, MOST_TURNS)), default=6, metavar="N", help="the most turns of a talk (default: 6)")  # fmt: skip
    verb.add_argument("--about", metavar="TEXT", help="what a talk begins with (default: the commonest subject of the second persona)")  # fmt: skip
    verb.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append what is said, with its quotes, here")


def _run(args: argparse.Namespace, c: ConfigDict) -> int:
    wanted = ACTIONS[args.action].split()
    if len(args.given) != len(wanted):
        raise UserError(f"write: llmjax persona {'--texts DIR --name NAME --rights FILE' if not wanted else ' '.join([args.action, *wanted])}")  # fmt: skip
    with timings.phase("import the library"):
        from llmjax.persona import card

    if args.action == "make":
        return _make(args, c)
    if args.action == "remove":
        folder = Path(args.given[0])
        if not card.is_persona(folder):
            raise UserError(f"{folder} is no persona, because it has no {card.FILE}; nothing was removed")
        storage.remove(folder)
        print(f"removed {folder}")
        return 0
    personas = [card.read(Path(given)) for given in args.given[: wanted.count("DIR")]]
    return {"ask": _ask, "chat": _chat, "talk": _talk}[args.action](args, c, personas)


def _make(args: argparse.Namespace, c: ConfigDict) -> int:
    if missing := [name for name in ("texts", "name", "rights") if not getattr(args, name)]:
        raise UserError(f"a persona needs --{missing[0]}: llmjax persona --texts DIR --name NAME --rights FILE")
    from llmjax.persona import build, card

    folder = args.to or Path("runs") / (re.sub(r"\W+", "-", args.name.lower()).strip("-") or "persona")
    made = build.build(
        build.Wanted(
            args.texts, args.name, args.rights, args.base, folder, args.speaker, args.learn, args.weights == "all", args.questions,
            args.set, args.again,
        ), lambda: _engine(args.base, c, {}),
    )  # fmt: skip
    print(card.page(made))
    print(f"the persona is in {folder}: llmjax persona chat {shlex.quote(str(folder))}, or llmjax serve --workdir {shlex.quote(str(args.base))} --adapter {shlex.quote(f'{folder.name}={folder}')}")  # fmt: skip
    return 0


def _engine(model: Path, c: ConfigDict, adapters: dict[str, Path]) -> Any:
    from llmjax.infer.command import engine_settings
    from llmjax.infer.language_model import load
    from llmjax.startup.cache import cache_of

    loaded = load(model, mesh=c.infer.mesh, cache=cache_of(c), adapters=adapters)
    length = c.infer.length or min(LENGTH, loaded.config.model.max_length)
    return loaded.engine(length=length, **{**engine_settings(c), "slots": min(c.infer.slots, 2)})


def _opened(personas: Sequence[Any], c: ConfigDict) -> tuple[Any, dict[str, str]]:
    """The engine of these personas, and the adapter of each persona by name."""
    if len({one.name for one in personas}) < len(personas):
        raise UserError(f"both personas are called {personas[0].name}: two of different names can talk")
    if len(personas) > 1 and (
        len({one.base for one in personas}) > 1 or any(one.run and not one.adapters for one in personas)
    ):
        raise UserError("personas that talk stand on one base, without weights of their own: make both with the same --base, and --weights adapters")  # fmt: skip
    first = personas[0]
    if first.run and not first.adapters:
        return _engine(first.folder / first.run, c, {}), {}
    if not (Path(first.base) / "config.json").is_file():
        raise UserError(
            f"the persona {first.name} stands on the run {first.base}, which is not there: put it back, or give the command "
            "that made the persona again, with --base and its folder of now"
        )
    paths = {one.name: one.folder / one.run for one in personas if one.run}
    return _engine(Path(first.base), c, paths), {name: name for name in paths}


def _said(args: argparse.Namespace, name: str, reply: Any) -> None:
    """Print a persona's answer, and append it to --out."""
    print(f"{name}: {''.join(x if x.isprintable() or x == chr(10) else ' ' for x in reply.text)}\n", flush=True)
    if args.out:
        storage.append_line(args.out, json.dumps({"name": name, **reply.row()}, ensure_ascii=False))


def _whole(engine: Any, conversation: Any) -> Any:
    """The result of one conversation. Raises UserError for one that fails."""
    from llmjax.infer import asking

    (done,) = asking.run(engine, [(0, lambda: conversation)])
    if done.error:
        raise UserError(done.error)
    return done.result


def _ask(args: argparse.Namespace, c: ConfigDict, personas: Sequence[Any]) -> int:
    from llmjax.persona import reply

    (persona,) = personas
    engine, adapters = _opened(personas, c)
    messages = [{"role": "user", "content": args.given[1]}]
    _said(args, persona.name, _whole(engine, reply.reply(persona, messages, adapter=adapters.get(persona.name, ""))))
    return 0


def _chat(args: argparse.Namespace, c: ConfigDict, personas: Sequence[Any]) -> int:
    from llmjax.persona import reply

    (persona,) = personas
    engine, adapters = _opened(personas, c)
    messages: list[dict[str, str]] = []
    if sys.stdin.isatty():
        print(f"{persona.disclosure} Ctrl-D ends it.")
    for line in sys.stdin:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        try:
            made = _whole(engine, reply.reply(persona, messages, adapter=adapters.get(persona.name, "")))
        except UserError as error:
            messages.pop()
            print(f"({error})\n", flush=True)
            continue
        messages.append({"role": "assistant", "content": made.text})
        _said(args, persona.name, made)
    return 0


def _talk(args: argparse.Namespace, c: ConfigDict, personas: Sequence[Any]) -> int:
    from llmjax.persona import reply

    first, second = personas
    engine, adapters = _opened(personas, c)
    topic = args.about or f"Tell me about {', '.join(list(second.style['favourite_words'])[:3])}?"
    print(f"About: {topic}\n", flush=True)
    _whole(
        engine,
        reply.talk(first, second, topic=topic, turns=args.turns, adapters=adapters, tell=lambda turn: _said(args, turn.name, turn.reply)),
    )  # fmt: skip
    return 0


VERBS = {
    "persona": Verb(
        "simulate somebody from their writings: quoted, declined where they say nothing, and always disclosed", _add, _run,
        config="optional",
    ),
}  # fmt: skip
