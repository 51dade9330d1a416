"""The sparse MLP: each token is seen by a few of many experts, each an MLP of its own (a mixture of experts).

Tokens are sorted by their experts, each expert's rows are multiplied with its matrices, and the results are added up
token by token. With dispatch "dropless" the rows of all experts lie close together and a grouped product multiplies them.
With "capacity" every expert has equally many slots, a choice that finds no slot is dropped, and the product is an
ordinary batched one. `routing.py` chooses the experts, lists the papers' settings and explains extra letters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model import routing
from llmjax.model.init import initializer
from llmjax.model.layers import GATED, MLP, Linear, activated, dtype_of, mlp_width
from llmjax.model.observed import observe
from llmjax.model.per_device import axes_of, per_device, platform, run_manual, summable
from llmjax.model.routing import Assignment

TILE = 512  # rows and columns at a time of the kernel for TPU: three such tiles are well within a core's vector memory
Product = Callable[[jax.Array, jax.Array], jax.Array]  # rows (P, D) and a stack of matrices (E, D, F) -> (P, F)


class Weights(nn.Module):
    """A stack of matrices (or one), and a stack of vectors with `bias`: {"kernel": ..., "bias": ...}, as stored."""

    c: ConfigDict
    shape: tuple[int, ...]
    kind: str  # the row of the initialisation table
    bias: bool = False

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        dtype, stacked = dtype_of(self.c.param_dtype), len(self.shape) - 2
        start = initializer(self.c, self.kind, stacked=stacked, path="/".join(self.path))
        weights = {"kernel": self.param("kernel", start, self.shape, dtype)}
        if self.bias:
            shape = (*self.shape[:stacked], self.shape[-1])
            weights["bias"] = self.param("bias", nn.initializers.zeros, shape, dtype)
        return weights


class MoE(nn.Module):
    """The feed-forward branch of a sparse layer: x_BLD -> y_BLD. Padding (not valid_BL) goes to no expert.

    It sows into "losses", unless deterministic, `balance` (if that is a loss of each layer) and `z`: scalars, means over
    the tokens of the batch, times their weights. It sows into "routing" `usage`, a `routing.Usage`.
    """

    c: ConfigDict
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array) -> jax.Array:
        c, moe, bias = self.c, self.c.moe, "mlp" in self.c.bias
        E, D, F = moe.experts, c.width, expert_width(c)
        # ------------------------------------------------------------------ which experts
        # Float32 until top-k: rounding changes which experts are chosen (Fedus et al. 2021, section 2.4).
        router = Weights(c, (D, E), "inward", "router" in c.bias, name="router")()
        router_DE = router["kernel"].astype(jnp.float32)
        seen_BLD = x_BLD.astype(jnp.float32)
        if moe.jitter and not self.deterministic:
            noise = jax.random.uniform(
                self.make_rng("dropout"), x_BLD.shape, minval=1.0 - moe.jitter, maxval=1.0 + moe.jitter
            )
            seen_BLD = seen_BLD * noise
        logits_BLE = jnp.matmul(seen_BLD, router_DE, precision=jax.lax.Precision.HIGHEST)
        if "bias" in router:
            logits_BLE = logits_BLE + router["bias"].astype(jnp.float32)[None, None]
        scores_BLE = routing.scores(logits_BLE, moe)
        bias_E = None
        if moe.bias_rate:
            # Float32 whatever param_dtype says: it moves by small equal steps.
            bias_E = self.param("expert_bias", nn.initializers.zeros, (E,), jnp.float32)
        experts_BLJ, weights_BLJ = routing.choose(scores_BLE, valid_BL, moe, bias_E)
        used = routing.usage(scores_BLE, experts_BLJ, valid_BL, moe)
        if bias_E is not None:
            weights_BLJ = observe(weights_BLJ, bias_E, routing.excess(used.loads))
        if not self.deterministic:
            if moe.balance_loss and moe.balance_over == "batch":
                self.sow("losses", "balance", moe.balance_loss * routing.balance_loss(used.loads, used.probs))
            elif moe.balance_loss and moe.balance_over == "row":
                balance = routing.row_balance_loss(scores_BLE, experts_BLJ, valid_BL, moe)
                self.sow("losses", "balance", moe.balance_loss * balance)
            if moe.z_loss:
                self.sow("losses", "z", moe.z_loss * routing.z_loss(logits_BLE, valid_BL))
        self.sow("routing", "usage", used)
        # ------------------------------------------------------------------ their outputs
        names = ("up", "gate", "down") if c.activation in GATED else ("up", "down")
        weights: dict[str, Any] = {}
        for name in names:
            shape, kind = ((E, F, D), "outward") if name == "down" else ((E, D, F), "inward")
            weights[name] = Weights(c, shape, kind, bias, name=name)()
        y_BLD = mixture(c, x_BLD.astype(dtype_of(c.dtype)), experts_BLJ, weights_BLJ, weights)
        if moe.shared:
            shared_BLD = MLP(c, moe.shared * F, name="shared")(x_BLD)
            if moe.shared_gate:
                shared_BLD = shared_BLD * jax.nn.sigmoid(Linear(c, (1,), "inward", name="shared_gate")(x_BLD))
            y_BLD = y_BLD + shared_BLD
        return y_BLD


def expert_width(c: ConfigDict) -> int:
    """F of one expert."""
    return c.moe.width or mlp_width(c)


def mixture(
    c: ConfigDict,
    x_BLD: jax.Array,
    experts_BLJ: jax.Array,
    weights_BLJ: jax.Array,
    weights: dict[str, dict[str, jax.Array]],
) -> jax.Array:
    """The weighted sum of each token's experts: x_BLD -> y_BLD, in the type of x. Each device sorts its own tokens.

    Where experts live on different devices, with capacities each device sends the others exactly their rows (all-to-all).
    Without them the number of rows that go from device to device depends on the data. Then each device gathers the tokens
    of all devices and computes its own experts' outputs, which are added up on the devices that the tokens came from.

    Args:
        experts_BLJ: int32; E or more: no expert.
        weights_BLJ: float32.
        weights: by part, up, down and gate (if the activation is gated), "kernel" and maybe "bias".
    """
    parts = [(name, kind, array) for name, part in weights.items() for kind, array in part.items()]
    letters = {"kernel": {"down": "EFD"}, "bias": {"down": "ED"}}
    dims = [letters[kind].get(name, "EDF" if kind == "kernel" else "EF") for name, kind, _ in parts]

    def local(x_BLD: jax.Array, experts_BLJ: jax.Array, weights_BLJ: jax.Array, *rest: Any) -> jax.Array:
        *arrays, copies = rest
        own: dict[str, dict[str, jax.Array]] = {name: {} for name in weights}
        for (name, kind, _), array in zip(parts, arrays, strict=True):
            own[name][kind] = array / copies if (name, kind) == ("down", "bias") else array
        count = own["up"]["kernel"].shape[0]
        if c.moe.dispatch == "capacity":
            assigned = routing.limited(experts_BLJ, c.moe)

            def exchanged(x_PD: jax.Array) -> jax.Array:
                x_PD = _exchange(x_PD, owners, experts=c.moe.experts, out=True)
                y_PD = mlp(c, x_PD, own, even_product, jnp.full(count, x_PD.shape[0] // count, jnp.int32))
                return _exchange(y_PD, owners, experts=count, out=False)

            return _mixed(x_BLD, weights_BLJ, assigned, exchanged)
        if owners:
            x_BLD = jax.lax.all_gather(summable(x_BLD), owners, tiled=True).astype(x_BLD.dtype)
            weights_BLJ = jax.lax.all_gather(weights_BLJ, owners, tiled=True)
            experts_BLJ = jax.lax.all_gather(experts_BLJ, owners, tiled=True) - jax.lax.axis_index(owners) * count
            experts_BLJ = jnp.where((experts_BLJ >= 0) & (experts_BLJ < count), experts_BLJ, count)
        assigned = routing.dropless(experts_BLJ, count)
        product = functools.partial(grouped_product, sizes_E=assigned.sizes)
        y_BLD = _mixed(x_BLD, weights_BLJ, assigned, lambda x_PD: mlp(c, x_PD, own, product, assigned.sizes))
        if owners:
            y_BLD = jax.lax.psum_scatter(summable(y_BLD), owners, tiled=True).astype(y_BLD.dtype)
        return y_BLD

    owners = axes_of("E", c.moe.experts)
    # A row's slots are assigned together, so rows are not divided there.
    row = "BM" if c.moe.dispatch == "capacity" else "BL"
    # Cast here to the compute type, so that little is gathered from other devices.
    arrays = [array.astype(x_BLD.dtype) for _, _, array in parts]
    return per_device(local, (x_BLD, experts_BLJ, weights_BLJ, *arrays), (f"{row}D", f"{row}J", f"{row}J", *dims))


def _mixed(
    x_BLD: jax.Array, weights_BLJ: jax.Array, assigned: Assignment, experts: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Dispatch tokens to experts, compute their outputs (`experts`: x_PD -> y_PD), and combine them by token."""
    T, D = x_BLD.shape[0] * x_BLD.shape[1], x_BLD.shape[2]
    rows_PD = experts(dispatch(x_BLD.reshape(T, D), assigned))
    return combine(rows_PD, weights_BLJ.transpose(2, 0, 1).reshape(-1, T), assigned).reshape(x_BLD.shape)


