"""The command: llmjax <verb> --config FILE[:arg] --config.key=value --workdir DIR."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax import __version__, config, human, recipe
from llmjax.config.ranges import AT_LEAST_0, AT_LEAST_1, SEED, number
from llmjax.errors import UserError
from llmjax.eval import command as eval_command
from llmjax.infer import command as infer_command
from llmjax.parallel import processes
from llmjax.start import script

DESCRIPTION = """\
Build a language model, from raw text to a model you can prompt.

Each stage is a verb and leaves one folder in the run's folder (--workdir, by default runs/NAME). A stage that is
done is skipped; changing a setting that it depends on runs it, and what follows it, again. A training goes on from its
last checkpoint, for longer or at another rate too; what would make another training of it is refused without --again."""

EXAMPLES = """\
examples:
  llmjax run --config configs/quickstart.py                          the whole recipe: under 8 minutes on 2 cores
  llmjax run --config configs/quickstart.py --config.data.sources='["my_notes/"]' --workdir runs/notes
  llmjax train --config configs/models/gpt2.py:small --config.train.batch_size=8
  llmjax generate --workdir runs/quickstart --prompt 'def read_lines(path):'
  llmjax report runs/a runs/b                                        two runs side by side
  llmjax import --from SmolLM2-135M-Instruct/ --to runs/smollm2      a Hugging Face folder or a .gguf file becomes a run
  llmjax generate --workdir runs/smollm2 --chat --prompt 'Why is the sky blue?'
  llmjax chat --workdir runs/smollm2                                 talk with it
  llmjax generate --workdir runs/smollm2 --prompts questions.jsonl --out answers.jsonl
  llmjax bench-infer --workdir runs/smollm2                          how fast it writes
  llmjax export --from runs/quickstart --to exported/                a run becomes a folder that transformers loads
  llmjax eval --workdir runs/smollm2 --tasks openllm_v1_4 --data benchmarks/   the questions are read from files there
  llmjax rate a.jsonl b.jsonl --to ratings.jsonl                     which answer is better: a page on this machine
  llmjax plan --config configs/runs/llama2.py --topology v5p:8x8x8   does it fit, how fast is it, what does it cost
  llmjax config                                                      every setting, with what it means
"""

CONFIG_HELP = """\
settings:
  --config FILE[:ARG]        a Python file with get_config(arg), such as configs/quickstart.py, or a run's config.json;
                             without it, the config.json in --workdir
  --config.KEY=VALUE         change one setting, e.g. --config.train.batch_size=8 --config.data.sources='["a.txt","b/"]'
                             (`llmjax config` lists all of them)
