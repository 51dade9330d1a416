"""The verb `coordcheck`: a few steps at several widths or depths, and whether activations move alike. Imports are late."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from llmjax.config.ranges import ABOVE_0, AT_LEAST_1, number
from llmjax.errors import UserError
from llmjax.verb import Verb

if TYPE_CHECKING:
    from llmjax.sweep.coordcheck import Check

WIDTHS = (64, 128, 256, 512)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers: write 64,128,256") from None
    if len(found) < 2 or found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give two sizes or more, of at least 1")
    return found


def _add(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--workdir", type=Path, metavar="DIR", help="the check's folder (default: runs/NAME-coordcheck)")
    over = verb.add_mutually_exclusive_group()
    over.add_argument(
        "--widths", type=_sizes, default=WIDTHS, metavar="N,N,...",
        help="model.width; heads and inner widths grow with it (default: 64,128,256,512)",
    )  # fmt: skip
    over.add_argument("--layers", type=_sizes, metavar="N,N,...", help="check over model.layers instead")
    verb.add_argument("--steps", type=number(int, AT_LEAST_1), default=5, metavar="N", help="steps (default: 5)")
    verb.add_argument(
        "--seeds", type=number(int, AT_LEAST_1), default=3, metavar="N", help="starts that are averaged (default: 3)"
    )
    verb.add_argument(
        "--limit", type=number(float, ABOVE_0), default=0.25, metavar="X",
        help="the largest slope, either way, of a place that holds (default: 0.25)",
    )  # fmt: skip


def run(args: argparse.Namespace, c: ConfigDict) -> int:
    """Check, print and write the page. Exit status 0: every place holds; 1: some place grows or vanishes."""
    from llmjax import recipe, storage
    from llmjax.sweep import coordcheck
    from llmjax.train import pretrain

    over, sizes = ("layers", args.layers) if args.layers else ("width", args.widths)
    folder = args.workdir or Path("runs") / f"{c.name}-coordcheck"
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} is a training: give another --workdir, for text and tokenizer of the check")
    c = c.copy_and_resolve_references()
    with c.unlocked():
        c.train.batch_ramp = "0 steps"
    pretrain.start_devices(c)
    recipe.run(c, folder, ("prepare", "tokenizer"))
    c, batches = pretrain.first_batches(c, folder, count=args.steps + 1)
    found = coordcheck.check(c, batches, over=over, sizes=sizes, seeds=args.seeds, limit=args.limit)
    print(f"\n{described(found, c)}")
    where = folder / f"{c.model.init}-{c.optimizer.name}-{over}"
    about = {"init": c.model.init, "optimizer": c.optimizer.name, "seeds": args.seeds}
    storage.write_json(where / "results.json", about | found.as_json())
    print(f"the page: {write_page(found, c, where)}")
    return 0 if found.holds else 1


def described(found: "Check", c: ConfigDict) -> str:
    """The slopes and verdicts, and what they say together."""
    from llmjax.sweep.comparison import aligned

    lines = [aligned(table(found)), f"loss of the last batch: {_by_size(found, found.loss)}", conclusion(found, c)]
    return "\n".join(lines)


def table(found: "Check") -> list[tuple[str, ...]]:
    """A row for each place, with a header."""
    header = ("place", *(f"{found.over} {size}" for size in found.sizes), "slope", "of the size", "")
    rows = [
        (
            place.name, *(f"{by_step[-1]:.3g}" for by_step in place.change), f"{place.slope:+.2f}",
            f"{place.value_slope:+.2f}", place.verdict,
        )
        for place in found.places
    ]  # fmt: skip
    return [header, *rows]


def conclusion(found: "Check", c: ConfigDict) -> str:
    """In a sentence."""
    bad = [place.name for place in found.places if place.verdict != "holds"]
    how = f"model.init={c.model.init} under {c.optimizer.name}"
    if not bad:
        return f"{how} holds over {found.over}: what {found.steps} steps change does not depend on it"
    mend = "" if c.model.init in ("mup", "completep") else "; model.init=mup or completep are made for it"
    return f"{how} does not hold over {found.over}: {', '.join(bad)}{mend}"


def _by_size(found: "Check", values: Any) -> str:
    shown = (f"{value:.4f}" if math.isfinite(value) else "not finite" for value in values)
    return ", ".join(f"{value} at {size}" for value, size in zip(shown, found.sizes, strict=True))


def write_page(found: "Check", c: ConfigDict, folder: Path) -> Path:
    """FOLDER/index.html and report.md, and return the first."""
    import numpy as np

    from llmjax.report import page
    from llmjax.report.curves import Curve
    from llmjax.report.plots import Line, draw

    sizes, plots = np.array(found.sizes, np.float64), []
    for number_, place in enumerate(found.places):
        lines = []
        for step in range(1, found.steps + 1):
            values = np.array([by_step[step] for by_step in place.change])
            lines.append(Line(f"step {step}", Curve(sizes, values, values, values), step - 1, points=True))
        svg = draw(f"place{number_}", lines[-8:], y_label="mean absolute change", log_y=True, x_label=found.over, sizes=found.sizes)  # fmt: skip
        plots.append({"title": f"{place.name}: {place.verdict}, slope {place.slope:+.2f}", "svg": svg, "wide": False})
    header, *rows = table(found)
    story = {
        "name": c.name, "over": found.over, "steps": found.steps, "header": header, "rows": rows,
        "conclusion": conclusion(found, c), "loss": _by_size(found, found.loss), "plots": plots,
    }  # fmt: skip
    return page.write(folder, template="coordcheck", story=story)[0]


VERBS = {
    "coordcheck": Verb(
        "take a few steps at several widths or depths: do activations move alike (muP, CompleteP)?", _add, run,
        config="file",
    ),
}  # fmt: skip
