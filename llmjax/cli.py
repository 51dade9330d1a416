"""The command: llmjax <verb> --config FILE[:arg] --config.key=value --workdir DIR."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from llmjax import config, recipe
from llmjax.agents import command as agents_command
from llmjax.apply import command as apply_command
from llmjax.config.chains import CHAIN
from llmjax.errors import Stopped, UserError
from llmjax.eval import command as eval_command
from llmjax.infer import command as infer_command
from llmjax.interop import command as interop_command
from llmjax.parallel import processes
from llmjax.persona import command as persona_command
from llmjax.post import command as post_command
from llmjax.prepare import command as prepare_command
from llmjax.recipe import chain
from llmjax.recipe.stages import STAGES
from llmjax.report import command as report_command
from llmjax.retrieve import command as retrieve_command
from llmjax.scaling import command as scaling_command
from llmjax.serve import command as serve_command
from llmjax.startup import timings
from llmjax.studio import command as studio_command
from llmjax.sweep import command as sweep_command
from llmjax.verb import Verb, check_paths
from llmjax.version import __version__

DESCRIPTION = """\
Build a language model, from raw text to a model you can prompt.

Each stage is a verb and leaves one folder in the run's folder (--workdir, by default runs/NAME). A stage that is done is
skipped. If a setting that it depends on changes, it and the stages after it run again. A training goes on from its last
checkpoint, also for longer or at another rate. Only --again replaces it with another training."""

EXAMPLES = """\
examples:
  llmjax run --config configs/quickstart.py                          the whole recipe: under 8 minutes on 2 cores
  llmjax run --config configs/quickstart.py --config.data.sources='["my_notes/"]' --workdir runs/notes
  llmjax run --config configs/models/gpt2.py:tiny --config.train.batch_size=8
  llmjax generate --workdir runs/quickstart --prompt 'def read_lines(path):'
  llmjax report runs/a runs/b                                        two runs side by side
  llmjax import --from SmolLM2-135M-Instruct/ --to runs/smollm2      a Hugging Face folder or a .gguf file becomes a run
  llmjax generate --workdir runs/smollm2 --chat --prompt 'Why is the sky blue?'
  llmjax chat --workdir runs/smollm2                                 talk with it
  llmjax serve --workdir runs/smollm2                                a server for OpenAI's clients, and a page to chat
  llmjax generate --workdir runs/smollm2 --prompts questions.jsonl --out answers.jsonl
  llmjax bench-infer --workdir runs/smollm2                          how fast it decodes
  llmjax export --from runs/quickstart --to exported/                a run becomes a folder that transformers loads
  llmjax eval --workdir runs/smollm2 --tasks openllm_v1_4 --data benchmarks/   the questions are read from files there
  llmjax rate a.jsonl b.jsonl --to ratings.jsonl                     which answer is better: a page on this machine
  llmjax plan --config configs/runs/llama2.py --topology v5p:8x8x8   does it fit, how fast is it, what does it cost
  llmjax sft --config configs/post/sft.py --config.train.init_from=runs/smollm2 --config.data.sources='["chats.jsonl"]'
  llmjax sweep --config configs/ablations/positions.py               arms with several seeds, against a control
  llmjax budget --chips v5p:128 --days 7                             which model that buys, and what it will cost
  llmjax laws points.csv --parameters N --tokens D --loss loss       a scaling law of many runs
  llmjax ask --db sales.sqlite 'Who bought most?'                    the SQL, which can only read, and its rows
  llmjax ask --docs papers/ 'What do they say of birds?'             an answer whose quotes were checked
  llmjax agent --tools tools.py 'Sort my notes'                      your functions, called within permissions and a budget
  llmjax mark runs/a runs/b --tag baseline --note 'three seeds'      tags and a note, shown by the studio and in reports
  llmjax studio runs                                                 curves, batches, samples and data of runs, on a page
  llmjax apply summarize --rows texts.jsonl --out summaries.jsonl    each sentence quotes the text
  llmjax persona --texts letters/ --name 'Ada Lovelace' --rights rights.json   a simulation that quotes its writings
  llmjax mcp --tools tools.py --docs my_notes/                       an MCP server for other programs
  llmjax config                                                      all settings and their meanings
"""

CONFIG_HELP = """\
settings:
  --config FILE[:ARG]        a Python file with get_config(arg), such as configs/quickstart.py, or a run's config.json;
                             without it, the config.json in --workdir
  --config.KEY=VALUE         change one setting, e.g. --config.train.batch_size=8 --config.data.sources='["a.txt","b/"]'
                             (`llmjax config` lists all of them)
