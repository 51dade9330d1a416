"""The verbs generate (with prompts of its own), chat, label and bench-infer."""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_1, Range, number
from llmjax.errors import UserError
from llmjax.startup import timings
from llmjax.verb import Verb, check_paths

SHORTEST = 256  # the fewest tokens of a slot, for the prompts of a file
FEW = 2  # for so few prompts, an engine of so many slots is faster


def add_generate(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `llmjax generate` beside the stage's."""
    verb.add_argument(
        "--prompt", action="append", metavar="TEXT", help="continue this text and print it; may be repeated"
    )
    verb.add_argument("--chat", action="store_true", help="give each prompt to a chat model as a message of the user")
    verb.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="answer the prompts of FILE: lines of text, or JSONL rows with prompt, messages or ids, and optionally id and settings",
    )  # fmt: skip
    verb.add_argument(
        "--out", type=Path, metavar="FILE.jsonl",
        help="write the answers here; the same command again answers only prompts without an answer, and those whose row, model or settings changed",
    )  # fmt: skip
    add_adapters(verb)
    add_constraints(verb)


def add_adapters(
    verb: argparse.ArgumentParser,
    meaning: str = "answer with these adapters of the model: a run, or a folder in PEFT's format; may be repeated, for "
    "rows of --prompts with the field adapter",
) -> None:
    """Add the argument that names adapters."""
    verb.add_argument("--adapter", action="append", default=[], metavar="[NAME=]PATH", help=meaning)


def adapters_of(args: argparse.Namespace) -> dict[str, Path]:
    """name -> folder of the adapters of a command. Raises UserError for a name that comes twice."""
    found: dict[str, Path] = {}
    for given in args.adapter:
        name, _, path = given.rpartition("=")
        name = name or Path(path).name
        if name in found:
            raise UserError(f"--adapter {given}: there are two of the name {name}; give one another, NAME=PATH")
        found[name] = Path(path)
    return found


def _common_adapter(adapters: dict[str, Path]) -> dict[str, str]:
    """The setting of requests that name no adapter: the only one, if there is one."""
    return {"adapter": next(iter(adapters))} if len(adapters) == 1 else {}


def add_constraints(verb: argparse.ArgumentParser) -> None:
    """Add the arguments that constrain the answers."""
    group = verb.add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="answers are JSON of the schema in FILE")
    group.add_argument("--regex", metavar="RE", help="answers match this regular expression as a whole")
    group.add_argument(
        "--grammar", metavar="FILE", help="answers are sentences of the grammar in FILE, in Lark's notation"
    )


def take_constraint(c: ConfigDict, args: argparse.Namespace) -> None:
    """Put the constraint of the command into `c.generate`, in place of another.

    Raises UserError for a constraint that cannot be read.
    """
    with timings.phase("import the library"):
        from llmjax.infer.request import CONSTRAINTS, read_constraint

    for name in CONSTRAINTS:
        if (given := getattr(args, name)) is not None:
            c.generate.update({**dict.fromkeys(CONSTRAINTS, ""), name: read_constraint(name, given)})


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    add_adapters(chat)
    add_constraints(chat)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--slots", default="1,2,4,8", metavar="N,N,...", help="numbers of texts at a time to measure (default: 1,2,4,8)"
    )
    bench.add_argument(
        "--prompt-tokens",
        type=number(int, AT_LEAST_1),
        default=64,
        metavar="N",
        help="tokens of each prompt (default: 64)",
    )
    bench.add_argument("--new-tokens", type=number(int, Range(2)), default=64, metavar="N", help="tokens written after each prompt (default: 64)")  # fmt: skip
    bench.add_argument(
        "--text", type=Path, metavar="FILE", help="also measure the loss of int8 weights: bits per byte of this text"
    )
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help="write infer.json and infer.png here (default: WORKDIR/bench-infer)"
    )


def engine_settings(c: ConfigDict) -> dict[str, Any]:
    """The settings of an engine in `c.infer`."""
    return {"slots": c.infer.slots, "steps": c.infer.steps, "weight_format": c.infer.weights, "ahead": c.infer.ahead}


def open_engine(workdir: Path, c: ConfigDict, *, length: int, slots: int) -> Any:
    """The engine of a run, for at most `slots` conversations of `length` tokens, where the settings and the model permit."""
    from llmjax.infer.language_model import load
    from llmjax.startup.cache import cache_of

    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    settings = engine_settings(c)
    settings["slots"] = min(settings["slots"], slots)
    return model.engine(length=c.infer.length or min(length, model.config.model.max_length), **settings)


