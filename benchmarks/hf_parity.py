"""Outputs of every Hugging Face family beside those of transformers: writes results/hf_parity.json, a row for each family.

    python benchmarks/hf_parity.py                   all families; needs torch and transformers
    python benchmarks/hf_parity.py llama gpt2        these rows alone are made again

Tiny random models in float32 (tests/hf.py), each variant with several seeds on long texts and with the first seed on
short ones: full rows, rows padded on the left and on the right, and single tokens. Decoders also write a text with a cache,
always the likeliest token. About half an hour on 2 cores.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import command, make_parser, write

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from hf import Case, compare, greedy_texts  # noqa: E402
from hf_decoders import DECODERS  # noqa: E402
from hf_encoders import ENCODERS  # noqa: E402

SEEDS = (0, 1, 2)
SHORT = (1, 40)  # tokens; for the first seed
TOLERANCE = 1e-4


def measure(case: Case) -> list[dict[str, Any]]:
    """All comparisons of a variant."""
    runs = [(seed, case.length) for seed in SEEDS] + [(SEEDS[0], length) for length in SHORT]
    found = []
    for seed, length in runs:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(case, Path(folder), seed=seed, length=length))
    worst = max(one["difference"] for one in found)
    same = all(one["same_argmax"] for one in found)
    print(f"{case.name:32} {worst:.1e} {'same argmax' if same else 'another argmax'}", flush=True)
    return found


def greedy(case: Case) -> bool:
    """Whether both sides write the same text."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = greedy_texts(case, Path(folder), seed=SEEDS[0])
    print(f"{case.name:32} {'same text' if ours == theirs else f'another text: {ours} and {theirs}'}", flush=True)
    return ours == theirs


def row(family: str, cases: list[Case]) -> dict[str, Any]:
    """What the table says of a family."""
    found = [one for case in cases for one in measure(case)]
    texts = [greedy(case) for case in cases if case in DECODERS]
    return {
        "family": family,
        "variants": [case.variant for case in cases],
        "seeds": len(SEEDS),
        "lengths": sorted({*SHORT, *(case.length for case in cases)}),
        "comparisons": len(found),
        "outputs_compared": sum(one["outputs"] for one in found),
        "largest_difference": max(one["difference"] for one in found),
        "same_argmax": all(one["same_argmax"] for one in found),
        "smallest_standard_deviation": min(one["deviation"] for one in found),
        "greedy_texts": len(texts),
        "same_greedy_texts": all(texts),
        "command": command(),
    }


def main() -> None:
    parser = make_parser(__doc__, out=ROOT / "results" / "hf_parity.json")
    parser.add_argument("families", nargs="*", help="such as llama; default: all")
    args = parser.parse_args()
    families: dict[str, list[Case]] = {}
    for case in (*DECODERS, *ENCODERS):
        families.setdefault(case.family, []).append(case)
    if unknown := set(args.families) - families.keys():
        raise SystemExit(f"no families {', '.join(sorted(unknown))}; there are {', '.join(families)}")
    with tempfile.TemporaryDirectory() as cache:  # the seeds of a variant are one program
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        rows = [row(name, families[name]) for name in args.families or families]
    print(f"\n{'family':14} {'variants':>8} {'difference':>10} argmax")
    for one in rows:
        argmax = "same" if one["same_argmax"] else "another"
        print(f"{one['family']:14} {len(one['variants']):8} {one['largest_difference']:10.1e} {argmax}")
    made = {one["family"]: one for one in rows}
    if args.out is not None and args.families and args.out.is_file():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        made = {one["family"]: {"command": before["command"], **one} for one in before["rows"]} | made
    write({"tolerance": TOLERANCE, "rows": [made[name] for name in families if name in made]}, args.out)
    if any(
        one["largest_difference"] > TOLERANCE or not one["same_argmax"] or not one["same_greedy_texts"] for one in rows
    ):
        raise SystemExit(f"a family differs by more than {TOLERANCE:.0e}, in its argmax or in its text")


if __name__ == "__main__":
    main()