"""


AGAIN = """\
let changed settings replace the training in WORKDIR, which moves to WORKDIR/before-N; run a single stage again even if
nothing changed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: done, or stopped and saved. 1: the machine failed. 2: a mistake of the user. 3: a plan that does not fit.
    4: prepared, except for documents that could not be read.
    """
    args, overrides = _parse(sys.argv[1:] if argv is None else argv)
    timings.start(asked="timings" in args)
    try:
        check_paths(args)
        links = _chain(args, overrides)
        c = next(iter(links.values())) if links else _config(args, overrides)
        status = VERBS[args.verb].run(args, c)
        if links:
            processes.start(heartbeat_seconds=c.parallel.heartbeat_seconds, start_seconds=c.parallel.start_seconds)
            given = {name: [o.partition("=")[0] for o in config.of_link(name, links, overrides)] for name in links}
            chain.run(links, args.workdir, given=given, again=args.again)
            status = _tell(args, {})
        elif status is None:
            if (
                args.config
                and (VERBS[args.verb].whole or args.verb == "train")
                and (table := config.derivation(args.config))
            ):
                print(table)
            processes.start(heartbeat_seconds=c.parallel.heartbeat_seconds, start_seconds=c.parallel.start_seconds)
            whole = VERBS[args.verb].whole
            stages = c.stages if whole else (args.verb,)
            results = recipe.run(c, args.workdir, stages, again=getattr(args, "again", False))
            status = _tell(args, results)
    except (Exception, KeyboardInterrupt) as error:
        if "traceback" in args or os.environ.get("LLMJAX_TRACEBACK"):
            raise
        ended = _explain(error, args)
        if ended is None:
            raise
        status = ended
    timings.show()
    processes.end(status)
    return status


def _tell(args: argparse.Namespace, results: recipe.Results) -> int:
    """Print where the results are; the exit status."""
    if args.verb == "prepare" and (unreadable := results.get("prepare/unreadable")):
        folder = args.workdir / "prepare" / "rejected"
        print(f"llmjax: {unreadable:,} documents could not be read; {folder} says why", file=sys.stderr)
        return 4
    if VERBS[args.verb].whole and processes.is_first():
        print(f"\nthe run is in {args.workdir}; its report: {args.workdir / 'report' / 'index.html'}")
    return 0


def _explain(error: BaseException, args: argparse.Namespace) -> int | None:
    """Print in a line how the command ended; the exit status, or None for a bug, which keeps its traceback."""
    new_folder = args.verb in ("import", "export")
    if isinstance(error, Stopped):
        if processes.is_first():
            print(f"llmjax: {error}")
        processes.end(0)
        return int(os.environ.get(processes.STOPPED, "0"))
    if isinstance(error, UserError):
        print(f"llmjax: {error}", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has ended: `llmjax config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = ". Free some space, or give another --workdir; the same command then goes on from what was saved"
            hint = ". Free some space, or give another --to; nothing was left there" if new_folder else hint
        print(f"llmjax: {error.strerror or error}{where}{hint}", file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        rest = "nothing was left" if new_folder else "the same command goes on from what was saved"
        print(f"\nllmjax: interrupted; {rest}", file=sys.stderr)
        return 130
    if isinstance(error, processes.FirstFailed):
        print(f"llmjax: process {processes.index()} ends, because the first did: {error}", file=sys.stderr)
        return 1
    if processes.count() == 1:
        return None
    traceback.print_exception(error)
    print(f"llmjax: {processes.explain(error)}", file=sys.stderr)
    return 1


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the settings as "key=value"."""
    words = list(argv)
    parser = _parser()
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if word.startswith("--config.") and "=" not in word and not following.startswith("-"):
            parser.error(f"{word} {following}: write {word}={following}, with = and without a space")
    args = parser.parse_args([word for word in words if not word.startswith("--config.")])
    return args, [word.removeprefix("--config.") for word in words if word.startswith("--config.")]


