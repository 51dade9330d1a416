"""Recurrent mixers: each equals its paper, its own single steps, and itself however texts are packed, cut or padded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles_recurrent as oracles
import pytest
from flax import traverse_util
from helpers import few, losses_of, mesh_of, tiny_config
from ml_collections import FrozenConfigDict

from llmjax import config
from llmjax.model import recurrent, rglru
from llmjax.model.mamba2 import state_space

KINDS = sorted(recurrent.MIXERS)
FEW = few(KINDS, 4)  # an rnn is an lstm whose cell is simpler
# Inner widths unlike D, two groups, and a chunk that divides no length below.
CHANGES: dict[str, dict[str, int]] = {
    "rnn": {"width": 12},
    "lstm": {"width": 12},
    "rglru": {"width": 24, "conv_width": 3},
    "conv": {"width": 12, "conv_width": 3},
    "mamba2": {"width": 32, "state_size": 5, "groups": 2, "chunk": 8},
}


def settings(kind: str, **changes: Any) -> config.ConfigDict:
    c = config.base().model
    c.update({"layers": 1, "width": 16, "heads": 4, "bias": ("out",)})
    c.recurrent.update({**CHANGES[kind], **changes})
    return c


def make(kind: str, c: config.ConfigDict, seed: int = 0) -> tuple[Any, Any]:
    """The mixer, and random parameters of which none is what it starts as; decays are kept in their useful range."""
    module = recurrent.MIXERS[kind](FrozenConfigDict(c))
    x_BLD, (reset_BL, valid_BL) = jnp.zeros((1, 3, c.width)), rows([[3]])
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BLD, reset_BL, valid_BL, None)["params"]
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> jax.Array:
        drawn = rng.normal(size=leaf.shape) * 0.4
        offset = {"dt_bias": -1.0, "Lambda": -3.0, "scale": 1.0}.get(path[-1].key, 0.0)
        return jnp.asarray(drawn + offset, leaf.dtype)

    return module, jax.tree_util.tree_map_with_path(values, shapes)


def rows(documents: list[list[int]], length: int = 0) -> tuple[jax.Array, jax.Array]:
    """reset_BL and valid_BL of rows that hold documents of these lengths and then padding."""
    length = length or max(map(sum, documents))
    reset_BL, valid_BL = np.zeros((2, len(documents), length), bool)
    for row, sizes in enumerate(documents):
        reset_BL[row, np.cumsum([0, *sizes[:-1]])] = True
        reset_BL[row, sum(sizes) :] = True  # padding has position 0 too, and must not count as a start
        valid_BL[row, : sum(sizes)] = True
    return jnp.array(reset_BL), jnp.array(valid_BL)


def inputs(batch: int, length: int, width: int = 16, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + 100).normal(size=(batch, length, width)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(module: Any, params: Any, x_BLD: Any, reset_BL: Any, valid_BL: Any, state: Any = None) -> Any:
    return module.apply({"params": params}, x_BLD, reset_BL, valid_BL, state)


def oracle(kind: str, c: config.ConfigDict, params: Any, x_LD: np.ndarray) -> np.ndarray:
    flat = {k: np.asarray(v, np.float64) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    more = {"heads": c.heads, "groups": c.recurrent.groups, "epsilon": c.norm_epsilon} if kind == "mamba2" else {}
    return getattr(oracles, kind)(flat, np.asarray(x_LD, np.float64), **more)


# What they compute


@pytest.mark.parametrize("seed", few([0, 1, 2]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_equals_its_paper_on_packed_and_padded_rows(kind, seed):
    c = settings(kind)
    module, params = make(kind, c, seed)
    documents = [[21], [4, 1, 13], [9, 8], [2, 3]]
    reset_BL, valid_BL = rows(documents)
    x_BLD = inputs(4, 21, seed=seed)
    y_BLD, state = run(module, params, x_BLD, reset_BL, valid_BL)
    assert state is None
    for row, sizes in enumerate(documents):
        ends = np.cumsum(sizes)
        for start, end in zip([0, *ends], ends, strict=False):
            expected_LD = oracle(kind, c, params, x_BLD[row, start:end])
            np.testing.assert_allclose(y_BLD[row, start:end], expected_LD, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", few([7, 1, 64]))
def test_mamba2_is_the_same_whatever_the_chunk(chunk):
    reset_BL, valid_BL = rows([[21], [4, 1, 13]])
    x_BLD = inputs(2, 21)
    results = []
    for size in (8, chunk):
        module, params = make("mamba2", settings("mamba2", chunk=size))
        results.append(run(module, params, x_BLD, reset_BL, valid_BL)[0])
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(results[1][1, :18], results[0][1, :18], rtol=0, atol=1e-5)


# Decoding


@pytest.mark.parametrize("parts", few([[7, 1, 6, 7], [1] * 21]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cut_in_any_parts_gives_what_it_gives_whole(kind, parts):
    c = settings(kind)
    module, params = make(kind, c)
    reset_BL, valid_BL = rows([[21], [8, 13]])
    x_BLD = inputs(2, 21)
    whole_BLD, _ = run(module, params, x_BLD, reset_BL, valid_BL)
    state, made, start = recurrent.init_state(c, kind, 2), [], 0
    for size in parts:
        part = slice(start, start + size)
        y_BLD, new = run(module, params, x_BLD[:, part], reset_BL[:, part], valid_BL[:, part], state)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(lambda s: (s.shape, s.dtype), state)
        state, start = new, start + size
        made.append(y_BLD)
    np.testing.assert_allclose(jnp.concatenate(made, 1), whole_BLD, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", FEW)
def test_decoding_after_a_right_padded_prefill_equals_the_parallel_pass(kind):
    c = settings(kind)
    module, params = make(kind, c)
    prompts, total = [17, 1, 2, 8], 21
    x_BLD = inputs(4, total)
    whole_BLD, _ = run(module, params, x_BLD, *rows([[total]] * 4))
    # The padding of the prefill is noise. Then one token a row at its own place.
    reset_BL, valid_BL = rows([[n] for n in prompts], total)
    noisy_BLD = jnp.where(valid_BL[:, :, None], x_BLD, 7.0)
    _, state = run(module, params, noisy_BLD, reset_BL, valid_BL, recurrent.init_state(c, kind, 4))
    at_B = np.array(prompts)
    for _ in range(3):
        token_BLD = x_BLD[np.arange(4), at_B][:, None]
        y_BLD, state = run(module, params, token_BLD, jnp.zeros((4, 1), bool), jnp.ones((4, 1), bool), state)
        np.testing.assert_allclose(y_BLD[:, 0], whole_BLD[np.arange(4), at_B], rtol=0, atol=2e-5)
        at_B = at_B + 1


@pytest.mark.parametrize("kind", FEW)
def test_padding_leaves_the_state_as_it_was_bit_for_bit(kind):
    c = settings(kind)
    module, params = make(kind, c)
    _, state = run(module, params, inputs(2, 9), *rows([[9], [3, 6]]), recurrent.init_state(c, kind, 2))
    for length in (1, 9):
        nothing = jnp.zeros((2, length), bool)
        _, after = run(module, params, inputs(2, length, seed=3), ~nothing, nothing, state)
        jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("kind", FEW)
def test_left_padded_rows_give_what_right_padded_ones_give(kind):
    module, params = make(kind, settings(kind))
    x_BLD = inputs(1, 13)
    reset_BL, valid_BL = (jnp.arange(13)[None] == 5), (jnp.arange(13)[None] >= 5)
    left_BLD, _ = run(module, params, x_BLD, reset_BL, valid_BL)
    right_BLD, _ = run(module, params, jnp.roll(x_BLD, -5, axis=1), *rows([[8]], 13))
    np.testing.assert_allclose(left_BLD[:, 5:], right_BLD[:, :8], rtol=0, atol=1e-5)


# Gradients


@pytest.mark.parametrize("kind", FEW)
def test_by_gradient_a_token_reads_all_before_it_in_its_document_and_nothing_else(kind):
    module, params = make(kind, settings(kind, **({"conv_width": 6} if kind == "conv" else {})))
    reset_BL, valid_BL = rows([[5, 6]], 13)

    def output(x_BLD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(module, params, x_BLD, reset_BL, valid_BL)[0]), axis=(0, 2))

    reads_LM = np.abs(jax.jacrev(output)(inputs(1, 13))[:, 0]).max(-1) > 0
    index = np.arange(13)
    document = np.array([0] * 5 + [1] * 6 + [2, 2])
    may = (index[:, None] >= index[None]) & (document[:, None] == document[None])
    np.testing.assert_array_equal(reads_LM[:11], may[:11])


def tree_close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    """Every array of two trees is equal within a share of its own largest value."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-3))


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_written_out_gradient_of_a_cell_equals_that_of_the_plain_loop(cell):
    step, maps = recurrent.CELLS[cell]
    rng = np.random.default_rng(0)
    x_LBIR, kernel_RIR = (jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for s in ((9, 2, maps, 6), (6, maps, 6)))
    names = ("hidden", "cell")[: 1 + (cell == "lstm")]
    state = {name: jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for name in names}
    reset_LB, valid_LB = (x.T for x in rows([[3, 5], [2, 7]], 9))
    reset_LB = reset_LB.at[0, 0].set(False)  # so that the first state is read somewhere

    def plain(x_LBIR: jax.Array, kernel_RIR: jax.Array, state: Any) -> Any:
        def one(state: Any, token: Any) -> Any:
            x_BIR, reset_B, valid_B = token
            before = {k: s * ~reset_B[:, None] for k, s in state.items()}
            new = step(x_BIR + jnp.einsum("br,rij->bij", before["hidden"], kernel_RIR), before)
            state = {k: jnp.where(valid_B[:, None], new[k], s) for k, s in state.items()}
            return state, state["hidden"]

        state, hidden_LBR = jax.lax.scan(one, state, (x_LBIR, reset_LB, valid_LB))
        return hidden_LBR, state

    def scalar(form: Any) -> Any:
        def total(*arguments: Any) -> jax.Array:
            hidden_LBR, state = form(*arguments)
            return jnp.sum(jnp.sin(3 * hidden_LBR)) + sum(jnp.sum(jnp.cos(s)) for s in state.values())

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

    fast = scalar(lambda *a: recurrent.scan_cell(step, *a, reset_LB, valid_LB))
    tree_close(fast(x_LBIR, kernel_RIR, state), scalar(plain)(x_LBIR, kernel_RIR, state))


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("form", ["sequential", "associative"])
def test_the_linear_recurrence_and_its_gradient_equal_the_plain_loop_in_both_forms(form, length):
    rng = np.random.default_rng(length)
    a_BLR = jnp.asarray(rng.uniform(0, 1, (2, length, 5)) * (rng.random((2, length, 1)) > 0.2), jnp.float32)
    b_BLR, start_BR = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, length, 5), (2, 5)))

    def plain(a_BLR: jax.Array, b_BLR: jax.Array, h_BR: jax.Array) -> jax.Array:
        outputs = []
        for t in range(length):
            h_BR = a_BLR[:, t] * h_BR + b_BLR[:, t]
            outputs.append(h_BR)
        return jnp.stack(outputs, 1)

    def both(recurrence: Any) -> Any:
        def run(*arguments: jax.Array) -> Any:
            h_BLR, pull = jax.vjp(recurrence, *arguments)
            return h_BLR, pull(jnp.cos(h_BLR))

        return jax.jit(run)(a_BLR, b_BLR, start_BR)

    tree_close(both(lambda a, b, h: rglru.linear_recurrence(a, b, h, form)), both(plain))