def _exchange(x_PD: jax.Array, owners: tuple[str, ...], *, experts: int, out: bool) -> jax.Array:
    """Send rows, sorted by expert and equally many for each, to the devices that hold the experts, or back."""
    if not owners:
        return x_PD
    x_ECD = x_PD.reshape(experts, -1, x_PD.shape[1])
    split, join = (0, 1) if out else (1, 0)
    return jax.lax.all_to_all(x_ECD, owners, split, join, tiled=True).reshape(-1, x_PD.shape[1])


def mlp(
    c: ConfigDict, x_PD: jax.Array, weights: dict[str, dict[str, jax.Array]], product: Product, sizes_E: jax.Array
) -> jax.Array:
    """Up, activation (times a gate's), down, each row with its expert's weights: x_PD -> y_PD."""
    ends_E = jnp.cumsum(sizes_E)

    def linear(name: str, x: jax.Array) -> jax.Array:
        y = product(x, weights[name]["kernel"])
        if "bias" in weights[name]:
            # A product, not a lookup, whose derivative would be a scatter.
            row_P1 = jnp.arange(x.shape[0])[:, None]
            own_PE = (row_P1 < ends_E[None]) & (row_P1 >= (ends_E - sizes_E)[None])
            y = y + own_PE.astype(x.dtype) @ weights[name]["bias"]
        return y

    gate_PF = linear("gate", x_PD) if "gate" in weights else None
    return linear("down", activated(c, linear("up", x_PD), gate_PF))