def _parser() -> argparse.ArgumentParser:
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS,
        help="show where in the code an error was raised (or set LLMJAX_TRACEBACK=1)",
    )  # fmt: skip
    everywhere.add_argument(
        "--timings", action="store_true", default=argparse.SUPPRESS,
        help="print at the end where the time went, phase by phase",
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        "llmjax",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n{CONFIG_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[everywhere],
    )
    parser.add_argument("--version", action="version", version=f"llmjax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        added = verbs.add_parser(
            name,
            help=verb.about,
            description=f"{verb.about[0].upper()}{verb.about[1:]}.{verb.after}",
            epilog=None if verb.config == "none" else CONFIG_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[everywhere],
        )
        if verb.config != "none":
            needed = verb.config == "file"
            added.add_argument("--config", metavar="FILE[:ARG]", required=needed, help="the config; see below")
        if verb.config == "run":
            added.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
        verb.add(added)
    return parser


def _chain(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, config.ConfigDict]:
    """The links of the chain that `llmjax run` is asked for; {}: it is no chain."""
    if args.verb != "run":
        return {}
    if args.config:
        links = config.load_chain(args.config, overrides=overrides) if config.is_chain(args.config) else {}
        args.workdir = args.workdir or (Path("runs") / Path(args.config.partition(":")[0]).stem if links else None)
        return links
    links = chain.read(args.workdir) if args.workdir and (args.workdir / CHAIN).is_file() else {}
    return {name: config.override(c, config.of_link(name, links, overrides)) for name, c in links.items()}


def _config(args: argparse.Namespace, overrides: Sequence[str]) -> config.ConfigDict:
    """The config that the arguments name; `args.workdir` becomes the folder of its run, and `args.named` is what was given."""
    verb = VERBS[args.verb]
    if verb.workdir and args.workdir is None:
        args.workdir = verb.workdir(args)
    args.named = getattr(args, "workdir", None)
    if verb.config == "none" and overrides:
        raise UserError(f"llmjax {args.verb} has no settings: leave --config.{overrides[0].partition('=')[0]} out")
    of_study = args.verb == "report" and len(args.runs) == 1 and (args.runs[0] / "study.json").is_file()
    if verb.config == "none" or of_study or (args.verb == "report" and len(args.runs) > 1):
        return config.base()
    if args.verb == "report" and args.runs and args.workdir is None:
        args.workdir = args.runs[0]
    if args.verb == "report" and args.workdir and (args.workdir / CHAIN).is_file():
        return config.base()
    if verb.config == "run" and args.workdir and args.verb != "report":
        args.workdir = config.run_of(args.workdir)
    if args.config:
        c = config.load(args.config, overrides=overrides)
        if c.train.inherit_model and not args.config.endswith(".json"):
            from llmjax.train import initial  # it imports jax

            c = initial.inherited(c, given=[override.partition("=")[0] for override in overrides])
    elif verb.config == "optional":
        return config.override(config.base(), overrides)
    elif args.workdir and (args.workdir / "config.json").is_file():
        c = config.load(str(args.workdir / "config.json"), overrides=overrides)
    elif args.workdir:
        raise UserError(
            f"{args.workdir} has no config.json, so it is not a run yet: give --config FILE, such as configs/quickstart.py"
        )
    else:
        raise UserError("give --config FILE, such as configs/quickstart.py, or --workdir with an existing run")
    if verb.config == "run":
        args.workdir = args.workdir or Path("runs") / c.name
    return c


def _add_again(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--again", action="store_true", help=AGAIN)


def _add_report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="two or more runs to compare side by side, or a study"
    )
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder of the comparison (default: runs/compare)")


def _report(args: argparse.Namespace, _: config.ConfigDict) -> int | None:
    """`llmjax report RUN RUN ...`, of a chain, or of a study; with one run the stage is to run."""
    if args.workdir and (args.workdir / CHAIN).is_file():
        chain.report(args.workdir)
        print(chain.table(args.workdir))
        return 0
    if len(args.runs) == 1 and (args.runs[0] / "study.json").is_file():
        from llmjax.sweep import cost, page

        cost.keep_off_accelerators()
        print(page.write(args.runs[0]))
        return 0
    if len(args.runs) < 2:
        return None
    from llmjax import report

    print(report.compare(args.runs, out=args.out or Path("runs/compare")))
    return 0


def _print_settings(_: argparse.Namespace, c: config.ConfigDict) -> int:
    comments = config.comments()
    flat = config.flatten(c.to_dict())
    width = max(len(f"{key} = {value!r}") for key, value in flat.items() if len(repr(value)) < 24)
    for key in comments:  # in the order of the source
        value = flat[key]
        print(f"{f'{key} = {value!r}':<{width}}  {comments[key]}")
    return 0


def _stages() -> dict[str, Verb]:
    """The recipe and its stages as verbs; some do more than run a stage."""
    more = {
        "eval": (eval_command.add_tasks, eval_command.tasks),
        "generate": (infer_command.add_generate, infer_command.generate),
        "report": (_add_report, _report),
    }
    about = "run the whole recipe (config.stages), or the recipes of a chain (get_chain)"
    found = {"run": Verb(about, _add_again, lambda args, c: None, whole=True)}
    for stage in STAGES:
        if stage.name in found:
            continue
        add, run = more.get(stage.name, (_add_again, lambda args, c: None))
        after = f" Needs {' and '.join(stage.needs)} to have run." if stage.needs else ""
        found[stage.name] = Verb(stage.about, add, run, after=after)
    return found


VERBS: dict[str, Verb] = {
    **_stages(),
    **interop_command.VERBS,
    **infer_command.VERBS,
    **serve_command.VERBS,
    **scaling_command.VERBS,
    **prepare_command.VERBS,
    **eval_command.VERBS,
    **post_command.VERBS,
    **retrieve_command.VERBS,
    **agents_command.VERBS,
    **apply_command.VERBS,
    **persona_command.VERBS,
    **sweep_command.VERBS,
    **studio_command.VERBS,
    **report_command.VERBS,
    "config": Verb(
        "list every setting, its value and its meaning", lambda verb: None, _print_settings, config="optional"
    ),
}
