"""Options of XLA's compiler: the one table of them, by generation of chips, and the compilation with those of a config.

`parallel.compiler` names sets of this table. A set has other options for each generation, and none where it has no row.
An entry NAME=VALUE is one option of XLA itself. They are given to the compiler with each program, and not by
LIBTPU_INIT_ARGS, so a plan and a run compile alike, and other programs stay as they are.

The values are those that MaxText, its recipes and axlearn publish for their runs. Sets marked `exact` move work and leave
every number as it is. The others may change the order of sums, or their precision. No config of this repository names
one of them: run benchmarks/compiler_options.py on the chip first, which compares losses with and without. Do so with `overlap` on
v5p and v6e too: libtpu 0.0.52 refuses its xla_tpu_enable_async_collective_fusion on v5p, as fit for v5e alone.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from llmjax.errors import UserError
from llmjax.parallel.chips import CHIPS, of_device_kind

Options = dict[str, str]
ON = "true"
LARGE_STATE = 2**30  # bytes of a training's state on a device
# By default XLA on CPU begins all that it can at once, and holds the results: of 135M parameters all updates, 277 MB more.
# Small models take the same time with both, and a little more memory with this one.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclass(frozen=True)
class OptionSet:
    """Options that serve one purpose."""

    purpose: str
    exact: bool  # every number stays the same
    by_generation: dict[str, Options] = field(default_factory=dict)


def _on(*names: str) -> Options:
    return dict.fromkeys(names, ON)


# Gathers run beside products: as asynchronous calls, as steps inside of fusions, and over several fusions.
_FUSED = _on(
    "xla_enable_async_all_gather", "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
)  # fmt: skip
_PERMUTE = _on("xla_enable_async_collective_permute")
_SCHEDULE = _on("xla_tpu_enable_latency_hiding_scheduler")
_V5 = _FUSED | _PERMUTE | _on("xla_tpu_enable_ag_backward_pipelining") | {"xla_tpu_megacore_fusion_allow_ags": "false"}
_HOST = _on(
    "xla_tpu_enable_all_experimental_scheduler_features", "xla_tpu_enable_scheduler_memory_pressure_tracking",
) | {
    "xla_tpu_host_transfer_overlap_limit": "24", "xla_latency_hiding_scheduler_rerun": "2",
    "xla_max_concurrent_host_send_recv": "100",
}  # fmt: skip
_SPARSE_CORE = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false"}  # the two exclude each other
TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)

SETS: dict[str, OptionSet] = {
    "overlap": OptionSet(
        "gathers and permutes run beside products", True,
        {
            "v4": _on("xla_enable_async_all_gather") | _PERMUTE | _SCHEDULE,
            "v5e": _V5,
            "v5p": _V5,
            "v6e": _FUSED,
            "tpu7x": _SCHEDULE,
            "gpu": _on(
                "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_enable_pipelined_all_gather",
                "xla_gpu_enable_pipelined_reduce_scatter",
            ),
        },
    ),
    "gathers": OptionSet(
        "gathers are not made all-reduces", True,
        dict.fromkeys(TPUS, _on("xla_tpu_prefer_async_allgather_to_allreduce")),
    ),
    "host_offload": OptionSet(
        "copies to and from the host run beside products", True, dict.fromkeys(("v5p", "v6e", "tpu7x"), _HOST)
    ),
    "sparse_core_gathers": OptionSet(
        "the sparse cores gather", True,
        dict.fromkeys(("v6e", "tpu7x"), _SPARSE_CORE | _on(
            "xla_tpu_enable_sparse_core_collective_offload_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
        )),
    ),
    "data_parallel": OptionSet(
        "gradients are added up over the axis data late, and beside products", False,
        dict.fromkeys(("v5e", "v5p", "v6e"), _on(
            "xla_tpu_enable_data_parallel_all_reduce_opt", "xla_tpu_data_parallel_opt_different_sized_ops"
        )),
    ),
    "vmem": OptionSet(
        "fusions may take more of the vector memory", False,
        {name: {"xla_tpu_scoped_vmem_limit_kib": size} for name, size in (
            ("v5p", "81920"), ("v6e", "98304"), ("tpu7x", "65536")
        )},
    ),
    "collective_products": OptionSet(
        "products begin before their operand is gathered, and end after their result is sent", False,
        {name: {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "0"} for name in TPUS}
        | {"gpu": {"xla_gpu_threshold_for_windowed_einsum_mib": "0"}},
    ),
    "sparse_core_sums": OptionSet(
        "the sparse cores add up: axlearn saw another quality on v6e, MaxText abnormal losses on TPU7x", False,
        dict.fromkeys(("v6e", "tpu7x"), _SPARSE_CORE | _on(
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        )),
    ),
}  # fmt: skip


def generation(device: Any) -> str:
    """The row of a device in the table: a TPU's name in `CHIPS`, gpu, or the platform."""
    chip = of_device_kind(device.device_kind)
    if chip is None or not chip.torus:
        return str(device.platform)
    return next(name for name, one in CHIPS.items() if one is chip)


def check(entries: Sequence[str]) -> None:
    """Raise UserError for an entry of `parallel.compiler` that is neither a set of the table nor NAME=VALUE."""
    for entry in entries:
        if entry not in SETS and not re.fullmatch(r"xla_\w+=\S+", entry):
            near = difflib.get_close_matches(entry, SETS, n=1)
            raise UserError(
                f"parallel.compiler has {entry!r}, which is no set of options{f', did you mean {near[0]}?' if near else ''} "
                f"Write sets ({', '.join(SETS)}) or single options as xla_NAME=VALUE"
            )


def choose(entries: Sequence[str], device: Any) -> Options:
    """The options that the entries of `parallel.compiler` mean on a device. Later entries win. Raises as `check`."""
    check(entries)
    found: Options = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        found |= {name: value} if equals else SETS[entry].by_generation.get(generation(device), {})
    return found


def of_large_state(device: Any, *, state: int) -> Options:
    """Options of a step whose state has so many bytes on the device. They change no number."""
    return LEAST_MEMORY if device.platform == "cpu" and state >= LARGE_STATE else {}


def describe(entries: Sequence[str], device: Any) -> str:
    """The sets and their options on a device, for people."""
    said = " ".join(f"{name}={value}" for name, value in choose(entries, device).items())
    risky = [entry for entry in entries if "=" in entry or not SETS[entry].exact]
    warning = "" if not risky else (
        f"; {', '.join(risky)} may change numbers: compare losses first, benchmarks/compiler_options.py"
    )  # fmt: skip
    return f"{' '.join(entries)}: {said or f'none for {generation(device)}'}{warning}"


def _typed(value: str) -> str | bool:
    """The value as the compiler wants it: its own flags are read from text, those of DebugOptions have types."""
    if value in ("true", "false"):
        return value == "true"
    return value


def compile_with(lowered: jax.stages.Lowered, options: Options) -> Any:
    """`lowered.compile()` with options.

    Raises UserError for an option that this compiler does not have, and for a value that it does not take.
    """
    typed = {name: _typed(value) for name, value in options.items()}
    try:
        return lowered.compile(compiler_options=typed or None)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).strip().partition("\n")[0]
        named = next((name for name in options if name in said), None)
        if named is None or not any(kind in said for kind in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")):
            raise
        instead = "leave it out"
        if options[named] == ON:
            instead += f", or add '{named}=false' behind the set that has it"
        raise UserError(
            f"parallel.compiler: this compiler does not take {named}={options[named]} ({said}): {instead}"
        ) from error
