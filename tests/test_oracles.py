"""Architectures without a reference implementation equal plain forward passes written from their papers.

The configs are the `tiny` ones of configs/models/, so that what is published there under a paper's name is that paper's
network. Rows are packed with several documents and padded; the oracles see one document at a time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import few
from networks import settings

from llmjax import config
from llmjax.model import positions
from llmjax.model.stacks import layer_slots
from llmjax.model.transformer import build, param_shapes
from llmjax.parallel.placement import path_name

MODELS = Path(__file__).parent.parent / "configs" / "models"
SEEDS = [0, 1, 2]
LENGTHS = [[9, 3, 12], [20], [1, 21]]  # documents in the rows of 26 places


def tiny(family: str, **changes: Any) -> config.ConfigDict:
    """`config.model` of a family's tiny size, with 61 tokens."""
    c = config.load(f"{MODELS / family}.py:tiny").copy_and_resolve_references().unlock().model
    c.update({"vocab_size": 61, **changes})
    return c


def random_params(c: config.ConfigDict, seed: int) -> tuple[Any, oracles.Params]:
    """Random parameters far from where training starts them: as our tree, and flat in float64."""
    rng = np.random.default_rng(seed)
    shapes = param_shapes(build(c))

    def draw(path: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        name = path_name(path)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.3 * values, leaf.dtype)
        small = 0.3 if name.endswith("bias") else 0.5 if "embedding" in name else c.width**-0.5
        return jnp.asarray(values * small, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    flat = {path_name(path): np.asarray(a, np.float64) for path, a in jax.tree_util.tree_leaves_with_path(params)}
    return params, flat


def pack(lengths: list[list[int]], *, seed: int, width: int = 26, vocab: int = 61) -> dict[str, np.ndarray]:
    """Rows of documents of these lengths: tokens, positions and segments (0 where there is padding), (B, L)."""
    rows = {name: np.zeros((len(lengths), width), np.int32) for name in ("tokens", "positions", "segments")}
    rows["tokens"][:] = np.random.default_rng((seed, 1)).integers(0, vocab, rows["tokens"].shape)
    for b, documents in enumerate(lengths):
        for i, (start, end) in enumerate(spans(documents)):
            rows["positions"][b, start:end] = np.arange(end - start)
            rows["segments"][b, start:end] = i + 1
    return rows


def spans(documents: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(documents)
    return [(int(end) - length, int(end)) for length, end in zip(documents, ends, strict=True)]


def run(c: config.ConfigDict, params: Any, rows: dict[str, np.ndarray], **given: Any) -> np.ndarray:
    """Our logits of packed rows."""
    arguments = {"positions_BL": rows["positions"], "segments_BL": rows["segments"], **given}
    return np.asarray(jax.jit(build(c).apply)({"params": params}, rows["tokens"], **arguments))


def assert_equal(ours_LV: np.ndarray, oracle_LV: np.ndarray) -> None:
    assert 0.1 < oracle_LV.std() < 20, "logits of no ordinary size"
    np.testing.assert_allclose(ours_LV, oracle_LV, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours_LV.argmax(-1), oracle_LV.argmax(-1))


def compare(c: config.ConfigDict, seed: int, oracle: Callable[[oracles.Params, np.ndarray], np.ndarray]) -> None:
    """Our packed rows against the oracle's documents."""
    params, flat = random_params(c, seed)
    rows = pack(LENGTHS, seed=seed)
    logits_BLV = run(c, params, rows)
    for b, documents in enumerate(LENGTHS):
        for start, end in spans(documents):
            assert_equal(logits_BLV[b, start:end], oracle(flat, rows["tokens"][b, start:end]))


@pytest.mark.parametrize("seed", few(SEEDS))
def test_palm_equals_the_paper(seed: int) -> None:
    compare(tiny("palm"), seed, oracles.palm)


@pytest.mark.parametrize("seed", few(SEEDS))
def test_lamda_equals_the_paper(seed: int) -> None:
    c = tiny("lamda", relative_buckets=8, relative_max_distance=16)
    compare(c, seed, lambda p, tokens: oracles.lamda(p, tokens, most=16))


@pytest.mark.parametrize("seed", few(SEEDS))
def test_gpt3_equals_the_paper(seed: int) -> None:
    c = tiny("gpt3", window=6)
    compare(c, seed, lambda p, tokens: oracles.gpt3(p, tokens, window=6))


@pytest.mark.parametrize("seed", few(SEEDS))
def test_griffin_equals_the_paper(seed: int) -> None:
    c = tiny("griffin", layers=7, window=6)  # two periods of three layers, and one that is left
    kinds = [c.pattern[i % len(c.pattern)] for i in range(c.layers)]
    layers = [(*slot, kind) for slot, kind in zip(layer_slots(c), kinds, strict=True)]
    compare(c, seed, lambda p, tokens: oracles.griffin(p, tokens, layers, window=6, scale=c.embedding_scale))


@pytest.mark.parametrize("seed", few(SEEDS))
def test_deepnorm_equals_the_paper(seed: int) -> None:
    c = settings(layers=4, norm="layer", norm_place="post", final_norm=False, bias=("qkv", "out", "mlp", "norm"))
    c.update({"activation": "relu", "position": "learned", "vocab_size": 61, "residual_scale": 8**0.25})
    compare(c, seed, oracles.deepnorm)


@pytest.mark.parametrize("seed", few(SEEDS))
def test_the_original_transformer_equals_the_paper(seed: int) -> None:
    c = tiny("transformer")
    params, flat = random_params(c, seed)
    sources = [[12, 2, 5], [1], [7, 13]]  # of each target, the text it is made from
    rows, source = pack(LENGTHS, seed=seed), pack(sources, seed=seed + 100, width=22)
    logits_BLV = run(c, params, rows, source=source)
    for b, documents in enumerate(LENGTHS):
        for (start, end), (first, last) in zip(spans(documents), spans(sources[b]), strict=True):
            oracle = oracles.transformer(flat, source["tokens"][b, first:last], rows["tokens"][b, start:end])
            assert_equal(logits_BLV[b, start:end], oracle)


@pytest.mark.parametrize("seed", few(SEEDS))
@pytest.mark.parametrize("mode", ["bidirectional", "left-to-right", "right-to-left", "sequence-to-sequence"])
def test_unilm_equals_the_paper_under_each_of_its_masks(mode: str, seed: int) -> None:
    c = tiny("unilm")
    params, flat = random_params(c, seed)
    rows = pack(LENGTHS, seed=seed)
    place = rows["positions"]
    types = np.where(place < 5, 4, 5).astype(np.int32)
    orders = {
        "bidirectional": np.zeros_like(place),
        "left-to-right": place,
        "right-to-left": -place,
        "sequence-to-sequence": np.maximum(place - 4, 0),  # 5 source tokens
    }[mode]
    logits_BLV = run(c, params, rows, orders_BL=orders, types_BL=types)
    for b, documents in enumerate(LENGTHS):
        for start, end in spans(documents):
            mask = oracles.unilm_mask(mode, end - start, min(5, end - start))
            oracle = oracles.unilm(flat, rows["tokens"][b, start:end], types[b, start:end], mask)
            assert_equal(logits_BLV[b, start:end], oracle)


SIZE, BASE, FACTOR, LENGTH = 16, 1000.0, 8.0, 64
SCALINGS: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
    "linear": lambda: (oracles.rotary_linear(SIZE, BASE, FACTOR), 1.0),
    "ntk": lambda: (oracles.rotary_ntk(SIZE, BASE, FACTOR), 1.0),
    "yarn": lambda: oracles.rotary_yarn(SIZE, BASE, FACTOR, LENGTH, slow=1.0, fast=16.0),
    "llama3": lambda: (oracles.rotary_llama3(SIZE, BASE, FACTOR, LENGTH, slow=1.0, fast=4.0), 1.0),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_stretched_rotary_positions_equal_their_formulas(name: str) -> None:
    """The frequencies, and the logits of a network (PaLM's) that uses them."""
    c = tiny("palm", head_size=SIZE, rotary_base=BASE, rotary_factor=FACTOR, rotary_scaling=name)
    c.update({"rotary_original_length": LENGTH, "rotary_slow": 1.0, "rotary_fast": 16.0 if name == "yarn" else 4.0})
    frequencies, factor = SCALINGS[name]()
    ours, ours_factor = positions.rotary_frequencies(c)
    np.testing.assert_allclose(ours, frequencies, rtol=1e-12)
    assert ours_factor == pytest.approx(factor, rel=1e-12)
    plain = oracles.rotary(SIZE, BASE)
    assert not np.allclose(frequencies, plain) and np.all(frequencies <= plain * (1 + 1e-12))
    compare(c, 0, lambda p, t: oracles.palm(p, t, turn=oracles.rotation(frequencies, len(t), factor)))


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (20, 1000), (64, 50)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_t5_buckets_equal_the_paper(buckets: int, most: int, both_ways: bool) -> None:
    c = settings(position="t5", relative_buckets=buckets, relative_max_distance=most)
    offsets = np.arange(-300, 301)
    ours = positions.t5_buckets(-jnp.asarray(offsets)[None, None], c, bidirectional=both_ways)[0, 0]
    oracle = [oracles.t5_bucket(int(offset), buckets, most, both_ways=both_ways) for offset in offsets]
    np.testing.assert_array_equal(ours, oracle)