"""


AGAIN = """\
let changed settings replace the training that is in WORKDIR, which is moved to WORKDIR/before-N; a single stage runs again
although nothing changed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0 done, or stopped and saved; 1 the machine failed; 2 a mistake to mend; 3 a plan that does not fit; 4 prepared, but
    for documents that could not be read.
    """
    status = _guarded(argv)
    processes.end(status)
    return status


def _guarded(argv: Sequence[str] | None) -> int:
    """Run the command; what went wrong as one line and an exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    args = _parser().parse_args([a for a in arguments if not a.startswith("--config.")])
    try:
        return _run(args, overrides)
    except UserError as error:
        if os.environ.get("LLMJAX_TRACEBACK"):
            raise
        print(f"llmjax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough: `llmjax config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("LLMJAX_TRACEBACK"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = ". Free some space, or give another --workdir; the same command then goes on from what was saved"
            if args.verb in ("import", "export"):
                hint = ". Free some space, or give another --to; nothing was left there"
        print(f"llmjax: {error.strerror or error}{where}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        rest = (
            "nothing was left" if args.verb in ("import", "export") else "the same command goes on from what was saved"
        )
        print(f"\nllmjax: interrupted; {rest}", file=sys.stderr)
        return 130
    except processes.FirstFailed as error:
        print(f"llmjax: process {processes.index()} ends, because the first did: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if processes.count() == 1:
            raise
        traceback.print_exc()
        print(f"llmjax: {processes.explain(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "llmjax", description=DESCRIPTION, epilog=f"{EXAMPLES}\n{CONFIG_HELP}", formatter_class=formatter
    )
    parser.add_argument("--version", action="version", version=f"llmjax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    everything = {"run": "run the whole recipe (config.stages)"} | {name: s.about for name, s in recipe.STAGES.items()}
    for name, about in everything.items():
        needs = recipe.STAGES[name].needs if name in recipe.STAGES else ()
        after = f" Needs {' and '.join(needs)} to have run." if needs else ""
        verb = verbs.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.{after}",
            epilog=CONFIG_HELP,
            formatter_class=formatter,
        )
        verb.add_argument("--config", metavar="FILE[:ARG]", help="the config; see below")
        verb.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
        if name in ("run", *recipe.TRAINED):
            verb.add_argument("--again", action="store_true", help=AGAIN)
        if name == "generate":
            infer_command.add_generate(verb)
        if name == "eval":
            eval_command.add_tasks(verb)
        if name == "report":
            verb.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs to lay side by side, two or more")
            verb.add_argument(
                "--out", type=Path, metavar="DIR", help="where the comparison goes (default: runs/compare)"
            )
    _add_interop(verbs)
    infer_command.add_verbs(verbs, CONFIG_HELP)
    _add_plan(verbs)
    _add_classify(verbs)
    eval_command.add_rate(verbs)
    settings = verbs.add_parser("config", help="list every setting, its value and its meaning")
    settings.add_argument("--config", metavar="FILE[:ARG]", help="show this config's values instead of the defaults")
    return parser


def _add_interop(verbs: Any) -> None:
    about = "make a run of a Hugging Face model or a GGUF file"
    verb = verbs.add_parser("import", help=about, description=f"{about[0].upper()}{about[1:]}.")
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR",
        help="a folder with config.json, safetensors and a tokenizer, or a .gguf file",
    )  # fmt: skip
    verb.add_argument("--to", type=Path, required=True, metavar="RUN", help="the run's folder, which must not exist")
    verb.add_argument(
        "--dtype", default="", choices=("float32", "bfloat16"),
        help="of the parameters (default: as stored; float32 for float16, quantized and mixed weights)",
    )  # fmt: skip
    verb.add_argument(
        "--tokenizer", default="", metavar="PATH",
        help="the tokenizer's folder or file if it is not beside the weights, or none",
    )  # fmt: skip
    about = "write a run's model as a folder that transformers loads with from_pretrained"
    verb = verbs.add_parser("export", help=about, description=f"{about[0].upper()}{about[1:]}.")
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="RUN", help="a run, or one of its checkpoint folders"
    )
    verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="the new folder, which must not exist")
    verb.add_argument(
        "--family", default="", metavar="TYPE",
        help="the model_type to write, such as llama (default: as imported, or the first that can say the config)",
    )  # fmt: skip
    verb.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="begin a new file after this much (default: 5GB)"
    )


def _add_classify(verbs: Any) -> None:
    about = "train a document classifier or an n-gram model for the steps quality, toxicity and perplexity of prepare"
    verb = verbs.add_parser("classify", help=about, description=f"{about[0].upper()}{about[1:]}.")
    verb.add_argument(
        "--positive", type=Path, nargs="+", required=True, metavar="FILE",
        help="documents of the kind to be found: text files, or JSONL such as RUN/prepare/train/*.jsonl",
    )  # fmt: skip
    verb.add_argument("--negative", type=Path, nargs="+", default=[], metavar="FILE", help="other documents")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="where the model goes")
    verb.add_argument(
        "--kind", default="classifier", choices=("classifier", "ngram"),
        help="classifier (of two kinds of documents) or ngram (a model of one kind, for perplexity)",
    )  # fmt: skip
    verb.add_argument("--text-field", default="text", metavar="NAME", help="the field of JSONL rows (default: text)")
    verb.add_argument(
        "--seed", type=number(int, SEED), default=0, help="of the split into learning and measuring (default: 0)"
    )


def _add_plan(verbs: Any) -> None:
    about = "say whether a run fits a pod, what it sends and costs, with the real TPU compiler and no TPU"
    verb = verbs.add_parser(
        "plan", help=about, description=f"{about[0].upper()}{about[1:]}. GPUs are planned on paper.",
        epilog=CONFIG_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config; see below")
    verb.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v4, v5e, v5p, v6e, tpu7x, such as v5p:8x16x16; or h100:64",
    )
    verb.add_argument(
        "--slices", type=number(int, AT_LEAST_1), default=1, metavar="K", help="so many such slices (default: 1)"
    )
    verb.add_argument(
        "--price", type=number(float, AT_LEAST_0), metavar="USD", help="an hour of one chip (default: a list price)"
    )
    verb.add_argument("--search", action="store_true", help="try settings that may fit, or be faster, and rank them")
    verb.add_argument(
        "--trials",
        type=number(int, AT_LEAST_1),
        default=8,
        metavar="N",
        help="settings that --search tries (default: 8)",
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="also write the plan as JSON")
    verb.add_argument(
        "--save-executable", type=Path, metavar="FILE", help="write the compiled steps, for train.executable on the pod"
    )


