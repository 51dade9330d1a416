"""The verb `plan`: from the command line's words to what it prints and writes."""

import sys
from contextlib import nullcontext
from pathlib import Path

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.scaling import render
from llmjax.scaling.plan import make_plan, write
from llmjax.scaling.search import best, search
from llmjax.scaling.topology import compiler_lock, parse_topology


def run(
    c: ConfigDict,
    *,
    topology: str,
    slices: int = 1,
    price: float | None = None,
    trials: int = 0,
    out: Path | None = None,
    save: Path | None = None,
) -> int:
    """Print the plan of a config; the exit status: 0 it fits, 3 it does not.

    Args:
        trials: settings to try (`--search`); 0: the config alone.
        out: where the plan is written as JSON.
        save: where the compiled steps are written.

    Raises UserError for a topology, a mesh or a batch that cannot be.
    """
    pods = parse_topology(topology, slices=slices)
    if trials and save is not None:
        raise UserError("--search and --save-executable: choose settings first, then save the steps of one config")
    if trials:
        with compiler_lock() if pods.chip.torus else nullcontext():
            tried = search(c, pods, trials=trials, price=price)
        print(render.render_search(tried))
        found = best(tried)
        if found is None:
            print("\nnothing that was tried fits: more chips, a smaller batch or a shorter sequence may")
            return 3
        changes, plan = found
        print(f"\nthe fastest that fits{' (as it is)' if not changes else ''}:\n")
    else:
        if pods.chip.torus:
            print("compiling: seconds for small models, minutes for large ones", file=sys.stderr)
        plan = make_plan(c, pods, price=price, save=save)
    print(render.render(plan))
    if not plan["fits"]:
        print("\nadd --search to try what would fit: rematerialisation, more fsdp, smaller micro-batches, ...")
    if out is not None:
        write(plan, out)
        print(f"\nwritten: {out}")
    if save is not None:
        print(f"\nwritten: {save}, to be used as --config.train.executable={save}")
    return 0 if plan["fits"] else 3
