"""The memory of one attention layer, forward and backward, as the TPU compiler plans it for each kernel and length.

    python benchmarks/attention.py [--lengths 8192 32768 131072] [--out results/attention.json]

The compiler runs for v5p on a machine without a TPU (pip install "llmjax[tpu]"; a few minutes on 2 cores). The layer
is Llama-3 8B's: width 4,096, 32 query heads of 128, 8 key and value heads, bfloat16, one row of packed documents a
chip. The figure is the size of the compiled program's temporaries: what attention needs beside parameters, input and
their gradients. The compiler refuses a program that does not fit and says what it would have needed. Rows that --out
already has are not compiled again.

Other rows: a window of 4,096; heads of other sizes; rows, heads and positions divided over four chips. Only one
process at a time can use the TPU compiler, so the compilations run in a process of their own. It is started again when
another process holds the compiler.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import make_parser, write
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import config
from llmjax.model.attention import Attention, takes_patterns
from llmjax.model.views import Keys, Tokens, make_view, visible
from llmjax.parallel import mesh as meshes
from llmjax.parallel import placement

TOPOLOGY = "v5p:2x2x1"
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
ATTEMPTS, PAUSE = 60, 20  # of the process that compiles; seconds
MIB = 1 << 20


def settings(kernel: str, **changes: Any) -> config.ConfigDict:
    """Llama-3 8B's attention with a kernel."""
    c = config.base()
    c.model.update({"width": 4096, "heads": 32, "kv_heads": 8, "head_size": 128, "dtype": "bfloat16"})
    c.model.update({"attention": kernel, **changes})
    return c


def compiled_size(c: config.ConfigDict, line: str, *, rows: int, length: int) -> dict[str, Any]:
    """MiB of temporaries of the layer's gradients on each chip of a mesh."""
    kind = c.model.pattern[0]
    sizes = [int(part.partition("=")[2]) for part in line.split()]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = meshes.make_mesh(line, devices=devices[: int(jnp.prod(jnp.array(sizes)))])
    layer = Attention(c.model)

    def view_of(segments_BL: jax.Array) -> Any:
        index_BL = jnp.broadcast_to(jnp.arange(length)[None], segments_BL.shape)
        tokens = Tokens(index_BL, index_BL, segments_BL, index_BL)
        found = Keys(tokens, visible(tokens, tokens))
        promises = {"causal": True, "in_order": True, "by_pattern": takes_patterns(c.model)}
        return make_view(c.model, kind, tokens, found, bidirectional=False, **promises)

    def gradients(params: Any, x_BLD: jax.Array, segments_BL: jax.Array) -> Any:
        def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
            y_BLD, _ = layer.apply({"params": params}, x_BLD, view_of(segments_BL))
            return jnp.sum(jnp.square(y_BLD.astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))(params, x_BLD)

    spread = NamedSharding(mesh, PartitionSpec(meshes.ROWS, "context"))
    x_BLD = jax.ShapeDtypeStruct((rows, length, c.model.width), jnp.bfloat16, sharding=spread)
    segments_BL = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread)
    with placement.active(mesh, c):
        few = jax.ShapeDtypeStruct((1, 8, c.model.width), jnp.bfloat16)
        start = lambda x: layer.init(jax.random.key(0), x, small_view(c))["params"]  # noqa: E731
        shapes = jax.eval_shape(start, few)
        rules = jax.tree_util.tree_map_with_path(lambda path, x: place(path, x, mesh), shapes)
        params = jax.tree.map(
            lambda s, spec: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec)), shapes, rules
        )
        try:
            program = jax.jit(gradients).lower(params, x_BLD, segments_BL).compile()
        except jax.errors.JaxRuntimeError as error:
            wanted = re.search(r"(?:memory required[^(]*\(|Used )([\d.]+)([GT])", str(error))
            if wanted is None:
                raise
            return {"refused": True, "needed_mib": round(float(wanted[1]) * {"G": 1 << 10, "T": 1 << 20}[wanted[2]])}
    return {"temporaries_mib": round(program.memory_analysis().temp_size_in_bytes / MIB)}


def small_view(c: config.ConfigDict) -> Any:
    """Any view, to initialise with."""
    ones_BL = jnp.ones((1, 8), jnp.int32)
    tokens = Tokens(ones_BL, ones_BL, ones_BL, ones_BL)
    return make_view(c.model, "global", tokens, Keys(tokens, visible(tokens, tokens)), bidirectional=False)


def place(path: Any, kernel: Any, mesh: Any) -> PartitionSpec:
    """Heads over tensor, where it divides them, as the table of parallel/placement.py has them."""
    heads = 0 if "out" in placement.path_name(path) else 1
    spread = kernel.shape[heads] % mesh.shape["tensor"] == 0
    return PartitionSpec(*("tensor" if spread and i == heads else None for i in range(3)))


def cases(lengths: list[int]) -> list[tuple[str, dict[str, Any], str, int, int]]:
    """(kernel, settings, mesh, rows, length) of everything that is compiled."""
    shortest, longest = lengths[0], lengths[-1]
    found: list[tuple[str, dict[str, Any], str, int, int]] = [("reference", {}, "data=1", 1, shortest)]
    for length in lengths:
        found += [(kernel, {}, "data=1", 1, length) for kernel in ("dot_product", "splash")]
    found += [("splash", {}, line, 2, longest) for line in ("data=2 context=2", "data=2 tensor=2")]
    changes: tuple[dict[str, Any], ...] = ({"head_size": 64}, {"head_size": 256}, {"attention_soft_cap": 50.0})
    found += [("splash", change, "data=1", 1, shortest) for change in changes]
    found.append(("splash", {"kv_heads": 1}, "context=2 tensor=2", 2, shortest))
    found.append(("splash", {"pattern": ["local"], "window": 4096}, "data=1", 1, longest))
    return found


def work(lengths: list[int], known: list[dict[str, Any]]) -> None:
    """Compile every case but those known and print them, one a line; for the process that has the TPU compiler."""
    for kernel, changes, line, count, length in cases(lengths):
        case = {"kernel": kernel, "settings": changes, "mesh": line, "rows": count, "length": length}
        same = [row for row in known if all(row[key] == value for key, value in case.items())]
        if not same:
            same = [case | compiled_size(settings(kernel, **changes), line, rows=count, length=length)]
        print(json.dumps(same[0]), flush=True)


def main() -> None:
    parser = make_parser(__doc__, out=Path("results/attention.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    if args.worker:
        work(args.lengths, known)
        return
    command = [sys.executable, __file__, "--worker", "--lengths", *map(str, args.lengths), "--out", str(args.out)]
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            command, env={**os.environ, **QUIET, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != -6:  # aborted: another process has the compiler
            break
        time.sleep(PAUSE)
    made = {
        "chip": TOPOLOGY.partition(":")[0],
        "layer": "width 4096, 32 heads of 128, 8 key and value heads, bfloat16, forward and backward",
        "rows": [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")],
    }
    write(made, args.out)
    done.check_returncode()
    for row in made["rows"]:
        size = f"refused, {row['needed_mib']:,} MiB" if "refused" in row else f"{row['temporaries_mib']:,} MiB"
        print(f"{row['kernel']:12} {row['length']:8,} {row['mesh']:20} {row['settings'] or ''} {size}")


if __name__ == "__main__":
    main()
