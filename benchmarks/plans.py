"""Plans of famous runs: does each fit its pod, what does it need, and how far is the estimate from the published figure?

    python benchmarks/plans.py [NAME ...] [--folder results/plans] [--table]
    python benchmarks/plans.py --variants [RUN/VARIANT ...]

Every plan is `llmjax plan` in a process of its own (one at a time holds the TPU's compiler) and is kept as
results/plans/NAME.json. table.md is made of all plans and variants that are there (`--table` plans nothing and only makes
the table). `--variants` plans the same runs with other options of the compiler, meshes, policies and batches, without the
measurement of held-out text: each adds a row to variants.json when it ends, and the script skips variants with a row.
Estimates are rooflines: the peak FLOP/s, the bandwidths and nothing else. Published numbers are measurements. Where
authors did not give MFU, it is computed here from what they gave, with 6 FLOPs a parameter and token.
"""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine

ROOT = Path(__file__).parent.parent
TIERING = "MaxText documentation, models/tiering"


@dataclass(frozen=True)
class Run:
    """A run, where it is planned, and what is known of it."""

    spec: str  # of configs/runs
    topology: str
    slices: int = 1
    published: float | None = None  # MFU
    source: str = ""
    why: str = ""  # the published number differs from the estimate


RUNS = {
    "gpt3-v4": Run("gpt3.py", "v4:8x8x16", why="not published on this chip"),
    "gpt3-a100": Run(
        "gpt3.py:a100", "a100:1024", 1, 6 * 174.6e9 * 300e9 / (1024 * 312e12 * 34 * 86400),
        "Narayanan et al. 2021: 300B tokens in 34 days",
        "products do not reach the peak; Megatron waits for its all-reduces and recomputes everything",
    ),
    "palm": Run(
        "palm.py", "v4:12x16x16", 2, 0.462, "Chowdhery et al. 2022, table 3",
        "everything is recomputed here, and gathers over fsdp in four micro-batches are waited for; 57.8% of the peak was "
        "reached there with what is recomputed",
    ),
    "falcon": Run(
        "falcon.py", "a100-40gb:384", 1, 6 * 40e9 * 1e12 / (384 * 312e12 * 61 * 86400),
        "the model's card: 1T tokens in two months, interruptions included",
        "two months hold interruptions and the ramp of the batch; the nodes' network is 50 Gb/s a GPU",
    ),
    "chinchilla": Run("chinchilla.py", "v4:8x8x16", why="neither chips nor MFU were published"),
    "llama1-a100": Run(
        "llama1.py", "a100:2048", 1, 380 * 6 * 65.2e9 / 312e12, "Touvron et al. 2023: 380 tokens/s a GPU",
        "products do not reach the peak; gathering 65B parameters over 128 GPUs is not free",
    ),
    "llama1-v5p": Run("llama1.py", "v5p:8x16x16", why="not published on this chip"),
    "phi1-a100": Run(
        "phi1.py", "a100:8", 1, 24_000 * 1024 * 2048 * 6 * 1.3e9 / (8 * 312e12 * 4 * 86400),
        "Gunasekar et al. 2023: 24,000 steps in under four days",
        "small matrices reach less of the peak; the published time is an upper bound",
    ),
    "phi1-v5e": Run("phi1.py", "v5e:4x4", why="not published on this chip"),
    "llama2-v5p": Run(
        "llama2.py", "v5p:8x8x8", 1, 0.654, TIERING, "no options of the compiler here, so gathers are waited for, 2.3 of 10.5 s; "
        "the published shape, policy and options are in variants.json",
    ),
    "mixtral-v5p": Run(
        "mixtral.py", "v5p:4x8x8", 1, 0.5256, TIERING, "no options of the compiler here, so gathers are waited for, 1.5 of 6.1 s, and 2 rows of a chip "
        "share a gather where the published row has 36",
    ),
    "trillion-v5p": Run(
        "trillion.py", "v5p:8x16x16", 1, 0.648, "MaxText's configs for v5p: 1024B parameters, another shape",
        "another shape; gathers over fsdp are waited for here; flags of the published run are not known",
    ),
    "trillion-a100": Run(
        "trillion.py:a100", "a100:3072", 1, 163e12 / 312e12 * 6 / 8,
        "Narayanan et al. 2021: 163 TFLOP/s with recomputation, a quarter of it",
        "products do not reach the peak; Megatron waits for its all-reduces and recomputes everything",
    ),
}  # fmt: skip


