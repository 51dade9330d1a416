"""The verbs generate (with prompts of its own), chat and bench-infer."""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_1, Range, number
from llmjax.errors import UserError
from llmjax.startup import timings
from llmjax.verb import Verb

SHORTEST = 256  # tokens for which a slot has room at least, when a file's prompts are answered
FEW = 2  # prompts, for which a step of so many slots is faster than one of all


def add_generate(verb: argparse.ArgumentParser) -> None:
    """What `llmjax generate` takes beside the stage's arguments."""
    verb.add_argument(
        "--prompt", action="append", metavar="TEXT", help="continue this text and print it; may be repeated"
    )
    verb.add_argument("--chat", action="store_true", help="give prompts to a chat model as a user's messages")
    verb.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="answer the prompts of this file: lines of text, or JSONL with prompt, messages or ids, and maybe an id and settings",
    )  # fmt: skip
    verb.add_argument(
        "--out", type=Path, metavar="FILE.jsonl",
        help="where the answers go; run again, the same command goes on with those that are missing",
    )  # fmt: skip
    add_forms(verb)


def add_forms(verb: argparse.ArgumentParser) -> None:
    """What says which form answers have."""
    forms = verb.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="answers are JSON that this schema describes")
    forms.add_argument("--regex", metavar="RE", help="answers match this regular expression from end to end")
    forms.add_argument("--grammar", metavar="FILE", help="answers are sentences of this grammar, in Lark's notation")


def take_forms(c: ConfigDict, args: argparse.Namespace) -> None:
    """Put the form that the command gives into `c.generate`, in place of another.

    Raises UserError for a form that cannot be read.
    """
    with timings.phase("import the library"):
        from llmjax.infer.request import FORMS, read_form

    for name in FORMS:
        if (given := getattr(args, name)) is not None:
            c.generate.update({**dict.fromkeys(FORMS, ""), name: read_form(name, given)})


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    add_forms(chat)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--slots", default="1,2,4,8", metavar="N,N,...", help="texts at a time (default: 1,2,4,8)")
    bench.add_argument(
        "--prompt-tokens", type=number(int, AT_LEAST_1), default=64, metavar="N", help="of each prompt (default: 64)"
    )
    bench.add_argument("--new-tokens", type=number(int, Range(2)), default=64, metavar="N", help="written after it (default: 64)")  # fmt: skip
    bench.add_argument(
        "--text", type=Path, metavar="FILE", help="also measure what int8 weights cost: bits per byte of this text"
    )
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help="for infer.json and infer.png (default: WORKDIR/bench-infer)"
    )


def engine_settings(c: ConfigDict) -> dict[str, Any]:
    """`c.infer` as the engine's settings."""
    return {"slots": c.infer.slots, "steps": c.infer.steps, "form": c.infer.weights, "ahead": c.infer.ahead}


def request_settings(c: ConfigDict) -> dict[str, Any]:
    """`c.generate` as a request's settings."""
    given = c.generate.to_dict()
    given.pop("prompts")
    stop = given.pop("stop")
    return {**given, "stop": (stop,) if isinstance(stop, str) else tuple(stop), "seed": c.seed}


def generate(args: argparse.Namespace, c: ConfigDict) -> int | None:
    """`llmjax generate --prompt TEXT` or `--prompts FILE --out FILE`; without either the stage is to run."""
    if args.chat and not args.prompt and not args.prompts:
        raise UserError("--chat needs what is said to the model: --prompt TEXT or --prompts FILE")
    take_forms(c, args)
    if not args.prompt and not args.prompts:
        return None
    with timings.phase("import the library"):
        from llmjax.data.chat import chat_ids
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    if args.prompts is not None:
        if args.prompt or args.out is None:
            raise UserError("--prompts needs --out FILE.jsonl for the answers, and no --prompt beside it")
        return _files(c, args.workdir, args)
    model = load(args.workdir, mesh=c.infer.mesh, cache=cache_of(c))
    settings = {k: v for k, v in c.generate.to_dict().items() if k != "prompts"}
    for prompt in args.prompt:
        print(prompt, end="\n\n" if args.chat else "", flush=True)
        given = chat_ids(model.tokenizer, [{"role": "user", "content": prompt}]) if args.chat else prompt
        model.generate([given], seed=c.seed, on_text=lambda _, piece: print(piece, end="", flush=True), **settings)
        print()
    return 0


def _files(c: ConfigDict, workdir: Path, args: argparse.Namespace) -> int:
    with timings.phase("import the library"):
        from llmjax.infer import files
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    rows = list(files.read_prompts(args.prompts))
    done = files.answered(args.out)
    if all(str(row.id) in done for row in rows):
        print(f"all {len(rows)} prompts are answered in {args.out}")
        return 0
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    rows = files.with_requests(model.tokenizer, rows, request_settings(c), chat=args.chat)
    asked = [row.request for row in rows if row.request is not None and str(row.id) not in done]
    needed = [len(one.ids) + one.max_new_tokens for one in asked]
    fitting = [length for length in needed if length <= model.config.model.max_length]  # the others are refused
    # Few sizes, so that other prompts find the same programs kept.
    length = min(max(SHORTEST, _round_up(max(fitting, default=1))), model.config.model.max_length)
    settings = engine_settings(c)
    settings["slots"] = min(settings["slots"], FEW if len(asked) <= FEW else settings["slots"])
    engine = model.engine(length=c.infer.length or length, **settings)
    counts = files.answer_file(engine, rows, args.out)
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return 0


def _chat_engine(model: Any, settings: dict[str, Any], length: int) -> Any:
    return model.engine(length=length, **{**settings, "slots": 1})


def _round_up(count: int) -> int:
    """To a power of two."""
    return 1 << (count - 1).bit_length()


def _chat(args: argparse.Namespace, c: ConfigDict) -> int:
    """`llmjax chat`: from the terminal, or lines from a pipe."""
    workdir = args.workdir
    with timings.phase("import the library"):
        from llmjax.data.chat import chat_ids
        from llmjax.infer.chat import SHORT, Chat, talk
        from llmjax.infer.language_model import load
        from llmjax.startup.cache import cache_of

    take_forms(c, args)
    model = load(workdir, mesh=c.infer.mesh, cache=cache_of(c))
    chat_ids(model.tokenizer, [{"role": "user", "content": "?"}])  # says early that this is no chat model
    settings = request_settings(c)
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
    print(f"{workdir}, step {model.step}; /help says what can be done")
    talk(conversation, _typed(), sign=print)
    return 0


def _typed() -> Iterator[str]:
    """Lines from the terminal, with its line editing."""
    import readline  # noqa: F401 - input() then has a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


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
    together = model.mesh.size // meshes.row_ways(model.mesh)  # devices that read a copy of the parameters side by side
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
    """Bits per byte of a text with the weights as stored and as int8 rounds them."""
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
    "chat": Verb("talk with a chat model in the terminal", _add_chat, _chat, after=" /help says how."),
    "bench-infer": Verb(
        "measure how fast a model writes: time to the first token, time per token, share of memory bandwidth",
        _add_bench, _bench,
    ),
}  # fmt: skip
