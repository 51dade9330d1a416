"""The commands `llmjax eval --tasks` and `llmjax rate`. Imports are late, so that --help is quick."""

import argparse
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_0, SEED, Range, number
from llmjax.errors import UserError
from llmjax.verb import Verb


def add_tasks(verb: argparse.ArgumentParser) -> None:
    """Add the arguments with which `llmjax eval` runs benchmarks in place of its stage."""
    verb.add_argument(
        "--tasks", metavar="NAME,...",
        help="run these benchmarks instead of the stage: arc_challenge, hellaswag, mmlu, truthfulqa_mc2, winogrande, gsm8k, humaneval, "
        "mbpp, openllm_v1_4, openllm_v1_6, or any task of lm-evaluation-harness",
    )  # fmt: skip
    verb.add_argument(
        "--data", action="append", default=[], metavar="DIR", help="a folder with the questions; may be repeated"
    )
    verb.add_argument(
        "--limit",
        type=number(int, AT_LEAST_0),
        default=0,
        metavar="N",
        help="ask at most N questions of each task (default: all)",
    )
    verb.add_argument("--harness", action="store_true", help="run all tasks with lm-evaluation-harness")
    verb.add_argument("--chat-template", action="store_true", help="give the questions as messages of a user")
    verb.add_argument(
        "--allow-code-execution", action="store_true",
        help="let humaneval and mbpp run programs of the model, in the sandbox that llmjax/eval/sandbox.py describes",
    )  # fmt: skip


def _add_rate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "answers", nargs="*", type=Path, metavar="FILE",
        help="two or more JSONL files with prompt and text, one for each system; or one with prompt, answers and systems",
    )  # fmt: skip
    verb.add_argument(
        "--to",
        type=Path,
        default=Path("ratings.jsonl"),
        metavar="FILE",
        help="append the ratings here (default: ratings.jsonl)",
    )
    verb.add_argument(
        "--terminal", metavar="NAME", default="", help="rate in the terminal, as NAME, instead of in a browser"
    )
    verb.add_argument(
        "--port",
        type=number(int, Range(0, 65535)),
        default=0,
        help="port of the page on 127.0.0.1 (default: a free one)",
    )
    verb.add_argument(
        "--judge", type=Path, metavar="RUN", help="let the chat model of this run rate each pair, in both orders"
    )
    verb.add_argument("--rank", action="store_true", help="show all answers to a prompt together, to be ranked")
    verb.add_argument(
        "--scores", default="", metavar="NAME,...",
        help="rank, and ask for scores from 1 to 5: fluency, coherence, relevance, helpfulness, honesty, harm, or all of them",
    )  # fmt: skip
    verb.add_argument("--seed", type=number(int, SEED), default=0, help="seed of the order in which answers are shown")


def _rate(args: argparse.Namespace, _: ConfigDict) -> int:
    from llmjax.eval import rate as rating
    from llmjax.eval import ratings

    if not args.answers:
        found = ratings.read(args.to)
        if not found:
            raise UserError(f"{args.to} has no ratings yet: give files with answers to rate")
        print(ratings.summary(found))
        return 0
    scales = ratings.SCALES if args.scores == "all" else tuple(name for name in args.scores.split(",") if name)
    if unknown := set(scales) - set(ratings.SCALES):
        raise UserError(f"--scores {', '.join(sorted(unknown))}: give all, or of {', '.join(ratings.SCALES)}")
    if args.judge and (args.rank or scales):
        raise UserError("a judge compares pairs: leave --rank and --scores out")
    pairs = ratings.read_pairs(args.answers, together=args.rank or bool(scales))
    session = rating.Session(pairs, args.to, seed=args.seed, scales=scales)
    if args.judge:
        from llmjax.eval import judge
        from llmjax.infer.language_model import load
        from llmjax.progress import counter

        name = f"judge {args.judge.name}"
        left = [pair for pair in session.pairs if not session.is_rated(name, pair)]
        shown = counter("judging", " pairs")
        verdicts = 0
        for number, made in enumerate(judge.judge(left, judge.ask_model(load(args.judge)), rater=name), 1):
            ratings.append(args.to, made)
            verdicts += made.choice is not None
            if shown is not None:
                shown(number, len(left))
        if left and not verdicts:
            print(f"{name} gave no verdict ([[A]], [[B]] or [[C]]) on any pair: use a model that follows instructions")
        print(ratings.summary(ratings.read(args.to)))
    elif args.terminal:
        rating.in_terminal(session, rater=args.terminal)
    else:
        rating.serve(session, port=args.port)
    return 0


def tasks(args: argparse.Namespace, c: ConfigDict) -> int | None:
    """With --tasks run benchmarks on the model of a run, which needs no stages (an imported model has none)."""
    if not args.tasks:
        return None
    from llmjax.eval import tasks as benchmarks
    from llmjax.infer.language_model import load
    from llmjax.startup.cache import cache_of

    c = c.copy_and_resolve_references()
    with c.unlocked():
        c.eval.tasks = tuple(name for name in args.tasks.split(",") if name)
        c.eval.data = tuple(args.data) or c.eval.data
        c.eval.limit = args.limit or c.eval.limit
        c.eval.runner = "harness" if args.harness else c.eval.runner
        c.eval.chat = args.chat_template or c.eval.chat
    model = load(args.workdir, mesh=c.infer.mesh, cache=cache_of(c))
    benchmarks.run(c, model, args.workdir, allow_code_execution=args.allow_code_execution)
    print(f"the scores are in {args.workdir / 'eval' / benchmarks.SCORES}")
    return 0


VERBS = {
    "rate": Verb(
        "let people or a model compare answers of two systems, without their names and in random order",
        _add_rate, _rate, config="none",
    ),
}  # fmt: skip