def test_the_chunked_state_space_and_its_gradient_equal_the_recurrence_it_stands_for():
    rng = np.random.default_rng(0)
    B, L, H, K, G, J = 2, 19, 4, 3, 2, 5
    shapes = ((B, L, H, K), (B, L, H), (B, L, H), (B, L, G, J), (B, L, G, J), (B, H, K, J))
    x, dt, log_a, b, c, start = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    dt, log_a = jnp.abs(dt), -jnp.abs(log_a)
    reset_BL, _ = rows([[4, 1, 14], [11, 8]])
    reset_BL = reset_BL.at[1, 0].set(False)

    def plain(x, dt, log_a, b, c, state):
        def one(state, token):
            x, dt, log_a, b, c, reset_B = token
            b, c = (jnp.repeat(v, H // G, axis=1) for v in (b, c))
            state = state * (jnp.exp(log_a) * ~reset_B[:, None])[..., None, None]
            state = state + jnp.einsum("bh,bhk,bhj->bhkj", dt, x, b)
            return state, jnp.einsum("bhkj,bhj->bhk", state, c)

        state, y = jax.lax.scan(one, state, [v.swapaxes(0, 1) for v in (x, dt, log_a, b, c, reset_BL)])
        return y.swapaxes(0, 1), state

    def both(form: Any) -> Any:
        def total(*arguments: Any) -> jax.Array:
            y, state = form(*arguments)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

        arguments = (x, dt, log_a, b, c, start)
        return jax.jit(form)(*arguments), jax.jit(jax.grad(total, tuple(range(6))))(*arguments)

    def chunked(x, dt, log_a, b, c, start):
        return state_space(x, dt, log_a, b, c, reset_BL, start, chunk=6)

    tree_close(both(chunked), both(plain))


@pytest.mark.parametrize("kind", FEW)
def test_gradients_are_finite_where_gates_are_saturated(kind):
    module, params = make(kind, settings(kind))
    reset_BL, valid_BL = rows([[5, 16], [20]])

    @jax.jit
    def gradients(scale: jax.Array) -> Any:
        def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(run(module, params, x_BLD, reset_BL, valid_BL)[0]))

        return jax.grad(loss, (0, 1))(jax.tree.map(lambda p: p * scale, params), inputs(2, 21) * scale)

    for scale in (0.0, 1e-3, 30.0):
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients(jnp.float32(scale))))


