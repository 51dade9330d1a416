"""Kernels for accelerators equal the reference with packing and windows, and none is picked for a mask it cannot express."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, losses_of, mesh_of, tiny_config
from networks import close, logits_of, make, packed, settings

from llmjax.model import attention, kernels_splash
from llmjax.model.cache import init_cache
from llmjax.model.views import Keys, Pattern, Tokens, make_view, visible
from llmjax.parallel import placement

LENGTH = 300  # three blocks of 128, the last one padded
ROWS = [[70, 1, 200, 29], [300], [129, 100]]  # the last row ends in padding


def rows_of(lengths, length=LENGTH):
    """segments_BL of documents of these lengths, padded with 0."""
    made = np.zeros((len(lengths), length), np.int32)
    for row, parts in zip(made, lengths, strict=True):
        row[: sum(parts)] = np.repeat(np.arange(1, len(parts) + 1), parts)
    return jnp.asarray(made)


def inputs(*, queries=LENGTH, keys=LENGTH, heads=4, groups=2, size=8, rows=3, seed=0):
    """q, dy, k and v of a few rows."""
    rng = np.random.default_rng(seed)
    q_BLHK, dy_BLHK = rng.normal(size=(2, rows, queries, heads, size))
    k_BMGK, v_BMGK = rng.normal(size=(2, rows, keys, groups, size))
    return [jnp.asarray(x, jnp.float32) for x in (q_BLHK, dy_BLHK, k_BMGK, v_BMGK)]


def with_gradients(attend, q_BLHK, dy_BLHK, k_BMGK, v_BMGK):
    y_BLHK, pull = jax.vjp(attend, q_BLHK, k_BMGK, v_BMGK)
    return y_BLHK, *pull(dy_BLHK)


SPLASH = functools.partial(kernels_splash.attention, interpret=True)
PATTERNS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 40},
    "both sides": {},
    "window on both sides": {"window": 140},
}


@pytest.mark.parametrize(
    ("pattern", "groups"),
    few([("window on both sides", 2), ("causal", 4), ("causal", 1), ("window", 2), ("both sides", 1)]),
)
def test_splash_attention_and_its_gradients_equal_the_reference_on_packed_rows(pattern, groups, monkeypatch):
    monkeypatch.setattr(kernels_splash, "BLOCKS", (128,))
    segments_BL = rows_of(ROWS)
    made = Pattern(segments_BL, segments_BL, **PATTERNS[pattern])
    arguments = inputs(groups=groups)

    def more(q_BLHK):
        return {"scale": 0.3, "soft_cap": 5.0, "sinks_H": q_BLHK[0, 0, :, 0]} if groups == 2 else {}

    run = jax.jit(functools.partial(with_gradients, lambda q, k, v: SPLASH(q, k, v, made, **more(q))))
    plain = jax.jit(
        functools.partial(with_gradients, lambda q, k, v: attention.reference(q, k, v, made.mask(), **more(q)))
    )
    close(run(*arguments), plain(*arguments), 2e-5)


def test_splash_attention_to_another_text_equals_the_reference(monkeypatch):
    monkeypatch.setattr(kernels_splash, "BLOCKS", (128,))
    pattern = Pattern(rows_of([[50, 90], [100, 30]], 140), rows_of([[200, 60], [13, 260]], 280))
    arguments = inputs(queries=140, keys=280, rows=2)
    real_BL = (pattern.queries_BL > 0)[:, :, None, None]  # padding sees nothing, and what it gets is nobody's business
    arguments[1] = arguments[1] * real_BL
    run = jax.jit(functools.partial(with_gradients, lambda q, k, v: SPLASH(q, k, v, pattern) * real_BL))
    plain = functools.partial(with_gradients, lambda q, k, v: attention.reference(q, k, v, pattern.mask()) * real_BL)
    close(run(*arguments), jax.jit(plain)(*arguments), 2e-5)


@pytest.mark.parametrize("line", few(["fsdp=2 context=2 tensor=2", "data=2 tensor=2", "tensor=4", "context=2"]))
def test_splash_attention_on_a_mesh_equals_the_reference(line, monkeypatch):
    monkeypatch.setattr(kernels_splash, "BLOCKS", (128,))
    segments_BL = rows_of([[256], [100, 156]], 256)
    pattern = Pattern(segments_BL, segments_BL, causal=True, window=150)
    arguments = inputs(queries=256, keys=256, rows=2)  # with tensor=4 each device needs one half of a group
    plain = functools.partial(
        with_gradients, lambda q, k, v: attention.reference(q, k, v, pattern.mask(), sinks_H=q[0, 0, :, 0])
    )
    expected = jax.jit(plain)(*arguments)
    c = tiny_config(model__kv_heads=2)
    with placement.active(mesh_of(line), c):
        run = jax.jit(
            functools.partial(with_gradients, lambda q, k, v: SPLASH(q, k, v, pattern, sinks_H=q[0, 0, :, 0]))
        )
        close(run(*arguments), expected, 2e-5)


@pytest.mark.slow
def test_a_model_learns_the_same_with_splash_attention_in_the_stages_of_a_pipeline():
    losses = {}
    for name, line in (("reference", "data=1"), ("splash", "pipeline=2 tensor=2")):
        c = tiny_config(model__attention=name, model__kv_heads=2)
        losses[name], _ = losses_of(c, mesh_of(line), steps=2)
    np.testing.assert_allclose(losses["splash"], losses["reference"], rtol=0, atol=1e-5)


def test_the_numbers_of_blocks_are_those_of_the_whole_mask():
    for window, causal in ((0, True), (100, True), (100, False), (384, True)):
        shape, pattern = (512, 512), Pattern(jnp.zeros((1, 1)), jnp.zeros((1, 1)), causal=causal, window=window)
        lazy = kernels_splash._mask(pattern, *shape)
        whole = Pattern(jnp.zeros((1, 512)), jnp.zeros((1, 512)), causal=causal, window=window).mask()[0]
        for rows in range(0, 512, 128):
            for columns in range(0, 512, 64):
                block = slice(rows, rows + 128), slice(columns, columns + 64)
                np.testing.assert_array_equal(lazy[block], whole[block])


@pytest.mark.parametrize("kind", ["global", "local"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_a_pattern_is_the_mask_that_it_stands_for(kind, direction):
    c = settings(direction=direction, window=3)
    segments_BL = rows_of([[4, 5], [9], [2, 2, 1]], 9)
    index_BL = jnp.broadcast_to(jnp.arange(9)[None], segments_BL.shape)
    orders_BL = index_BL if direction == "causal" else jnp.zeros_like(index_BL)
    tokens = Tokens(index_BL, index_BL, segments_BL, orders_BL)
    keys = Keys(tokens, visible(tokens, tokens))
    rules = {"bidirectional": direction != "causal", "causal": direction == "causal", "in_order": True}
    plain, short = (make_view(c, kind, tokens, keys, **rules, by_pattern=by_pattern) for by_pattern in (False, True))
    assert short.mask_BLM is None
    np.testing.assert_array_equal(short.mask(), plain.mask_BLM)


def spied(monkeypatch):
    """The calls of splash attention from now on."""
    calls = []

    def spy(*arguments, **more):
        calls.append(arguments[3])
        return attention.splash(*arguments, **more)

    monkeypatch.setitem(attention.BY_PATTERN, "splash", spy)
    return calls


def test_masks_that_are_no_patterns_never_go_to_a_kernel_that_takes_patterns(monkeypatch):
    calls = spied(monkeypatch)
    plain, (module, params) = make(settings())[0], make(settings(attention="splash"))
    tokens_BL = jnp.arange(12)[None] % 7
    positions_BL, segments_BL = packed([[5, 7]])
    whole = {"positions_BL": positions_BL, "segments_BL": segments_BL}
    orders_BL = jnp.maximum(positions_BL - 3, 0)  # a prefix of four tokens that see each other
    for more in (whole, {**whole, "orders_BL": orders_BL}):
        close(logits_of(module, params, tokens_BL, **more), logits_of(plain, params, tokens_BL, **more), 1e-5)
        assert bool(calls) == ("orders_BL" not in more)
        calls.clear()
    apply, cache = jax.jit(module.apply), init_cache(module.c, batch=1, length=16)
    first, cache = apply({"params": params}, tokens_BL, cache=cache)
    after, _ = apply({"params": params}, tokens_BL[:, :1], positions_BL=jnp.array([[12]]), cache=cache)
    expected = jax.jit(plain.apply)({"params": params}, jnp.concatenate([tokens_BL, tokens_BL[:, :1]], axis=1))
    close(jnp.concatenate([first, after], axis=1), expected, 1e-5)
    assert not calls


def test_every_attention_of_an_encoder_and_decoder_goes_by_pattern_and_equals_the_reference(monkeypatch):
    changes = {"encoder_layers": 1, "position": "learned"}
    plain, (module, params) = make(settings(**changes))[0], make(settings(attention="splash", **changes))
    calls = spied(monkeypatch)
    source = {"tokens": jnp.arange(9)[None], "segments": rows_of([[4, 3]], 9)}
    tokens_BL, (positions_BL, segments_BL) = jnp.arange(12)[None], packed([[5, 7]])
    more = {"positions_BL": positions_BL, "segments_BL": segments_BL, "source": source}
    close(logits_of(module, params, tokens_BL, **more), logits_of(plain, params, tokens_BL, **more), 1e-5)
    asked = {(p.causal, p.queries_BL.shape[1], p.keys_BM.shape[1]) for p in calls}
    assert asked == {(False, 9, 9), (True, 12, 12), (False, 12, 9)}


def test_cudnn_is_given_the_whole_mask_and_what_it_may_skip(monkeypatch):
    given = []
    original = jax.nn.dot_product_attention

    def spy(*arguments, implementation, **more):
        given.append((implementation, more["is_causal"]))
        return original(*arguments, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    segments_BL = rows_of(ROWS)
    mask_BLM = Pattern(segments_BL, segments_BL, causal=True, window=40).mask()
    arguments = inputs()
    expected = jax.jit(functools.partial(with_gradients, lambda *x: attention.reference(*x, mask_BLM)))(*arguments)
    for line, causal in (("data=1", True), ("data=3 tensor=2", True), ("context=2 tensor=2", False)):
        given.clear()
        with placement.active(mesh_of(line), tiny_config(model__kv_heads=2)):
            run = functools.partial(with_gradients, lambda *x: attention.cudnn(*x, mask_BLM, causal=True))
            close(jax.jit(run)(*arguments), expected, 2e-6)
        assert given == [("cudnn", causal)], "a device with some of the queries has the mask alone to go by"


def test_the_fastest_kernel_that_can_is_chosen_and_why_others_were_passed_over_is_said():
    def said(platform, any_mask=False, **changes):
        return str(attention.choose(settings(attention="auto", **changes), platform=platform, any_mask=any_mask))

    assert said("cpu") == "blocked"
    assert said("tpu") == "splash"
    assert said("gpu") == "dot_product; not cudnn, which is only taken when model.attention=cudnn asks for it"
    assert said("tpu", attention_soft_cap=30.0) == "splash"
    assert said("tpu", position="t5") == "dot_product; not splash, which cannot do model.position=t5"
    assert said("tpu", any_mask=True) == "dot_product; not splash, which cannot do masks that come with the rows"
    lacking = "cannot do model.attention_dropout=0.1"
    assert (
        said("tpu", attention_dropout=0.1)
        == f"reference; not splash, which {lacking}; not dot_product, which {lacking}"
    )
    named = settings(attention="cudnn", dtype="bfloat16", head_size=8)
    assert str(attention.choose(named, platform="gpu")) == "cudnn"
    assert str(attention.choose(named, platform="cpu")) == "blocked; not cudnn, which needs a GPU"


def test_the_devices_of_the_mesh_say_what_the_program_will_run_on():
    assert attention.platform() == jax.default_backend() == "cpu"
    with jax.set_mesh(mesh_of("data=2")):
        assert attention.platform() == "cpu"