# RUN -> what was published: tokens a second a chip by MaxText, MFU by PaLM's authors
PUBLISHED = {"llama2": "692", "mixtral": "2,909", "palm": "MFU 46.2%"}
LLAMA_BEST = "llama2/published shape, overlap, gathers, barriers"
# RUN/VARIANT -> config, topology, slices, changes
LLAMA, LLAMA_ROW = ("llama2.py", "v5p:8x8x8", 1), ("llama2.py:maxtext", "v5p:4x8x8", 1)
MIXTRAL, MIXTRAL_ROW = ("mixtral.py", "v5p:4x8x8", 1), ("mixtral.py:maxtext", "v5p:4x4x8", 1)
PALM, PALM_FEATURES = ("palm.py", "v4:12x16x16", 2), ("palm.py:features", "v4:12x16x16", 2)
OVERLAP = "parallel.compiler=('overlap',)"
FUSED = "model.barriers=False"
VMEM = "parallel.compiler=('overlap','gathers','xla_tpu_scoped_vmem_limit_kib=98304')"
UNFUSED = "parallel.compiler=('overlap','gathers','xla_tpu_enable_async_collective_fusion=false')"
VARIANTS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "llama2/as it was": (*LLAMA, ()),
    "llama2/as it was, overlap": (*LLAMA, (OVERLAP,)),
    "llama2/published shape, no options": (*LLAMA_ROW, ("parallel.compiler=()", FUSED)),
    "llama2/published shape, overlap, gathers": (*LLAMA_ROW, (FUSED,)),
    "llama2/published shape, overlap, gathers, 96 MiB of vmem": (*LLAMA_ROW, (VMEM, FUSED)),
    LLAMA_BEST: (*LLAMA_ROW, ()),
    "llama2/published shape, overlap but for fusions, gathers, barriers": (*LLAMA_ROW, (UNFUSED,)),
    "mixtral/as it was": (*MIXTRAL, ()),
    "mixtral/published types, 24 rows, overlap, gathers": (*MIXTRAL_ROW, ()),
    "mixtral/published shape, overlap, gathers": (*MIXTRAL_ROW, ("train.batch_size=4608",)),
    "palm/as it was": (*PALM, ()),
    "palm/features, no accumulation, save_qkv_proj, overlap, gathers": (*PALM_FEATURES, ()),
}


def variant(key: str, folder: Path) -> None:
    """Plan one variant, and add its row."""
    spec, topology, slices, changes = VARIANTS[key]
    out = folder / ".variant.json"
    command = [
        "llmjax", "plan", "--config", f"configs/runs/{spec}", "--topology", topology, "--slices", str(slices),
        *(f"--config.{change}" for change in (*changes, "train.eval_every=0 steps")),
    ]  # fmt: skip
    print("$", shlex.join(command), flush=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--out", str(out)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {"variant": key, "command": shlex.join(command)}
    if done.returncode in (0, 3):
        row |= measured(json.loads(out.read_text()))
        out.unlink()
    else:
        row["error"] = done.stderr.strip().splitlines()[-1][:500]
    row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row["wall_seconds"] = time.perf_counter() - start
    keep(row, folder)


def measured(made: dict[str, Any]) -> dict[str, Any]:
    """What a variant's row says of its plan."""
    row = {
        "made_by": made["made_by"], "compiler_options": made["compiler_options"], "fits": made["fits"],
        "gib": made["memory"]["peak"] / 2**30, "available_gib": made["available"] / 2**30,
    }  # fmt: skip
    if "seconds" not in made:
        return row
    compiler = made["seconds"]["compiler"]
    return row | {
        "tokens_per_second_per_chip": made["tokens_per_step"] / compiler / made["chips"],
        "mfu_by_compiler": made["mfu_by_compiler"], "mfu": made["mfu"], "seconds": made["seconds"],
        "recomputed": made["flops"]["recomputed"] / made["flops"]["model"],
        "collectives": [one for one in made["collectives"] if one["seconds"] > 0.005 * compiler],
        "work": made["work"][:12],
    }  # fmt: skip


def keep(row: dict[str, Any], folder: Path) -> None:
    """Add a row, in the place of an earlier one of the same variant."""
    kept = [one for one in read_variants(folder) if one["variant"] != row["variant"]]
    (folder / "variants.json").write_text(json.dumps([*kept, row], indent=1) + "\n")


def read_variants(folder: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    path = folder / "variants.json"
    return json.loads(path.read_text()) if path.exists() else []


def plan(name: str, folder: Path) -> None:
    """Plan one run and keep what comes out."""
    run, out = RUNS[name], folder / f"{name}.json"
    command = [
        "llmjax", "plan", "--config", f"configs/runs/{run.spec}", "--topology", run.topology,
        *(["--slices", str(run.slices)] if run.slices > 1 else []), "--out", str(out),
    ]  # fmt: skip
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "llmjax", *command[1:]], cwd=ROOT, check=False)
    if done.returncode not in (0, 3):
        print(f"{name}: failed with status {done.returncode}")
        return
    made = json.loads(out.read_text())
    made["command"] = " ".join(command).replace(str(ROOT) + "/", "")
    made["wall_seconds"] = time.perf_counter() - start
    made["machine"] = machine()
    made["published"] = {"mfu": run.published, "source": run.source}
    out.write_text(json.dumps(made, indent=1) + "\n")