@pytest.mark.parametrize("kind", few(("mamba2", "rglru", "lstm", "conv"), 2))
def test_bfloat16_is_close_to_float32_and_keeps_its_recurrence_in_float32(kind):
    c = settings(kind)
    half = settings(kind)
    half.dtype = "bfloat16"
    _, params = make(kind, c)
    x_BLD, (reset_BL, valid_BL) = inputs(2, 21), rows([[21], [9, 8]])
    module, start = recurrent.MIXERS[kind](FrozenConfigDict(half)), recurrent.init_state(half, kind, 2)
    y_BLD, state = jax.eval_shape(functools.partial(run, module), params, x_BLD, reset_BL, valid_BL, start)
    assert y_BLD.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for name, s in state.items() if "conv" not in name)

    def loss(params: Any, c: Any) -> tuple[jax.Array, jax.Array]:
        module = recurrent.MIXERS[kind](FrozenConfigDict(c))
        y_BLD = run(module, params, x_BLD, reset_BL, valid_BL)[0] * valid_BL[:, :, None]
        return jnp.sum(jnp.square(y_BLD.astype(jnp.float32))), y_BLD

    (grads, y_BLD), (exact_grads, exact_BLD) = (
        jax.jit(jax.grad(functools.partial(loss, c=x), has_aux=True))(params) for x in (half, c)
    )
    tree_close(y_BLD.astype(jnp.float32), exact_BLD, 0.03)
    whole, exact = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (grads, exact_grads))
    assert jnp.linalg.norm(whole - exact) < 0.05 * jnp.linalg.norm(exact)


