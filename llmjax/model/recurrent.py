"""Recurrent mixers, which take attention's place in layers of kind rnn, lstm, rglru, mamba2 and conv.

A mixer is a module `M(c, name=kind)` called as `m(x_BLD, reset_BL, valid_BL, state) -> (y_BLD, state)`.
    reset_BL: bool, true at the first token of a document, which sees nothing of what came before it in the row.
    valid_BL: bool, false at padding, which changes no state (and whose output means nothing).
    state: None in training, and then None is returned; or a dict of arrays with a leading B, from `init_state` or from
        the call before. L may be anything from 1 (a step of decoding): however a text is cut, the results are the same.

All of them take time linear in L and keep a state whose size does not depend on it. This file has the table of mixers, RNN
and LSTM. Letters: `R` the size of the state, `I` the maps of a cell (1 or 4 gates).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from llmjax.model import gated_convolution, mamba2, rglru
from llmjax.model.layers import Linear, constrain, dtype_of

State = dict[str, jax.Array]


def elman(gates_BIR: jax.Array, state: State) -> State:
    """The simple recurrent network (Elman 1990): h_t = tanh(W x_t + U h_{t-1} + b)."""
    return {"hidden": jnp.tanh(gates_BIR[:, 0])}


def lstm(gates_BIR: jax.Array, state: State) -> State:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    Equations and order of the gates are those of `torch.nn.LSTM`: input, forget, cell, output;
    c_t = f c_{t-1} + i tanh(g), h_t = o tanh(c_t).
    """
    i_BR, f_BR, g_BR, o_BR = (gates_BIR[:, k] for k in range(4))
    c_BR = jax.nn.sigmoid(f_BR) * state["cell"] + jax.nn.sigmoid(i_BR) * jnp.tanh(g_BR)
    return {"hidden": jax.nn.sigmoid(o_BR) * jnp.tanh(c_BR), "cell": c_BR}


CELLS: dict[str, tuple[Callable[[jax.Array, State], State], int]] = {"rnn": (elman, 1), "lstm": (lstm, 4)}


def _product(x_BR: jax.Array, kernel_RIR: jax.Array) -> jax.Array:
    """x U, float32, for the matrices of all I maps at once."""
    flat = kernel_RIR.reshape(kernel_RIR.shape[0], -1)
    y = jnp.matmul(x_BR.astype(kernel_RIR.dtype), flat, preferred_element_type=jnp.float32)
    return y.reshape(-1, *kernel_RIR.shape[1:])


def _where(mask_B: jax.Array, a: State, b: State) -> State:
    return jax.tree.map(lambda x, y: jnp.where(mask_B[:, None], x, y), a, b)


def _step(cell, kernel_RIR, state, token):  # type: ignore[no-untyped-def]
    """One token: the state after it, the state that its cell read, and the gates' inputs."""
    x_BIR, reset_B, valid_B = token
    read = jax.tree.map(lambda s: jnp.where(reset_B[:, None], 0.0, s), state)
    gates_BIR = x_BIR + _product(read["hidden"], kernel_RIR)
    return _where(valid_B, cell(gates_BIR, read), state), read, gates_BIR


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_cell(
    cell: Callable[[jax.Array, State], State],
    x_LBIR: jax.Array,
    kernel_RIR: jax.Array,
    state: State,
    reset_LB: jax.Array,
    valid_LB: jax.Array,
) -> tuple[jax.Array, State]:
    """Run a cell over time: hidden_LBR float32 and the last state. x holds the input's part of the gates, float32.

    The derivative is written out so that the kernel's is one product over all tokens after the loop, instead of a sum of L
    matrices inside it (2 to 3 times faster on CPU).
    """

    def step(state: State, token: Any) -> tuple[State, jax.Array]:
        state, _, _ = _step(cell, kernel_RIR, state, token)
        return state, state["hidden"]

    state, hidden_LBR = jax.lax.scan(step, state, (x_LBIR, reset_LB, valid_LB))
    return hidden_LBR, state


def _scan_forward(cell, x_LBIR, kernel_RIR, state, reset_LB, valid_LB):  # type: ignore[no-untyped-def]
    def step(state: State, token: Any) -> tuple[State, Any]:
        state, read, gates_BIR = _step(cell, kernel_RIR, state, token)
        return state, (state["hidden"], read, gates_BIR)

    state, (hidden_LBR, read, gates_LBIR) = jax.lax.scan(step, state, (x_LBIR, reset_LB, valid_LB))
    return (hidden_LBR, state), (read, gates_LBIR, kernel_RIR, reset_LB, valid_LB)