def gib(size: float) -> str:
    """Binary gigabytes."""
    return f"{size / 2**30:.1f}"


def percent(share: float | None) -> str:
    """A share for the table."""
    return "" if share is None else f"{share:.1%}"


def row(name: str, made: dict[str, Any]) -> list[str]:
    """One run's cells."""
    known = RUNS[name]
    sent = sum(one["sent"] for one in made.get("collectives", ()))
    run = made.get("run", {})
    on = made.get("machine", {"load": made.get("load_average"), "cores": made.get("cores")})  # of older plans
    busy = " (load not recorded)"
    if on["load"] is not None:
        busy = f" (load {on['load']:.0f} on {on['cores']} cores)" if on["load"] > 1.5 * on["cores"] else ""
    return [
        made["config"],
        made["topology"],
        " ".join(f"{axis}={size}" for axis, size in made["mesh"].items()),
        "yes" if made["fits"] else f"no, by {gib(made['over_by'])}",
        f"{gib(made['memory']['peak'])} of {gib(made['available'])}",
        gib(made["on_paper"]["memory"]["peak"]) if made["exact"] else "(is on paper)",
        f"{made['seconds_to_compile']:.0f} s{busy}" if "seconds_to_compile" in made else "",
        f"{sent / 1e9:.0f}" if sent else "",
        percent(made.get("mfu")),
        percent(made.get("mfu_by_compiler")),
        f"{known.published:.1%} ({known.source})" if known.published else "",
        f"{run['days']:.0f}" if run else "",
        known.why,
    ]


HEADER = [
    "run", "pod", "mesh", "fits", "GiB a chip", "on paper", "compiled in", "GB sent a step", "MFU, roofline",
    "MFU, compiler's cycles", "MFU, published", "days", "why they differ",
]  # fmt: skip


VARIANT_HEADER = [
    "run and variant", "pod", "GiB a chip", "tokens/s a chip, compiler's cycles", "published", "MFU, compiler's cycles",
    "step, s", "waited for, s", "computed again",
]  # fmt: skip


def variant_row(made: dict[str, Any]) -> list[str]:
    """One variant's cells."""
    _, topology, slices, _ = VARIANTS[made["variant"]]
    if "seconds" not in made:
        found = made.get("error") or f"does not fit: {made['gib']:.1f} of {made['available_gib']:.1f} GiB"
        return [made["variant"], topology, "", found, *[""] * 5]
    return [
        made["variant"],
        f"{topology}, {slices} slices" if slices > 1 else topology,
        f"{made['gib']:.1f} of {made['available_gib']:.1f}",
        f"{made['tokens_per_second_per_chip']:,.0f}",
        PUBLISHED[made["variant"].partition("/")[0]],
        percent(made["mfu_by_compiler"]),
        f"{made['seconds']['compiler']:.2f}",
        f"{made['seconds']['exposed']:.2f}",
        percent(made["recomputed"]),
    ]


def markdown(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table, as lines."""
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(cells)} |" for cells in rows)]


def table(folder: Path) -> str:
    """The Markdown tables of all plans and variants that were kept."""
    kept = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS if (folder / f"{name}.json").is_file()
    }
    lines = markdown(HEADER, (row(name, made) for name, made in kept.items()))
    errors = [
        made["on_paper"]["memory"]["peak"] / made["memory"]["peak"] - 1
        for made in kept.values()
        if made["exact"] and made["memory"]["peak"]
    ]
    if errors:
        lines += [
            "",
            f"Memory by formula against the compiler's, {len(errors)} plans: median error {statistics.median(errors):+.0%}, "
            f"from {min(errors):+.0%} to {max(errors):+.0%}.",
        ]
    there = {one["variant"]: one for one in read_variants(folder)}
    rows = [variant_row(there[key]) for key in VARIANTS if key in there]
    if rows:
        lines += ["", "Variants (`python benchmarks/plans.py --variants RUN/VARIANT`, kept in variants.json):", ""]
        lines += markdown(VARIANT_HEADER, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plan, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "plans")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    parser.add_argument("--variants", action="store_true", help="plan variants that are not there yet")
    args = parser.parse_args()
    known: Iterable[str] = VARIANTS if args.variants else RUNS
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.variants:
        there = {row["variant"] for row in read_variants(args.folder) if "error" not in row}
        for key in args.names or [key for key in VARIANTS if key not in there]:
            variant(key, args.folder)
    for name in [] if args.table or args.variants else args.names or RUNS:
        plan(name, args.folder)
    (args.folder / "table.md").write_text(table(args.folder))
    print(table(args.folder))


if __name__ == "__main__":
    main()