def _interop(args: argparse.Namespace) -> int:
    if args.verb == "import":
        from llmjax.interop.read import import_model

        print(import_model(args.source, args.to, dtype=args.dtype, tokenizer=args.tokenizer))
    else:
        from llmjax.interop.write import export_model

        size = human.parse_size(args.shard_size)
        print(export_model(args.source, args.to, model_type=args.family, shard_bytes=size))
    return 0


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    if args.verb in ("import", "export"):
        return _interop(args)
    if args.verb == "rate":
        return eval_command.rate(args)
    if args.verb == "plan":
        from llmjax.scaling import command

        return command.run(
            config.load(args.config, overrides=overrides),
            topology=args.topology, slices=args.slices, price=args.price, trials=args.trials if args.search else 0,
            out=args.out, save=args.save_executable,
        )  # fmt: skip
    if args.verb == "classify":
        from llmjax.prepare import classify

        print(
            classify.run(
                args.positive, args.negative, out=args.out, kind=args.kind, text_field=args.text_field, seed=args.seed
            )
        )
        return 0
    if args.verb == "config":
        _print_settings(config.load(args.config, overrides=overrides) if args.config else config.base())
        return 0
    if args.verb == "report" and args.runs:
        from llmjax import report

        if len(args.runs) == 1 and args.workdir is None:
            args.workdir = args.runs[0]
        else:
            print(report.compare(args.runs, out=args.out or Path("runs/compare")))
            return 0
    c = _config(args, overrides)
    workdir = args.workdir or Path("runs") / c.name
    if args.verb == "eval" and args.tasks:
        return eval_command.tasks(c, workdir, args)
    if args.verb == "generate" and args.chat and not args.prompt and not args.prompts:
        raise UserError("--chat needs what is said to the model: --prompt TEXT or --prompts FILE")
    if args.verb == "generate" and (args.prompt or args.prompts):
        return infer_command.generate(c, workdir, args)
    if args.verb in ("chat", "bench-infer"):
        return (infer_command.chat if args.verb == "chat" else infer_command.bench)(c, workdir, args)
    if args.config and args.verb in ("run", "train") and (table := config.derivation(args.config)):
        print(table)
    from llmjax.stopping import Stopped

    processes.start(heartbeat_seconds=c.parallel.heartbeat_seconds)
    try:
        results = recipe.run(
            c, workdir, c.stages if args.verb == "run" else (args.verb,), again=getattr(args, "again", False)
        )
    except Stopped as stopped:
        if processes.is_first():
            print(f"llmjax: {stopped}")
        processes.end(0)
        return int(os.environ.get(processes.STOPPED, "0"))
    else:
        if args.verb == "prepare" and (unreadable := results.get("prepare/unreadable")):
            folder = workdir / "prepare" / "rejected"
            print(f"llmjax: {unreadable:,} documents could not be read; {folder} says why", file=sys.stderr)
            return 4
        if args.verb == "run" and processes.is_first():
            print(f"\nthe run is in {workdir}; its report: {workdir / 'report' / 'index.html'}")
    return 0


def _config(args: argparse.Namespace, overrides: Sequence[str]) -> config.ConfigDict:
    if args.config:
        return config.load(args.config, overrides=overrides)
    if args.workdir and (args.workdir / "config.json").is_file():
        return config.load(str(args.workdir / "config.json"), overrides=overrides)
    if args.workdir:
        raise UserError(
            f"{args.workdir} has no config.json, so it is not a run yet: give --config FILE, such as configs/quickstart.py"
        )
    raise UserError("give --config FILE, such as configs/quickstart.py, or --workdir with an existing run")


def _print_settings(c: config.ConfigDict) -> None:
    comments = config.comments()
    flat = config.flatten(c.to_dict())
    width = max(len(f"{key} = {value!r}") for key, value in flat.items() if len(repr(value)) < 24)
    for key in comments:  # in the order of the source
        value = flat[key]
        print(f"{f'{key} = {value!r}':<{width}}  {comments[key]}")


if __name__ == "__main__":
    script()
