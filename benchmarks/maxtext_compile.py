"""MaxText's own compile of Llama 2 70B for 256 chips of v5p, read by our reader of compiled programs.

    python3.12 -m venv maxtext && maxtext/bin/pip install 'maxtext[tpu]'
    python benchmarks/maxtext_compile.py --python maxtext/bin/python --kept DIR [--out results/maxtext_compile.json]

Runs MaxText's `train_compile` with the settings and the flags of its `configs/tpu/v5p/llama2_70b.sh`, and keeps the compiled
text and the compiler's bytes in DIR; what is there is not compiled again. The text is read with the shape of
configs/runs/llama2.py:maxtext. Flags that libtpu 0.0.52 refuses on v5p are left out: `xla_tpu_enable_async_collective_fusion` and
the two that belong to it. Needs requirements-plan.lock, Linux x86-64, no TPU. Takes about 2 minutes of a core.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from common import make_parser, write

from llmjax import config
from llmjax.scaling import compiler, plan
from llmjax.scaling.topology import compiler_lock, parse_topology

CONFIG, TOPOLOGY = "configs/runs/llama2.py:maxtext", "v5p:4x8x8"
FLAGS = (
    "--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
SETTINGS = (
    "model_name=llama2-70b", "remat_policy=save_dot_except_mlpwi", "per_device_batch_size=4", "max_target_length=4096",
    "steps=30", "enable_checkpointing=false", "use_iota_embed=true", "dataset_type=synthetic", "reuse_example_batch=1",
    "compile_topology=v5p-512", "compile_topology_num_slices=1", "run_name=compile", "base_output_directory=out",
)  # fmt: skip
COMPILE = """
import importlib.metadata as installed, json, pathlib, resource, sys
import maxtext
from maxtext.trainers.pre_train import train_compile

kept = pathlib.Path(sys.argv[1])
compile_step = train_compile.jit_and_compile

def keep(*args, **settings):
    made = compile_step(*args, **settings)
    (kept / "step.txt").write_text(made.as_text())
    said = made.memory_analysis()
    used = resource.getrusage(resource.RUSAGE_SELF)
    (kept / "step.json").write_text(json.dumps({
        "bytes": {n: getattr(said, n + "_size_in_bytes") for n in ("argument", "output", "alias", "temp", "generated_code")},
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "packages": {n: installed.version(n) for n in ("maxtext", "jax", "libtpu", "flax", "tokamax")},
    }))
    return made

train_compile.jit_and_compile = keep
train_compile.main(["train_compile", str(pathlib.Path(list(maxtext.__path__)[0]) / "configs" / "base.yml"), *sys.argv[2:]])
"""


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/maxtext_compile.json"))
    parser.add_argument("--python", required=True, help="an interpreter with MaxText")
    parser.add_argument(
        "--kept", type=Path, required=True, metavar="DIR", help="the compiled text, made if it is not there"
    )
    args = parser.parse_args()
    if not (args.kept / "step.json").exists():
        args.kept.mkdir(parents=True, exist_ok=True)
        # The libtpu of this interpreter is not that of MaxText's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
        given = {"LIBTPU_INIT_ARGS": FLAGS, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        with compiler_lock():
            python = os.path.abspath(shutil.which(args.python) or args.python)
            command = [python, "-c", COMPILE, str(args.kept.resolve()), *SETTINGS]
            subprocess.run(command, cwd=args.kept, env={**environment, **given}, check=True)
    made = json.loads((args.kept / "step.json").read_text())
    with compiler_lock():
        topology = parse_topology(TOPOLOGY)
        c = compiler.resolve(config.load(CONFIG), platform="tpu")
        sizes = compiler.stages(c)
        found: dict[str, Any] = plan.facts(c, topology, sizes, sizes.stages[-1])
        plan.read_program(found, (args.kept / "step.txt").read_text(), topology, plan.mesh_on(c, topology))
    size = made.pop("bytes")
    peak = size["argument"] + size["output"] - size["alias"] + size["temp"] + size["generated_code"]
    seconds = found["seconds"]["compiler"]
    results = {
        **made, "settings": SETTINGS, "flags": FLAGS, "gib": peak / 2**30,
        "tokens_per_second_per_chip": found["tokens_per_step"] / seconds / found["chips"],
        "recomputed": found["flops"]["recomputed"] / found["flops"]["model"],
        **{name: found[name] for name in ("mfu_by_compiler", "mfu", "seconds", "collectives", "not_counted")},
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    write(results, args.out)


if __name__ == "__main__":
    main()