# How they start


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_start_as_their_papers_say(kind):
    width = 256 if kind == "rglru" else 64
    c = settings(kind, width=width)
    c.heads = 64
    x_BLD = inputs(1, 3)
    params = jax.jit(recurrent.MIXERS[kind](c).init)(jax.random.key(0), x_BLD, *rows([[3]]), None)["params"]

    def within(values: Any, low: float, high: float) -> None:
        """In the range, and reaching most of it."""
        assert low * 0.999 <= values.min() < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < values.max() <= high * 1.001

    if kind in ("rnn", "lstm"):
        bias_IR = np.zeros((4 if kind == "lstm" else 1, width))
        bias_IR[1:2] = 1.0  # the forget gate
        np.testing.assert_array_equal(params["bias"], bias_IR)
        for k in range(len(bias_IR)):
            u = params["hidden"]["kernel"][:, k]
            np.testing.assert_allclose(u @ u.T, np.eye(width), atol=1e-4)
    elif kind == "rglru":
        within(np.exp(-8 * np.logaddexp(0, np.asarray(params["Lambda"]))), 0.9, 0.999)
        np.testing.assert_allclose(params["input_gate"]["kernel"].std(), 0.5, rtol=0.1)  # blocks of 4
    elif kind == "conv":
        within(np.asarray(params["conv"]["kernel"]), -(3**-0.5), 3**-0.5)
    else:
        within(np.exp(np.asarray(params["A_log"])), 1.0, 16.0)
        within(np.log(np.logaddexp(0, np.asarray(params["dt_bias"]))) / np.log(10) + 4, 1.0, 3.0)
        np.testing.assert_array_equal(params["D"], np.ones(64))


# Against PyTorch


def torch_weights(params: Any, names: dict[str, Any]) -> dict[str, Any]:
    """Their names -> tensors, each from (our path, function of our array)."""
    torch = pytest.importorskip("torch")
    flat = traverse_util.flatten_dict(params, sep="/")
    return {
        theirs: torch.tensor(np.ascontiguousarray(turn(*(np.asarray(flat[path]) for path in paths))))
        for theirs, (turn, *paths) in names.items()
    }


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_a_cell_equals_pytorchs(kind):
    torch = pytest.importorskip("torch")
    module, params = make(kind, settings(kind))
    theirs = (torch.nn.LSTM if kind == "lstm" else torch.nn.RNN)(16, 12, batch_first=True)
    theirs.load_state_dict(
        torch_weights(
            params,
            {
                "weight_ih_l0": (lambda w: w.reshape(16, -1).T, "input/kernel"),
                "weight_hh_l0": (lambda w: w.reshape(12, -1).T, "hidden/kernel"),
                "bias_ih_l0": (lambda b: b.reshape(-1), "bias"),
                "bias_hh_l0": (lambda b: 0 * b.reshape(-1), "bias"),
            },
        )
    )
    x_BLD = inputs(1, 13)
    with torch.no_grad():
        hidden_BLR = theirs(torch.tensor(np.asarray(x_BLD)))[0].numpy()
    expected_BLD = hidden_BLR @ params["out"]["kernel"] + params["out"]["bias"][None, None]
    np.testing.assert_allclose(run(module, params, x_BLD, *rows([[13]]))[0], expected_BLD, rtol=0, atol=1e-5)