def made_from(workdir: Path, c: ConfigDict, settings: Any, *adapters: Path) -> dict[str, str]:
    """What the answers of a command are all made from: the model, and settings that change texts."""
    from llmjax.infer.resuming import digest, model_digest

    own = [c.infer.weights, c.infer.length, settings]
    return {"model": model_digest(workdir, *adapters), "settings": digest(own)}


def request_settings(c: ConfigDict) -> dict[str, Any]:
    """The settings of a request in `c.generate`."""
    given = {k: v for k, v in c.generate.to_dict().items() if k not in ("prompts", "beams", "length_penalty")}
    stop = given.pop("stop")
    return {**given, "stop": (stop,) if isinstance(stop, str) else tuple(stop), "seed": c.seed}


def generate(args: argparse.Namespace, c: ConfigDict) -> int | None:
    """`llmjax generate --prompt TEXT` or `--prompts FILE --out FILE`; None without either, so that the stage runs."""
    if args.chat and not args.prompt and not args.prompts:
        raise UserError("--chat needs a message for the model: --prompt TEXT or --prompts FILE")
    take_constraint(c, args)
    if not args.prompt and not args.prompts:
        return None
    with timings.phase("import the library"):
        from llmjax.data.chat import chat_ids
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    if args.prompts is not None:
        if args.prompt or args.out is None:
            raise UserError("--prompts needs --out FILE.jsonl for the answers, and no --prompt")
        return _files(c, args.workdir, args)
    adapters = adapters_of(args)
    if len(adapters) > 1:
        raise UserError("--prompt is answered with one adapter: give one, or --prompts FILE with rows that name theirs")
    model = load(args.workdir, mesh=c.infer.mesh, cache=cache_of(c), adapters=adapters)
    settings = {k: v for k, v in c.generate.to_dict().items() if k != "prompts"} | _common_adapter(adapters)
    for prompt in args.prompt:
        print(prompt, end="\n\n" if args.chat else "", flush=True)
        given = chat_ids(model.tokenizer, [{"role": "user", "content": prompt}]) if args.chat else prompt
        model.generate([given], seed=c.seed, on_text=lambda _, piece: print(piece, end="", flush=True), **settings)
        print()
    return 0


def _files(c: ConfigDict, workdir: Path, args: argparse.Namespace) -> int:
    with timings.phase("import the library"):
        from llmjax.infer import batch, resuming
        from llmjax.infer.generate import round_up
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    check_paths(args, answers_before=resuming.before(args.out))
    rows = list(batch.read_prompts(args.prompts))
    adapters = adapters_of(args)
    common = made_from(workdir, c, [request_settings(c), c.generate.beams, c.generate.length_penalty, args.chat], *adapters.values())  # fmt: skip
    done = resuming.look(args.out, batch.made_from(rows, common))[0]
    if all(str(row.id) in done for row in rows):
        print(f"all {len(rows)} prompts are answered in {args.out}")
        return 0
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c), adapters=adapters)
    settings = request_settings(c) | _common_adapter(adapters)
    rows = batch.with_requests(model.tokenizer, rows, settings, chat=args.chat)
    asked = [row.request for row in rows if row.request is not None and str(row.id) not in done]
    needed = [len(one.ids) + one.max_new_tokens for one in asked]
    fitting = [length for length in needed if length <= model.config.model.max_length]  # longer ones are refused
    length = min(round_up(max(fitting, default=1), least=SHORTEST), model.config.model.max_length)
    length = c.infer.length or length
    settings = engine_settings(c)
    settings["slots"] = min(settings["slots"], FEW if len(asked) <= FEW else settings["slots"])
    engine = (
        model.beam_search(beams=c.generate.beams, length_penalty=c.generate.length_penalty, length=length)
        if c.generate.beams > 1
        else model.engine(length=length, **settings)
    )
    counts = batch.answer_file(engine, rows, args.out, common=common)
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 0


def _chat_engine(model: Any, settings: dict[str, Any], length: int) -> Any:
    return model.engine(length=length, **{**settings, "slots": 1})


