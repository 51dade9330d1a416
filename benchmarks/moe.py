"""The sparse MLP against a dense one of equal active size: forward and backward, the same tokens, in turn, in one
process.

    python benchmarks/moe.py [--out results/moe.json]

A sparse layer of E experts of width F, k of them for each token, does the matrix products of a dense MLP of width k F;
beside them it has the router, the sort, the moving of rows, and products that are smaller and whose sizes depend on
the data. Sides step in rounds A B C A B C, each at least --seconds long. The median of a round is compared with that
of the dense side in the same round, so a drift of the machine's speed does not matter. The tokens are random, so the
experts are nearly balanced; `skewed` gives half of all first choices to one expert, which the loss would not allow for
long.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from common import make_parser, write

NAMES = ("width", "expert_width", "experts", "active", "rows", "context")
SHAPES = {
    "8 experts, 2 a token": (256, 512, 8, 2, 8, 512),
    "64 small experts, 8 a token": (256, 128, 64, 8, 8, 512),
}
SIDES = ("dense", "dropless", "dropless skewed", "capacity")


def make_side(side: str, shape: tuple[int, ...], *, dtype: str) -> Callable[[], Any]:
    """A function that does one forward and backward pass on all parameters and the input, and waits for it."""
    import jax
    import jax.numpy as jnp
    from ml_collections import FrozenConfigDict

    from llmjax import config
    from llmjax.model.layers import MLP
    from llmjax.model.moe import MoE
    from llmjax.parallel import mesh as meshes
    from llmjax.parallel import placement
    from llmjax.train.step import batch_shardings

    width, expert_width, experts, active, rows, context = shape
    whole = config.base()
    c = whole.model
    c.width, c.activation, c.dtype = width, "swiglu", dtype
    c.moe.experts, c.moe.active, c.moe.width = experts, active, expert_width
    c.moe.dispatch = "capacity" if side == "capacity" else "dropless"
    mesh = meshes.make_mesh("data=-1")
    key_x, key_p = jax.random.split(jax.random.key(0))
    x_BLD = jax.device_put(jax.random.normal(key_x, (rows, context, width)).astype(dtype), batch_shardings(mesh))
    valid_BL = jax.device_put(jnp.ones((rows, context), bool), batch_shardings(mesh))
    module: Any
    if side == "dense":
        module, inputs = MLP(FrozenConfigDict(c), active * expert_width), (x_BLD,)
    else:
        module, inputs = MoE(FrozenConfigDict(c), deterministic=False), (x_BLD, valid_BL)
    with placement.active(mesh, whole):
        params = jax.jit(module.init)(key_p, *inputs)["params"]
        if side == "dropless skewed":  # to one expert, whatever points along a direction as half of the tokens do
            params["router"]["kernel"] = params["router"]["kernel"].at[0, 0].set(10.0)

        def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
            y_BLD, state = module.apply({"params": params}, x_BLD, *inputs[1:], mutable=["losses"])
            return jnp.sum(jnp.square(y_BLD.astype(jnp.float32))) + sum(map(jnp.sum, jax.tree.leaves(state)))

        run = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BLD).compile()
    return lambda: jax.block_until_ready(run(params, x_BLD))


def median_ms(step: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a step, the median of those that fit into so many seconds (3 at least)."""
    end, times = time.perf_counter() + seconds, []
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def compare(name: str, *, dtype: str, rounds: int, seconds: float) -> dict:
    """Interleave the sides on one shape; the rounds' medians and their ratios to the dense side's."""
    shape = SHAPES[name]
    tokens = shape[4] * shape[5]
    steps = {side: make_side(side, shape, dtype=dtype) for side in SIDES}
    print(f"\n{name}: width {shape[0]}, expert {shape[1]} wide, {tokens:,} tokens, {dtype}")
    print("round  " + "  ".join(f"{side:>15}" for side in SIDES) + "   ms")
    medians: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(-1, rounds):  # the first round warms up
        found = {side: median_ms(step, seconds) for side, step in steps.items()}
        if number >= 0:
            for side, ms in found.items():
                medians[side].append(ms)
            print(f"{number + 1:>5}  " + "  ".join(f"{ms:>15.1f}" for ms in found.values()), flush=True)
    result: dict[str, Any] = {"shape": dict(zip(NAMES, shape, strict=True))}
    result |= {"dtype": dtype, "ms": medians, "tokens_per_second": {}, "speed_relative_to_dense": {}}
    for side, values in medians.items():
        ratios = [dense / ms for dense, ms in zip(medians["dense"], values, strict=True)]
        speed = tokens / statistics.median(values) * 1e3
        result["tokens_per_second"][side] = speed
        result["speed_relative_to_dense"][side] = {"median": statistics.median(ratios), "rounds": ratios}
        print(f"{side:>15}: {speed:>9,.0f} tokens/s, {statistics.median(ratios):.2f} of dense "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return result


def main() -> None:
    """Run the comparison and print its tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one side's part of a round")
    parser.add_argument("--devices", type=int, default=0, help="CPU devices; 0: as many as cores")
    args = parser.parse_args()

    from llmjax.parallel import mesh as meshes
    from llmjax.start import HUGE_PAGES

    if sys.platform == "linux" and not HUGE_PAGES.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HUGE_PAGES)  # as the command does
    meshes.use_cpu_devices(args.devices, batch_size=8, work_bytes=1 << 30)
    import jax

    names = SHAPES if args.shape == "all" else (args.shape,)
    results = [compare(name, dtype=args.dtype, rounds=args.rounds, seconds=args.seconds) for name in names]
    write({"devices": f"{jax.device_count()} {jax.devices()[0].device_kind}", "results": results}, args.out)


if __name__ == "__main__":
    main()