def test_the_rglru_block_equals_recurrentgemmas():
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    module, params = make("rglru", settings("rglru", width=16))
    sizes = {"hidden_size": 16, "lru_width": 16, "num_attention_heads": 4, "conv1d_width": 3, "num_hidden_layers": 3}
    block = hf.RecurrentGemmaRecurrentBlock(hf.RecurrentGemmaConfig(**sizes, intermediate_size=32, vocab_size=8), 0)
    names = {f"linear_{theirs}.{w}": (np.transpose, f"{ours}/{k}") for theirs, ours in
             (("x", "input"), ("y", "gate"), ("out", "out")) for w, k in (("weight", "kernel"), ("bias", "bias"))}  # fmt: skip
    names |= {f"rg_lru.{theirs}_gate_{w}": (lambda a: a, f"{ours}_gate/{k}") for theirs, ours in
              (("input", "input"), ("recurrent", "recurrence")) for w, k in (("weight", "kernel"), ("bias", "bias"))}  # fmt: skip
    names |= {"conv_1d.weight": (lambda w: w.T[:, None], "conv/kernel"), "conv_1d.bias": (lambda b: b, "conv/bias")}
    names |= {"rg_lru.recurrent_param": (lambda p: p, "Lambda")}
    block.load_state_dict(torch_weights(params, names))
    x_BLD = inputs(2, 13)
    with torch.no_grad():
        expected_BLD, _ = block(torch.tensor(np.asarray(x_BLD)), torch.arange(13)[None].expand(2, 13), None, False)
    np.testing.assert_allclose(run(module, params, x_BLD, *rows([[13]] * 2))[0], expected_BLD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", few([21, 5]))
def test_the_mamba2_mixer_equals_transformers(length):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    c = settings("mamba2")
    c.bias = ()
    module, params = make("mamba2", c)
    mixer = hf.Mamba2Mixer(
        hf.Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=5, n_groups=2, expand=2, conv_kernel=4,
                        chunk_size=8, layer_norm_epsilon=c.norm_epsilon, num_hidden_layers=1, vocab_size=8), 0)  # fmt: skip
    names = {
        "in_proj.weight": (
            lambda *w: np.concatenate(w, 1).T,
            *(f"{k}/kernel" for k in ("gate", "input", "state", "dt")),
        ),
        "conv1d.weight": (lambda *w: np.concatenate(w, 1).T[:, None], "conv/kernel", "state_conv/kernel"),
        "conv1d.bias": (lambda *b: np.concatenate(b), "conv/bias", "state_conv/bias"),
        "out_proj.weight": (np.transpose, "out/kernel"),
        "norm.weight": (lambda s: s, "norm/scale"),
    }
    names |= {name: (lambda p: p, name) for name in ("A_log", "D", "dt_bias")}
    mixer.load_state_dict(torch_weights(params, names))
    x_BLD = inputs(2, length)
    with torch.no_grad():
        expected_BLD = mixer(torch.tensor(np.asarray(x_BLD)))
    np.testing.assert_allclose(run(module, params, x_BLD, *rows([[length]] * 2))[0], expected_BLD, rtol=0, atol=2e-5)


# In the network


@pytest.mark.slow
def test_a_stack_of_all_mixers_gives_the_same_losses_on_a_mesh_and_rematerialised():
    changes = {
        "model__pattern": KINDS, "model__layers": 4, "model__mlp": "none", "model__position": "none",
        "model__recurrent__state_size": 8, "model__recurrent__groups": 2, "model__recurrent__chunk": 4,
    }  # fmt: skip
    plain, _ = losses_of(tiny_config(**changes), mesh_of("data=1"), steps=6)
    sharded, _ = losses_of(tiny_config(**changes, model__remat="full"), mesh_of("fsdp=2 tensor=2"), steps=6)
    np.testing.assert_allclose(sharded, plain, rtol=0, atol=1e-5)
    assert plain[-1] < plain[0]
