"""The command `llmjax plan`. Imports are late, so that --help is quick."""

import argparse
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config.ranges import AT_LEAST_0, AT_LEAST_1, number
from llmjax.errors import UserError
from llmjax.verb import Verb


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="chips and their number: v4, v5e, v5p, v6e or tpu7x with the shape of a slice, such as v5p:8x16x16; or h100:64",
    )
    verb.add_argument(
        "--slices", type=number(int, AT_LEAST_1), default=1, metavar="K", help="the number of slices (default: 1)"
    )
    verb.add_argument(
        "--price",
        type=number(float, AT_LEAST_0),
        metavar="USD",
        help="price of one chip for an hour (default: the list price)",
    )
    verb.add_argument("--paper", action="store_true", help="plan by formula, without the compiler (GPUs: always)")
    verb.add_argument("--search", action="store_true", help="try settings that may fit or be faster, and rank them")
    verb.add_argument(
        "--trials", type=number(int, AT_LEAST_1), default=8, metavar="N",
        help="how many settings --search tries (default: 8)",
    )  # fmt: skip
    verb.add_argument("--out", type=Path, metavar="FILE", help="also write the plan as JSON")
    verb.add_argument(
        "--save-executable",
        type=Path,
        metavar="FILE",
        help="write the compiled steps to FILE, for train.executable on the pod",
    )


def run(args: argparse.Namespace, c: ConfigDict) -> int:
    """Print the plan of a config: exit status 0 if it fits, 3 if not.

    Raises UserError for an impossible topology, mesh or batch.
    """
    from llmjax.scaling import render
    from llmjax.scaling.plan import make_plan, write
    from llmjax.scaling.search import best, search
    from llmjax.scaling.topology import compiler_lock, parse_topology

    pods = parse_topology(args.topology, slices=args.slices)
    out, save = args.out, args.save_executable
    if args.search and save is not None:
        raise UserError(
            "--search and --save-executable exclude each other: search first, then save the steps of one config"
        )
    if args.search:
        with compiler_lock() if pods.chip.torus and not args.paper else nullcontext():
            tried = search(c, pods, trials=args.trials, price=args.price, paper=args.paper)
        print(render.render_search(tried))
        found = best(tried)
        if found is None:
            print("\nno setting that was tried fits: try more chips, a smaller batch or a shorter sequence")
            return 3
        changes, plan = found
        print(f"\nthe fastest that fits{' (as it is)' if not changes else ''}:\n")
    else:
        if pods.chip.torus and not args.paper:
            print("compiling: seconds for small models, minutes for large ones", file=sys.stderr)
        plan = make_plan(c, pods, price=args.price, save=save, paper=args.paper)
    print(render.render(plan))
    if not plan["fits"]:
        print("\nadd --search to try what would fit: rematerialisation, more fsdp, smaller micro-batches, ...")
    if out is not None:
        write(plan, out)
        print(f"\nwritten: {out}")
    if save is not None:
        print(f"\nwritten: {save}; use it with --config.train.executable={shlex.quote(str(save))}")
    return 0 if plan["fits"] else 3


VERBS = {
    "plan": Verb(
        "predict memory, communication, time and cost of a run on a pod, with the real TPU compiler and no TPU",
        _add, run, config="file", after=" For GPUs the numbers are by formula.",
    ),
}  # fmt: skip
