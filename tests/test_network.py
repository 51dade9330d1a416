"""The parts of the network that not every model has: patterns of layers, encoders, two streams, memories, many heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import close, make, settings

from llmjax import config
from llmjax.model import stacks, transformer
from llmjax.model.cache import init_cache
from llmjax.model.count import flops_per_token, param_count
from llmjax.model.positions import rotary_frequencies
from llmjax.model.two_stream import init_memory


def slow(value: str) -> Any:
    """A case that runs with the slow tests; its kind is among the others too."""
    return pytest.param(value, marks=pytest.mark.slow)


TOKENS_BL = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)


@functools.lru_cache(maxsize=32)
def applied(module: transformer.Transformer, output: str) -> Any:
    return jax.jit(functools.partial(module.apply, output=output))


def run(module: transformer.Transformer, params: Any, tokens_BL: jax.Array = TOKENS_BL, **arguments: Any) -> Any:
    return applied(module, arguments.pop("output", "logits"))({"params": params}, tokens_BL, **arguments)


def influence(module: transformer.Transformer, params: Any, **arguments: Any) -> np.ndarray:
    """seen[l, m]: whether what is predicted at l depends on the token at m (all tokens of the row are different)."""
    tokens_BL = jnp.arange(12)[None]
    direction_V = jax.random.normal(jax.random.key(5), (32,))

    @jax.jit
    @jax.jacrev
    def of_embedding(embedding_VD: jax.Array) -> jax.Array:
        changed = {**params, "embedding": embedding_VD}
        return module.apply({"params": changed}, tokens_BL, **arguments)[0] @ direction_V

    return np.abs(np.asarray(of_embedding(params["embedding"]))).max(-1)[:, :12] > 0


# Which layers are scanned together


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": 3}, [("layers", 1, 3)]),
        ({"layers": 4, "pattern": ("local", "global")}, [("layers", 2, 2)]),
        ({"layers": 5, "pattern": ("local", "global")}, [("layers", 2, 2), ("last", 1, 1)]),
        ({"layers": 26, "pattern": ("rglru", "rglru", "local")}, [("layers", 3, 8), ("last", 1, 2)]),
        ({"layers": 8, "pattern": ("local",) * 5 + ("global",)}, [("layers", 6, 1), ("last", 1, 2)]),
        ({"layers": 4, "pattern": ("global", "global")}, [("layers", 1, 4)]),
        ({"layers": 5, "moe": {"experts": 4, "first": 1}}, [("first", 1, 1), ("layers", 1, 4)]),
        ({"layers": 6, "moe": {"experts": 4, "every": 2}}, [("layers", 2, 3)]),
    ],
    ids=str,
)
def test_layers_are_scanned_by_the_shortest_period(changes, expected):
    c = settings(**changes)
    assert [(s.name, len(s.kinds), s.repeats) for s in stacks.layer_stacks(c)] == expected
    slots = stacks.layer_slots(c)
    assert len(slots) == len(set(slots)) == c.layers
    sizes = {name: 0 for name, _, _ in expected}
    for prefix, _ in slots:
        sizes[prefix.partition("/")[0]] += 1
    assert sizes == {name: places * repeats for name, places, repeats in expected}


def test_a_pattern_computes_what_the_same_layers_do_without_one():
    plain, params = make(settings(layers=5))
    patterned = transformer.build(settings(layers=5, pattern=("local", "global"), window=99))
    stack = params["layers"]
    places = {str(i): jax.tree.map(lambda x: x[i:4:2], stack) for i in range(2)}  # noqa: B023
    rearranged = {**params, "layers": places, "last": jax.tree.map(lambda x: x[4:], stack)}
    close(run(patterned, rearranged), run(plain, params), 1e-5)


# Who sees whom


@pytest.mark.parametrize("position", ["rotary", slow("alibi"), slow("t5"), "xlnet"])
def test_local_layers_see_their_window_and_no_more(position):
    module, params = make(settings(layers=1, pattern=("local",), window=3, position=position, tie_embeddings=False))
    index = np.arange(12)
    distance = index[:, None] - index[None, :]
    np.testing.assert_array_equal(influence(module, params), (distance >= 0) & (distance < 3))


@pytest.mark.parametrize("position", ["rotary", slow("alibi"), slow("t5"), "xlnet", slow("learned")])
def test_tokens_see_those_whose_order_is_not_above_their_own(position):
    module, params = make(settings(position=position, tie_embeddings=False, layers=1))
    orders = np.random.default_rng(0).permutation(12)
    seen = influence(module, params, orders_BL=jnp.asarray(orders)[None])
    np.testing.assert_array_equal(seen, orders[None, :] <= orders[:, None])


def test_bidirectional_models_see_every_real_token_of_their_segment():
    module, params = make(settings(direction="bidirectional", tie_embeddings=False))
    segments = np.array([1] * 5 + [2] * 4 + [0] * 3)
    seen = influence(module, params, segments_BL=jnp.asarray(segments)[None])
    np.testing.assert_array_equal(seen, segments[None, :] == segments[:, None])


def test_queries_of_a_two_stream_model_see_lower_orders_and_never_their_own_token():
    c = settings(two_stream=True, position="xlnet", direction="bidirectional", types=2, tie_embeddings=False)
    module, params = make(c)
    orders = np.random.default_rng(1).permutation(12)
    at = np.array([7, 2, 11, 0])
    queries = {"positions": at[None], "orders": orders[at][None], "segments": np.ones((1, 4), np.int32)}
    seen = influence(module, params, orders_BL=jnp.asarray(orders)[None], queries=queries)
    np.testing.assert_array_equal(seen, orders[None, :] < orders[at][:, None])


# Encoders


# test_engine.py decodes with the cache of an encoder-decoder and compares with the plain forward pass.
@pytest.mark.parametrize("position", [slow("t5"), slow("sinusoidal"), slow("learned"), slow("rotary")])
def test_an_encoder_decoder_decodes_with_its_cache_as_without(position):
    module, params = make(settings(encoder_layers=2, position=position, norm_place="post"))
    source = {"tokens": (TOKENS_BL[:, :7] * 5) % 32, "segments": jnp.array([[1] * 7, [1] * 4 + [0] * 3])}
    expected = run(module, params, source=source)
    without_padding = {"tokens": source["tokens"][1:, :4]}
    close(run(module, params, TOKENS_BL[1:], source=without_padding), expected[1:], 1e-5)
    cache = init_cache(module.c, batch=2, length=12, source_length=7)
    logits_BLV, cache = run(module, params, TOKENS_BL[:, :8], source=source, cache=cache)
    found = [logits_BLV]
    for at in range(8, 12):
        positions_BL = jnp.full((2, 1), at)
        logits_BLV, cache = run(module, params, TOKENS_BL[:, at : at + 1], positions_BL=positions_BL, cache=cache)
        found.append(logits_BLV)
    close(jnp.concatenate(found, 1), expected, 1e-5)
    encoded = {"encoded": run(module, params, source=source, output="encoded"), "segments": source["segments"]}
    close(run(module, params, source=encoded), expected, 1e-6)


def test_every_document_of_a_packed_row_reads_its_own_source():
    module, params = make(settings(encoder_layers=1, position="t5"))
    segments_BL, source_segments_BM = jnp.array([[1] * 5 + [2] * 7]), jnp.array([[1] * 3 + [2] * 4])
    positions_BL = jnp.array([[*range(5), *range(7)]])
    tokens_BL, source_BM = TOKENS_BL[:1], TOKENS_BL[1:, :7]
    source = {"tokens": source_BM, "segments": source_segments_BM}
    together = run(module, params, tokens_BL, segments_BL=segments_BL, positions_BL=positions_BL, source=source)
    alone = [
        run(module, params, tokens_BL[:, :5], source={"tokens": source_BM[:, :3]}),
        run(module, params, tokens_BL[:, 5:], source={"tokens": source_BM[:, 3:]}),
    ]
    close(together, jnp.concatenate(alone, 1), 1e-5)


def test_a_prompt_that_sees_itself_whole_can_be_cached():
    module, params = make(settings(pattern=("global", "local"), window=5))
    orders_BL = jnp.maximum(jnp.arange(12)[None] - 5, 0) + jnp.zeros((2, 1), jnp.int32)
    expected = run(module, params, orders_BL=orders_BL)
    cache = init_cache(module.c, batch=2, length=16)
    prompt_BLV, cache = run(module, params, TOKENS_BL[:, :6], orders_BL=orders_BL[:, :6], cache=cache)
    close(prompt_BLV, expected[:, :6], 1e-5)
    rest_BL = jnp.arange(6, 12)[None] + jnp.zeros((2, 1), jnp.int32)
    rest_BLV, _ = run(module, params, TOKENS_BL[:, 6:], positions_BL=rest_BL, cache=cache)
    close(rest_BLV, expected[:, 6:], 1e-5)


@pytest.mark.parametrize("position", ["rotary", slow("alibi"), slow("t5"), slow("none")])
def test_local_attention_decodes_in_a_ring_of_its_window(position):
    """Wherever the prompt is cut, shorter or longer than the ring, padded or not, and however far decoding goes."""
    module, params = make(settings(position=position, pattern=("local", "local", "global"), layers=3, window=4))
    cache = init_cache(module.c, batch=2, length=64)
    sizes = {leaf.shape[3] for leaf in jax.tree.leaves(cache["layers"])}
    assert sizes == {4, 64}
    tokens_BL = jax.random.randint(jax.random.key(5), (2, 31), 0, 32)
    expected = run(module, params, tokens_BL)
    starts_B = np.array([0, 0])
    for length, valid in (
        (9, (9, 2)),
        (1, (1, 1)),
        (3, (2, 3)),
        (9, (6, 5)),
        (1, (1, 1)),
        (9, (8, 9)),
        (1, (1, 0)),
        (3, (2, 3)),
    ):
        valid_B, at_L = np.array(valid), np.arange(length)
        positions_BL = starts_B[:, None] + at_L
        segments_BL = (at_L < valid_B[:, None]).astype(np.int32)
        given_BL = np.where(segments_BL, np.take_along_axis(np.asarray(tokens_BL), positions_BL, 1), 31)
        found, cache = run(module, params, given_BL, positions_BL=positions_BL, segments_BL=segments_BL, cache=cache)
        for row in np.flatnonzero(valid):
            close(found[row, : valid[row]], expected[row, starts_B[row] : starts_B[row] + valid[row]], 1e-5)
        starts_B = starts_B + valid_B
    assert starts_B.tolist() == [30, 24]


# Memory


@pytest.mark.parametrize("place", ["pre", slow("post")])
def test_parts_with_a_memory_give_what_the_whole_row_gives_without(place):
    module, params = make(settings(position="xlnet", norm_place=place, layers=3, pattern=("global", "local"), window=6))
    whole = run(module, params)
    memory = init_memory(module.c, batch=2, length=12)
    parts = []
    for start in (0, 5, 8):
        stop = {0: 5, 5: 8, 8: 12}[start]
        logits_BLV, memory = run(module, params, TOKENS_BL[:, start:stop], memory=memory)
        parts.append(logits_BLV)
    close(jnp.concatenate(parts, 1), whole, 1e-5)


def test_no_gradient_flows_into_the_part_before():
    module, params = make(settings(position="xlnet", layers=2))

    def loss(embedding_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        changed = {**params, "embedding": embedding_VD}
        memory = init_memory(module.c, batch=1, length=6)
        _, memory = module.apply({"params": changed}, jnp.arange(6)[None], memory=memory)
        hidden = module.apply({"params": changed}, tokens_BL, memory=memory, output="hidden")[0]
        return jnp.sum(hidden**2)

    gradient = np.abs(np.asarray(jax.jit(jax.grad(loss))(params["embedding"], jnp.arange(6, 12)[None]))).max(-1)
    assert gradient[6:12].min() > 0 == gradient[:6].max()


# Heads


def test_heads_for_later_tokens_share_the_trunk_the_final_norm_and_the_head():
    module, params = make(settings(ahead=3, layers=3))
    logits_ABLV = run(module, params, output="ahead")
    assert logits_ABLV.shape == (3, 2, 12, 32)
    close(logits_ABLV[0], run(module, params), 1e-6)
    deeper = transformer.build(settings(layers=4))
    for head in range(2):
        stack = jax.tree.map(lambda a, b: jnp.concatenate([a, b[head][None]]), params["layers"], params["ahead"])  # noqa: B023
        close(logits_ABLV[head + 1], run(deeper, {**params, "layers": stack}), 1e-5)


def test_pooled_and_classes_come_from_the_first_token():
    module, params = make(settings(pooler=True, classes=3, direction="bidirectional"))
    hidden_BLD = run(module, params, output="hidden")
    pooled_BD = jnp.tanh(hidden_BLD[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"][None])
    close(run(module, params, output="pooled"), pooled_BD, 1e-5)
    classes = pooled_BD @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
    close(run(module, params, output="classes"), classes, 1e-5)


# Norms over the batch


def test_batch_norm_uses_the_real_tokens_of_the_batch_and_its_running_statistics_follow_them():
    c = settings(norm="batch", layers=1, final_norm=False, mlp="none")
    module, params = make(c)
    segments_BL = jnp.array([[1] * 12, [1] * 7 + [0] * 5])

    def loss(params: Any) -> jax.Array:
        logits_BLV = module.apply({"params": params}, TOKENS_BL, segments_BL=segments_BL, deterministic=False)
        return jnp.sum(logits_BLV[0])

    gradient = jax.jit(jax.grad(loss))(params)["layers"]["attention_norm"]
    seen = params["embedding"][TOKENS_BL][segments_BL > 0]
    running = params["layers"]["attention_norm"]
    close(gradient["running_mean"][0], running["running_mean"][0] - seen.mean(0), 1e-5)
    close(gradient["running_var"][0], running["running_var"][0] - seen.var(0), 1e-5)


# Positions and counting


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_stretched_rotary_positions_keep_fast_pairs_and_divide_the_slowest_by_the_factor(scaling):
    shape = {"width": 128, "heads": 1, "rotary_base": 10_000.0}
    stretch = {"rotary_scaling": scaling, "rotary_factor": 8.0, "rotary_original_length": 512, "rotary_fast": 32.0}
    plain, _ = rotary_frequencies(settings(**shape))
    stretched, _ = rotary_frequencies(settings(**shape, **stretch))
    ratio = plain / stretched
    assert ratio[-1] == pytest.approx(8.0, rel=1e-6)
    assert np.all(np.diff(ratio) >= -1e-9)
    assert ratio[0] == pytest.approx(8.0 if scaling == "linear" else 1.0, rel=1e-6)


def test_a_sparse_model_costs_its_active_experts_and_a_local_one_its_window():
    c = config.base().model
    c.vocab_size = 64
    dense = flops_per_token(c, sequence_length=512)
    c.pattern, c.window = ("local",), 128
    assert dense - flops_per_token(c, sequence_length=512) == 12 * c.layers * c.width * (512 - 128)
    c.pattern = ("global",)
    mlp, dense_count = 3 * c.width * 704, param_count(c)
    c.moe.experts, c.moe.active = 8, 2
    router = c.width * 8
    assert param_count(c) - dense_count == c.layers * (7 * mlp + router)
    assert flops_per_token(c, sequence_length=512) - dense == 6 * c.layers * (mlp + router)


def test_the_shapes_of_parameters_are_known_before_jax_starts(monkeypatch):
    """Checks trace networks, and a command chooses the CPU's devices after its checks."""
    transformer.param_shapes.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("JAX would start"))
    assert transformer.param_shapes(transformer.build(settings(attention="auto")))
