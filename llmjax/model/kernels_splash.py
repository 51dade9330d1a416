"""Splash attention: JAX's own Pallas kernel for TPU, which never holds the scores of more than a few blocks.

A softmax over blocks of queries and keys (Dao et al. 2022) that skips blocks in which nothing is seen. The mask is a
`views.Pattern`: its band (causal, window) is static and decides at compile time which blocks are skipped; its segments
are data. On other platforms than TPU the kernel runs interpreted, for tests.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from llmjax.model.per_device import copied, divided, run_manual, ways
from llmjax.model.views import Pattern

LANES = 128  # lengths are padded to multiples of it
BLOCKS = (512, 384, 256, 128)  # queries or keys of a block: the largest that divides the length


def attention(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    pattern: Pattern,
    *,
    interpret: bool,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """`attention.reference` for a pattern: y_BLHK.

    Under a mesh each device computes its own rows, queries and heads, with all keys of its rows.

    Args:
        interpret: run the kernel step by step in JAX, which other platforms than TPU need.
        scale: times the products of queries and keys; 0: 1/sqrt(K).
        soft_cap: scores become cap * tanh(scores / cap) (Gemma 2); 0: off.
        sinks_H: float32, see `attention.softmax`.
    """
    (L, H, K), M = q_BLHK.shape[1:], k_BMGK.shape[1]
    axes = divided("BLH", q_BLHK.shape[:3])
    query_ways, head_ways = ways(axes["L"]), ways(axes["H"])
    k_BMGK, v_BMGK = (copied(x, axes["H"]) for x in (k_BMGK, v_BMGK))
    q_BLHK = (q_BLHK.astype(jnp.float32) * (scale or K**-0.5)).astype(q_BLHK.dtype)
    # Padding is a segment of its own, behind everything.
    more_L, more_M = -L % (LANES * query_ways), -M % LANES
    if pattern.banded:
        more_M = more_L
    q, k, v = (_heads_first(x, more) for x, more in ((q_BLHK, more_L), (k_BMGK, more_M), (v_BMGK, more_M)))
    segments = [
        jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, more)), constant_values=-1)
        for ids, more in ((pattern.queries_BL, more_L), (pattern.keys_BM, more_M))
    ]
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_mask(pattern, q.shape[2], k.shape[2])] * (H // head_ways)),
        block_sizes=_block_sizes(q.shape[2] // query_ways, k.shape[2]),
        head_shards=1,
        q_seq_shards=query_ways,
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name="context",
        interpret=interpret,
    )

    def run(
        kernel: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        queries_BL: jax.Array,
        keys_BM: jax.Array,
        *sinks: jax.Array,
    ) -> Any:
        ids = splash.SegmentIds(queries_BL, keys_BM)
        return jax.vmap(lambda *row: kernel(*row, *sinks))(q, k, v, ids)

    # What the kernel knows of blocks is (1, blocks of queries, blocks of keys), and of queries (L): a band has no other
    # parts. `kernel.manual_sharding_spec` says the same, but not where other axes are manual already.
    L_axes = axes["L"] or None
    parts = jax.tree.map(lambda x: PartitionSpec(L_axes) if x.ndim == 1 else PartitionSpec(None, L_axes), kernel)
    sinks = () if sinks_H is None else (sinks_H,)
    dimensions = (parts, "BHLK", "BHMK", "BHMK", "BL", "BM", *("H" for _ in sinks))
    y_BHLK = run_manual(run, (kernel, q, k, v, *segments, *sinks), dimensions, "BHLK", axes)
    return y_BHLK[:, :, :L].transpose(0, 2, 1, 3)


def _heads_first(x_BLHK: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x_BLHK, ((0, 0), (0, more), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    """Blocks of the forward pass and of two backward ones.

    One kernel for both gradients would keep a copy of the queries' gradient for every block of keys.
    """
    q, kv = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip


def _mask(pattern: Pattern, queries: int, keys: int) -> splash.Mask:
    if not pattern.banded:
        return splash.FullMask((queries, keys))
    before = pattern.window - 1 if pattern.window else None
    return _Band((queries, keys), (before, 0 if pattern.causal else before), 0)


class _Band(splash.LocalMask):
    """`LocalMask` that knows without reading every number whether a block is seen as a whole, or not at all.

    At 128k tokens the difference is minutes of compile time.
    """

    def __getitem__(self, blocks: tuple[slice, slice]) -> np.ndarray:
        rows, columns = blocks
        shape = rows.stop - rows.start, columns.stop - columns.start
        nearest, farthest = rows.start - (columns.stop - 1), rows.stop - 1 - columns.start  # of a query after a key
        before, after = (math.inf if size is None else size for size in self.window_size)
        if -after <= nearest and farthest <= before:
            return np.broadcast_to(np.True_, shape)
        if farthest < -after or nearest > before:
            return np.broadcast_to(np.False_, shape)
        return super().__getitem__(blocks)