def _chat(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax chat`, from the terminal or with lines from a pipe."""
    workdir = args.workdir
    with timings.phase("import the library"):
        from llmjax.data.chat import chat_ids
        from llmjax.infer.chat import SHORT, Chat, talk
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    take_constraint(c, args)
    adapters = adapters_of(args)
    if len(adapters) > 1:
        raise UserError("a chat is with one adapter: give --adapter once")
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c), adapters=adapters)
    chat_ids(model.tokenizer, [{"role": "user", "content": "?"}])  # fails early without a chat template
    settings = request_settings(c) | _common_adapter(adapters)
    longest = c.infer.length or model.config.model.max_length
    longer = functools.partial(_chat_engine, model, engine_settings(c))
    settings["max_new_tokens"] = min(settings["max_new_tokens"], longest // 2)

    def show(text: str) -> None:
        print(text, end="", flush=True)
        if text:
            timings.moment("first of an answer")

    engine = longer(c.infer.length or min(SHORT, longest))
    conversation = Chat(engine, settings, show, system=args.system, longer=longer, longest=longest)
    if not sys.stdin.isatty():
        talk(conversation, sys.stdin)
        return 0
    print(f"{workdir}, step {model.step}; /help lists the commands")
    talk(conversation, _typed(), sign=print)
    return 0


def _typed() -> Iterator[str]:
    """Lines from the terminal, with line editing."""
    import readline  # noqa: F401 - input() then has a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _add_label(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--texts", type=Path, required=True, metavar="FILE", help="rows with text (and text_b): JSON lines, JSON, CSV or Parquet")  # fmt: skip
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="write the rows with predicted and probabilities here")  # fmt: skip


def _label(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax label --texts FILE --out FILE`."""
    from llmjax import storage
    from llmjax.data.records import records
    from llmjax.infer.language_model import load
    from llmjax.startup.cache import cache_of

    rows = list(records(args.texts))
    for place, row in rows:
        if isinstance(row, str) or not isinstance(row.get("text"), str):
            raise UserError(f"{args.texts}, row {place}: {row if isinstance(row, str) else 'there is no text'}")
    found = [row for _, row in rows if not isinstance(row, str)]
    model = load(args.workdir, mesh=c.infer.mesh, cache=cache_of(c))
    said = model.classify([(row["text"], str(row.get("text_b") or "")) for row in found], batch_size=c.eval.batch_size)
    made = [{**row, "predicted": one.label, "probabilities": one.probabilities} for row, one in zip(found, said, strict=True)]  # fmt: skip
    storage.write_text(args.out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in made))
    print(f"{args.out}: {len(made):,} rows")
    return 0


def _bench(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax bench-infer`."""
    workdir = args.workdir
    with timings.phase("import the library"):
        from llmjax.infer import bench
        from llmjax.infer.language_model import load
        from llmjax.parallel import mesh as meshes
        from llmjax.startup.cache import cache_of

    try:
        sizes = sorted({int(n) for n in args.slots.split(",")})
    except ValueError as error:
        raise UserError(f"--slots {args.slots}: give numbers with commas between, such as 1,4,16") from error
    if sizes[0] < 1:
        raise UserError(f"--slots {args.slots}: each must be at least 1")
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    device = model.mesh.devices.flat[0]
    together = model.mesh.size // meshes.row_ways(model.mesh)  # devices that share one copy of the parameters
    peak = bench.bandwidth(device) * (1 if device.platform == "cpu" else together)
    rows = []
    for slots in sizes:
        settings = {**engine_settings(c), "slots": slots}
        engine = model.engine(length=args.prompt_tokens + args.new_tokens, **settings)
        rows.append(bench.measure(engine, prompt=args.prompt_tokens, new=args.new_tokens, peak=peak))
    results: dict[str, Any] = {
        "model": c.name,
        "device": device.device_kind,
        "mesh": meshes.describe(model.mesh),
        "weights": c.infer.weights,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "bandwidth_bytes_per_second": peak,
        "rows": rows,
    }
    print(bench.table(rows))
    if args.text is not None:
        results["bits_per_byte"] = _int8_loss(model, args.text.read_text(encoding="utf-8"))
        print(", ".join(f"{form} {value:.4f} bits per byte" for form, value in results["bits_per_byte"].items()))
    folder = args.out or workdir / "bench-infer"
    bench.write(results, folder)
    print(f"written: {folder / 'infer.json'}, {folder / 'infer.png'}")
    return 0


def _int8_loss(model: Any, text: str) -> dict[str, float]:
    """Bits per byte of a text with the weights as stored, and as int8 rounds them."""
    import dataclasses

    import jax

    from llmjax.infer import weights
    from llmjax.train.step import make_eval_step

    module, params = weights.untied(model.module, model.params)
    rounded = dataclasses.replace(
        model,
        module=module,
        params=weights.dequantized(module, params),
        _eval_step=jax.jit(make_eval_step(module, model.config)),
    )
    return {"stored": model.loss(text).bits_per_byte, "int8": rounded.loss(text).bits_per_byte}


VERBS = {
    "chat": Verb("talk with a chat model in the terminal", _add_chat, _chat, after=" /help lists the commands."),
    "label": Verb("tell the classes of texts by a model that `llmjax task` has trained", _add_label, _label),
    "bench-infer": Verb(
        "measure the speed of generation: time to the first token, time per token, share of memory bandwidth",
        _add_bench, _bench,
    ),
}  # fmt: skip