def _scan_backward(cell, saved, cotangents):  # type: ignore[no-untyped-def]
    read, gates_LBIR, kernel_RIR, reset_LB, valid_LB = saved
    dhidden_LBR, dstate = cotangents
    flat = kernel_RIR.reshape(kernel_RIR.shape[0], -1)

    def step(dstate: State, token: Any) -> tuple[State, jax.Array]:
        dhidden_BR, read, gates_BIR, reset_B, valid_B = token
        dstate = {**dstate, "hidden": dstate["hidden"] + dhidden_BR}
        zero = jax.tree.map(jnp.zeros_like, dstate)
        _, pull = jax.vjp(cell, gates_BIR, read)
        dgates_BIR, dread = pull(_where(valid_B, dstate, zero))
        rows = dgates_BIR.reshape(dgates_BIR.shape[0], -1).astype(flat.dtype)
        dread = {**dread, "hidden": dread["hidden"] + jnp.matmul(rows, flat.T, preferred_element_type=jnp.float32)}
        # Padding passes the state on; a reset passes nothing.
        return _where(valid_B, _where(reset_B, zero, dread), dstate), dgates_BIR

    tokens = (dhidden_LBR, read, gates_LBIR, reset_LB, valid_LB)
    dstate, dgates_LBIR = jax.lax.scan(step, dstate, tokens, reverse=True)
    inputs = read["hidden"].reshape(-1, flat.shape[0]).astype(flat.dtype)
    dkernel = jnp.matmul(inputs.T, dgates_LBIR.reshape(len(inputs), -1).astype(flat.dtype))
    return dgates_LBIR, dkernel.reshape(kernel_RIR.shape), dstate, None, None


scan_cell.defvjp(_scan_forward, _scan_backward)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An orthogonal matrix for each of the I maps (Saxe et al. 2014), so that the state neither vanishes nor explodes."""
    keys = jax.random.split(key, shape[1])
    matrices = [nn.initializers.orthogonal()(k, (shape[0], shape[2]), jnp.float32) for k in keys]
    return jnp.stack(matrices, 1).astype(dtype)


def _bias_start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros, but 1 for the LSTM's forget gate, so that it starts by remembering (Jozefowicz et al. 2015)."""
    bias_IR = jnp.zeros(shape, dtype)
    return bias_IR.at[1].set(1) if shape[0] == 4 else bias_IR


class HiddenKernel(nn.Module):
    """The kernel (R, I, R) from the hidden state to the gates, orthogonal at the start whatever model.init says."""

    c: ConfigDict

    @nn.compact
    def __call__(self, maps: int, size: int) -> jax.Array:
        kernel_RIR = self.param("kernel", _orthogonal, (size, maps, size), dtype_of(self.c.param_dtype))
        # Gathered over fsdp before the loop rather than in each of its steps ("D": rows are whole).
        return constrain(kernel_RIR.astype(dtype_of(self.c.dtype)), "DIR")


class RNN(nn.Module):
    """A cell of `CELLS`, named by the module's name, and a linear map of its hidden state back to the residual stream.

    The inputs' part of all gates is one matrix product over all tokens; the loop has the recurrent part only, and
    keeps its state in float32.
    """

    c: ConfigDict
    kind: str = "rnn"

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, reset_BL: jax.Array, valid_BL: jax.Array, state: State | None
    ) -> tuple[jax.Array, State | None]:
        c = self.c
        cell, maps = CELLS[self.kind]
        size = c.recurrent.width or c.width
        x_BLIR = Linear(c, (maps, size), "inward", name="input")(x_BLD)
        bias_IR = self.param("bias", _bias_start, (maps, size), dtype_of(c.param_dtype)).astype(jnp.float32)
        kernel_RIR = HiddenKernel(c, name="hidden")(maps, size)
        before = init_state(c, self.kind, x_BLD.shape[0]) if state is None else state
        x_LBIR = x_BLIR.astype(jnp.float32).swapaxes(0, 1) + bias_IR[None, None]
        hidden_LBR, after = scan_cell(cell, x_LBIR, kernel_RIR, before, reset_BL.T, valid_BL.T)
        y_BLR = constrain(hidden_LBR.swapaxes(0, 1).astype(dtype_of(c.dtype)), "BLR")
        y_BLD = Linear(c, (c.width,), "outward", bias="out" in c.bias, name="out")(y_BLR)
        return y_BLD, None if state is None else after


class LSTM(RNN):
    """`RNN` with the LSTM's cell."""

    kind: str = "lstm"


MIXERS: dict[str, Any] = {
    "rnn": RNN,
    "lstm": LSTM,
    "rglru": rglru.RGLRU,
    "mamba2": mamba2.Mamba2,
    "conv": gated_convolution.GatedConvolution,
}
# The state of those that have files of their own.
STATES: dict[str, Callable[[ConfigDict, int], State]] = {
    "rglru": rglru.init_state,
    "mamba2": mamba2.init_state,
    "conv": gated_convolution.init_state,
}


def init_state(c: ConfigDict, kind: str, batch: int) -> State:
    """The state of `batch` rows before their first token.

    rnn: hidden (B, R) float32; lstm: also cell. The others: see their files.
    """
    if kind in STATES:
        return STATES[kind](c, batch)
    names = ("hidden", "cell") if kind == "lstm" else ("hidden",)
    return {name: jnp.zeros((batch, c.recurrent.width or c.width), jnp.float32) for name in names}