def reference(
    c: ConfigDict,
    x_BLD: jax.Array,
    experts_BLJ: jax.Array,
    weights_BLJ: jax.Array,
    weights: dict[str, dict[str, jax.Array]],
) -> jax.Array:
    """`mixture` without capacity in readable form: every expert sees every token, and the weights pick."""
    y_BLD = jnp.zeros_like(x_BLD)
    for e in range(c.moe.experts):
        own = {name: {kind: array[e] for kind, array in part.items()} for name, part in weights.items()}

        def linear(name: str, x: jax.Array, own: dict[str, dict[str, jax.Array]] = own) -> jax.Array:
            y = x @ own[name]["kernel"]
            return y + own[name]["bias"][None, None] if "bias" in own[name] else y

        h_BLF = activated(c, linear("up", x_BLD), linear("gate", x_BLD) if "gate" in own else None)
        weight_BL = jnp.sum(jnp.where(experts_BLJ == e, weights_BLJ, 0.0), axis=-1)
        y_BLD = y_BLD + weight_BL[..., None] * linear("down", h_BLF)
    return y_BLD


@jax.custom_vjp
def dispatch(x_TD: jax.Array, assigned: Assignment) -> jax.Array:
    """The rows that experts read, each slot's token: (P, D). Its derivative is a lookup too; that of a lookup is a scatter."""
    return _lookup(x_TD, assigned.tokens())


def _dispatch_backward(assigned: Assignment, dy_PD: jax.Array) -> tuple[jax.Array, None]:
    parts = [_lookup(dy_PD, slot_T).astype(jnp.float32) for slot_T in assigned.slots]
    return functools.reduce(jnp.add, parts).astype(dy_PD.dtype), None


dispatch.defvjp(lambda x_TD, assigned: (dispatch(x_TD, assigned), assigned), _dispatch_backward)


@jax.custom_vjp
def combine(y_PD: jax.Array, weights_JT: jax.Array, assigned: Assignment) -> jax.Array:
    """Each token's sum of its experts' rows times their weights: (T, D). A choice without a slot adds 0."""
    found = zip(assigned.slots, weights_JT, strict=True)
    parts = [_lookup(y_PD, slot_T).astype(jnp.float32) * weight_T[:, None] for slot_T, weight_T in found]
    return functools.reduce(jnp.add, parts).astype(y_PD.dtype)


def _combine_backward(
    saved: tuple[jax.Array, jax.Array, Assignment], dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    y_PD, weights_JT, assigned = saved
    weight_P = _lookup(weights_JT.reshape(-1), assigned.choices)
    dy_PD = _lookup(dy_TD, assigned.tokens()).astype(jnp.float32) * weight_P[:, None]
    dy_TD = dy_TD.astype(jnp.float32)
    dweights = [jnp.sum(_lookup(y_PD, slot_T).astype(jnp.float32) * dy_TD, axis=1) for slot_T in assigned.slots]
    return dy_PD.astype(y_PD.dtype), jnp.stack(dweights), None


combine.defvjp(lambda *arguments: (combine(*arguments), arguments), _combine_backward)


def _lookup(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def even_product(x_PD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
    """Rows sorted by expert, equally many for each, times the experts' matrices: (P, F)."""
    E, D, F = kernel_EDF.shape
    return jnp.einsum("ecd,edf->ecf", x_PD.reshape(E, -1, D), kernel_EDF).reshape(-1, F)


@jax.custom_vjp
def grouped_product(x_PD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows sorted by expert, `sizes_E` of each, times the experts' matrices: (P, F).

    Rows after the last expert's must be zero and stay so. On CPU it multiplies blocks of rows, one after another, because
    `jax.lax.ragged_dot` multiplies every row with every expert there.
    """
    return jax.lax.platform_dependent(
        x_PD, kernel_EDF, sizes_E, cpu=functools.partial(_blocks_product, contract=1), default=_ragged_product
    )


def _grouped_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy_PF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_PD, kernel_EDF, sizes_E = saved
    dx_PD = jax.lax.platform_dependent(
        dy_PF,
        kernel_EDF,
        sizes_E,
        cpu=functools.partial(_blocks_product, contract=2),
        default=lambda dy_PF, kernel_EDF, sizes_E: _ragged_product(dy_PF, kernel_EDF.mT, sizes_E),
    )
    if platform() == "tpu":  # decided while tracing: importing and tracing the kernel takes seconds
        dkernel_EDF = run_manual(_tiled_outer, (x_PD, dy_PF, sizes_E), ("", "", ""), "", {})
    else:
        dkernel_EDF = jax.lax.platform_dependent(x_PD, dy_PF, sizes_E, cpu=_blocks_outer, default=_ragged_outer)
    return dx_PD, dkernel_EDF.astype(kernel_EDF.dtype), None


grouped_product.defvjp(
    lambda x_PD, kernel_EDF, sizes_E: (grouped_product(x_PD, kernel_EDF, sizes_E), (x_PD, kernel_EDF, sizes_E)),
    _grouped_backward,
)


def _ragged_product(x_PD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    # The product's rows of no expert depend on the platform.
    own_P1 = jnp.arange(x_PD.shape[0])[:, None] < jnp.sum(sizes_E)
    return jnp.where(own_P1, jax.lax.ragged_dot(x_PD, kernel_EDF, sizes_E), 0)


def _ragged_outer(x_PD: jax.Array, dy_PF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The kernels' gradient, (E, D, F) float32: each expert's rows of x, transposed, times those of dy."""
    dimensions = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
    return jax.lax.ragged_dot_general(x_PD, dy_PF, sizes_E, dimensions, preferred_element_type=jnp.float32)


def _tiled_outer(x_PD: jax.Array, dy_PF: jax.Array, sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The kernels' gradient by JAX's Pallas kernel for TPU.

    The TPU compiler makes `_ragged_outer` a dense product of all rows for every expert, which takes three times as many
    operations as the whole of Mixtral's step.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    P = x_PD.shape[0]
    rows = min(TILE, 1 << max(P - 1, 127).bit_length())
    x, dy = (jnp.pad(a, ((0, -P % rows), (0, 0))) for a in (x_PD, dy_PF))  # rows of no expert are not read
    tiling = (rows, min(TILE, x.shape[1]), min(TILE, dy.shape[1]))
    return tgmm(x.T, dy, sizes_E, jnp.float32, tiling, interpret=interpret)


def _block_rows(rows: int, experts: int) -> int:
    """Rows of a block: long enough for fast products, short enough to waste little at each expert's end."""
    share = max(rows // (4 * experts), 1)
    return min(rows, max(32, min(256, 1 << (share.bit_length() - 1))))


def _for_each_block(
    sizes_E: jax.Array, rows: int, body: Callable[[jax.Array, jax.Array, jax.Array, Any], Any], start: Any
) -> Any:
    """Fold body(expert, first row, rows of the expert from there on, carry) over blocks of each expert's rows in turn."""
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // rows)
    last_E = jnp.cumsum(blocks_E)

    def step(i: jax.Array, carry: Any) -> Any:
        e = jnp.sum(i >= last_E)
        offset = (i - last_E[e] + blocks_E[e]) * rows
        return body(e, ends_E[e] - sizes_E[e] + offset, sizes_E[e] - offset, carry)

    return jax.lax.fori_loop(0, last_E[-1], step, start)


def _blocks_product(x_PD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, *, contract: int) -> jax.Array:
    """`contract` is the kernel's dimension that is summed over: 1, or 2 for the product with its transpose."""
    P = x_PD.shape[0]
    rows = _block_rows(P, kernel_EDF.shape[0])
    x = jnp.pad(x_PD, ((0, rows), (0, 0)))  # the last block may reach beyond the end

    def body(e: jax.Array, start: jax.Array, _: jax.Array, y: jax.Array) -> jax.Array:
        # A block may reach into the next expert's rows, which are written after it.
        kernel = jax.lax.dynamic_index_in_dim(kernel_EDF, e, keepdims=False)
        block = jax.lax.dynamic_slice_in_dim(x, start, rows)
        y_block = jax.lax.dot_general(block, kernel, (((1,), (contract - 1,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, y_block, start, 0)

    return _for_each_block(sizes_E, rows, body, jnp.zeros((P + rows, kernel_EDF.shape[3 - contract]), x.dtype))[:P]


def _blocks_outer(x_PD: jax.Array, dy_PF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The kernels' gradient, as `_ragged_outer`."""
    rows = _block_rows(x_PD.shape[0], sizes_E.shape[0])
    x, dy = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_PD, dy_PF))

    def body(e: jax.Array, start: jax.Array, count: jax.Array, total_EDF: jax.Array) -> jax.Array:
        own = jnp.arange(rows)[:, None] < count
        x_block = jnp.where(own, jax.lax.dynamic_slice_in_dim(x, start, rows), 0)
        dy_block = jax.lax.dynamic_slice_in_dim(dy, start, rows)
        part = jnp.matmul(x_block.T, dy_block, preferred_element_type=jnp.float32)
        part += jax.lax.dynamic_index_in_dim(total_EDF, e, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total_EDF, part, e, 0)

    E, D, F = sizes_E.shape[0], x_PD.shape[1], dy_PF.shape[1]
    return _for_each_block(sizes_E, rows, body, jnp.zeros((E, D, F), jnp.float32))
