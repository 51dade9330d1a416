"""The network, from token ids to logits: embed, blocks scanned over stacked parameters, norm, head.

One module covers every architecture by configuration (`config.model`): decoders, encoders, encoder-decoders, recurrent
networks and their mixtures. To add a mixer, add a row to `recurrent.MIXERS`, or a kind of attention to `views.make_view`.
Norms, activations and positions are branches or tables in `layers.py` and `positions.py`, attention kernels are rows of
`attention.KERNELS`, and initialisation schemes are rows of the table in `init.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from llmjax.config.model_checks import ATTENTION
from llmjax.errors import UserError
from llmjax.model import two_stream
from llmjax.model.attention import Attend, takes_patterns
from llmjax.model.block import Block, Inputs, RunLayers, run_stacks
from llmjax.model.cache import Cache, cached_keys
from llmjax.model.embedding import make_embed
from llmjax.model.head import ClassHead, Head, ValueHead
from llmjax.model.init import initializer
from llmjax.model.layers import Norm, dtype_of
from llmjax.model.per_device import traced_for
from llmjax.model.stacks import layer_stacks
from llmjax.model.views import Keys, Pattern, Tokens, View, make_tokens, make_view, visible

Source = dict[str, jax.Array]


class Encoder(nn.Module):
    """The bidirectional stack of an encoder-decoder: x_BMD -> encoded_BMD."""

    c: ConfigDict
    deterministic: bool = True
    run_layers: RunLayers | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(self, x_BMD: jax.Array, tokens: Tokens) -> jax.Array:
        c = self.c
        view = make_view(
            c,
            "global",
            tokens,
            Keys(tokens, visible(tokens, tokens)),
            bidirectional=True,
            in_order=True,
            by_pattern=takes_patterns(c, self.attend),
            relative_embedding=relative_table(self),
        )
        inputs = Inputs({"global": view}, tokens.segments > 0, tokens.positions == 0)
        x_BMD, _ = run_stacks(self, x_BMD, inputs, {}, deterministic=self.deterministic, encoder=True)
        return final_norm(c, self.deterministic)(x_BMD, inputs.valid_BL)


def relative_table(module: nn.Module) -> jax.Array | None:
    """T5's (buckets, H) table, shared by the layers of a stack; a parameter of `module`. None without T5's positions."""
    c = module.c
    if c.position != "t5":
        return None
    shape, dtype = (c.relative_buckets, c.heads), dtype_of(c.param_dtype)
    return module.param("relative_embedding", initializer(c, "relative"), shape, dtype)


def final_norm(c: ConfigDict, deterministic: bool) -> Callable[..., jax.Array]:
    """The norm after the last block, where the model has one; a module of the one that calls."""
    return Norm(c, deterministic=deterministic, name="final_norm") if c.final_norm else lambda x_BLD, _: x_BLD


class Transformer(nn.Module):
    """A language model. tokens_BL int32 -> logits_BLV float32; with a cache or a memory (logits, the new one).

    Fields:
        c: the settings under `model`.
        run_layers: how stacks of layers are run, where that is not by a scan: in the stages of a pipeline
            (parallel/pipeline.py), or each layer with its own arrays (infer/unstacked.py).
        attend: what computes attention where a row's queries meet all its keys, if not the kernel that `c` means: a ring
            over devices (parallel/context.py).

    Args of the call:
        tokens_BL: ids below `c.vocab_size`.
        positions_BL: int32, default 0, 1, 2, ... With a cache they must be contiguous in each row.
        segments_BL: int32, tokens see those of their own number only; 0 is padding; default: one document a row.
        orders_BL: int32, a token sees those whose order is not above its own; default: by `c.direction`.
        until_BL: int32, for a row that is a tree of texts with common beginnings, its tokens in depth-first order: the
            index after the last token that continues each one. A token sees those that it continues, and positions_BL
            are depths in the tree. Not for recurrent layers, nor with a cache.
        types_BL, languages_BL: int32 ids of segment types and languages, default 0; read if the model has such.
        source: what an encoder reads: {"tokens": (B, M)} and optionally positions, segments, types, languages; or
            {"encoded": (B, M, D)} with segments, from an earlier call. Decoder tokens see the source's tokens of
            their own segment number.
        queries: for two-stream models (two_stream.py), {"positions", "orders", "segments"} and optionally "types",
            (B, Q) int32 each: Q places to predict without seeing what is there; positions are indices in the row, and a
            query sees the tokens whose order is below its own. The output is theirs. Not with a cache.
        memory: from `two_stream.init_memory` or an earlier call: what the layers made of the part before. Not with a cache.
        cache: from `init_cache`. Row b's tokens are written to the slots `positions_BL[b, 0] + arange(L)`, and a
            query at position p sees the slots 0 to p. With orders, which must then start at position 0, it sees what
            they say. Rows may be padded on the right (segment 0): padding is overwritten, and no recurrent state
            sees it. The source is given at the first call and remembered.
        deterministic: False turns on dropout, which needs `rngs={"dropout": key}`, and the losses of sparse layers
            (in the collection "losses"; how their experts are used is in "routing") and batch statistics.
        output: "logits"; "hidden" (B, L, D) after the final norm; "pooled" (B, D), the pooler's or the first token;
            "classes" (B, classes); "encoded" (B, M, D); "ahead" (A, B, L, V), logits of the next A tokens, or
            "hidden_ahead" (A, B, L, D), what the head makes them of.
    """

    c: ConfigDict
    run_layers: RunLayers | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        orders_BL: jax.Array | None = None,
        until_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        languages_BL: jax.Array | None = None,
        source: Source | None = None,
        queries: dict[str, jax.Array] | None = None,
        memory: dict[str, Any] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        output: str = "logits",
    ) -> Any:
        c = self.c
        embed, embedding_VE = make_embed(self, deterministic)
        sources, encoded_BMD = self._encode(source, embed, deterministic) if source is not None else (None, None)
        if output == "encoded":
            return encoded_BMD
        row = make_tokens(
            tokens_BL, positions_BL, segments_BL, orders_BL, types_BL, until_BL,
            bidirectional=c.direction == "bidirectional", cached=cache is not None,
        )  # fmt: skip
        x_BLD = embed(tokens_BL, row.positions, types_BL, languages_BL)
        if queries is None and c.two_stream and self.is_initializing():
            queries = dict.fromkeys(("positions", "orders", "segments"), jnp.zeros_like(tokens_BL[:, :1]))
        # ------------------------------------------------------------------ blocks
        ordered = orders_BL is not None or memory is not None or queries is not None
        x_BLD, tokens, views = self._views(x_BLD, row, ordered, queries=queries, memory=memory, cache=cache)
        inputs = Inputs(
            views, tokens.segments > 0, tokens.positions == 0, None if cache is None else row.positions[:, 0], encoded_BMD,
            self._cross_view(row, sources, cache), content=None if queries is None else tokens_BL.shape[1],
        )  # fmt: skip
        states = {} if cache is None else {"cache": cache["layers"]}
        states |= {} if memory is None else {"memory": memory["layers"]}
        x_BLD, states = run_stacks(self, x_BLD, inputs, states, deterministic=deterministic)
        # ------------------------------------------------------------------ heads
        made = self._read_out(x_BLD, inputs, output, embedding_VE, deterministic)
        if cache is not None:
            seen = {} if sources is None else {"source": sources.segments}
            return made, {**cache, **seen, "layers": states["cache"]}
        if memory is not None:
            return made, two_stream.new_memory(memory, row.segments, states["memory"])
        return made

    @nn.nowrap
    def output_head(self) -> Head:
        """The head alone: from the output "hidden" to logits, with the parameters `head_params(params)`."""
        return Head(self.c)

    def _encode(self, source: Source, embed: Callable[..., jax.Array], deterministic: bool) -> tuple[Tokens, jax.Array]:
        ids_BM = source["tokens"] if "tokens" in source else source["segments"]
        tokens = make_tokens(ids_BM, source.get("positions"), source.get("segments"), bidirectional=True)
        if "encoded" in source:
            return tokens, source["encoded"]
        x_BMD = embed(ids_BM, tokens.positions, source.get("types"), source.get("languages"))
        return tokens, Encoder(self.c, deterministic, self.run_layers, self.attend, name="encoder")(x_BMD, tokens)

    def _views(
        self,
        x_BLD: jax.Array,
        row: Tokens,
        ordered: bool,
        *,
        queries: dict[str, jax.Array] | None,
        memory: dict[str, Any] | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Tokens, dict[str, View]]:
        """The residual stream and its tokens, with those of queries behind them, and who sees whom by kind of attention.

        Args:
            ordered: who sees whom is not by the index in the row alone.
        """
        c, tokens = self.c, row
        bidirectional = c.direction == "bidirectional"
        kinds = {kind for stack in layer_stacks(c) for kind, _ in stack.kinds if kind in ATTENTION}
        if cache is not None:
            assert queries is None and memory is None
            keys = {kind: cached_keys(c, cache, row, kind, ordered=ordered or bidirectional) for kind in kinds}
        else:
            found = Keys(row, visible(row, row))
            if memory is not None:
                tokens, found = two_stream.with_memory(memory, tokens, found)
            if queries is not None:
                x_BLD, tokens, found = two_stream.with_queries(self, queries, x_BLD, tokens, found)
            keys = dict.fromkeys(kinds, found)
        by_index = not ordered and cache is None
        rules: dict[str, Any] = {
            "bidirectional": bidirectional,
            "causal": by_index and not bidirectional,
            "in_order": by_index and row.until is None,
            "by_pattern": takes_patterns(c, self.attend),
            "relative_embedding": relative_table(self),
        }
        return x_BLD, tokens, {kind: make_view(c, kind, tokens, keys[kind], **rules) for kind in kinds}

    def _cross_view(self, row: Tokens, sources: Tokens | None, cache: Cache | None) -> View | None:
        if not self.c.encoder_layers:
            return None
        segments_BM = sources.segments if sources is not None else cache["source"] if cache is not None else None
        assert segments_BM is not None, "an encoder-decoder needs a source"
        pattern = Pattern(row.segments, segments_BM)
        whole = takes_patterns(self.c, self.attend) and cache is None
        return View(None if whole else pattern.mask(), pattern=pattern if whole else None)

    def _read_out(
        self, x_BLD: jax.Array, inputs: Inputs, output: str, embedding_VE: jax.Array, deterministic: bool
    ) -> Any:
        """What was asked for, from what the last block returns; while initialising, all heads are made."""
        c, making = self.c, self.is_initializing()
        norm = final_norm(c, deterministic)
        hidden_BLD = norm(x_BLD, inputs.valid_BL)
        if inputs.content is not None:
            hidden_BLD = hidden_BLD[:, inputs.content :]
        if output == "hidden":
            return hidden_BLD
        if output in ("pooled", "classes") or making:
            pooled = self._pooled(hidden_BLD, output)
            if not making:
                return pooled
        if making and c.value_head:
            ValueHead(c, name="value")(hidden_BLD)
        head = Head(c)
        nn.share_scope(self, head)  # its parameters are this module's
        wanted = [hidden_BLD]
        if c.ahead > 1 and (output.endswith("ahead") or making):
            wanted += [norm(y_BLD, inputs.valid_BL) for y_BLD in self._ahead(x_BLD, inputs, deterministic)]
        if output != "hidden_ahead":
            wanted = [head(one_BLD, embedding_VE) for one_BLD in wanted]
        return jnp.stack(wanted) if output.endswith("ahead") else wanted[0]

    def _ahead(self, x_BLD: jax.Array, inputs: Inputs, deterministic: bool) -> jax.Array:
        """y_ABLD for the tokens after the next (Gloeckle et al. 2024): a block each on the shared trunk; norm and head are shared."""
        c = self.c
        blocks = nn.vmap(
            Block,
            variable_axes={"params": 0, "losses": 0, "routing": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,
            out_axes=0,
            axis_size=c.ahead - 1,
        )
        kind, _ = layer_stacks(c)[-1].kinds[-1]
        block = blocks(c, kind, deterministic=deterministic, attend=self.attend, name="ahead")
        y_ABLD, _ = block(x_BLD, inputs, {"depth": jnp.ones(())})
        return y_ABLD

    def _pooled(self, hidden_BLD: jax.Array, output: str) -> jax.Array:
        head = ClassHead(self.c, output)
        nn.share_scope(self, head)
        made: jax.Array = head(hidden_BLD[:, 0])
        return made


def build(c: ConfigDict) -> Transformer:
    """The module for `config.model`, whose vocab_size must be resolved (see `padded_vocab`)."""
    assert c.vocab_size > 0, "resolve model.vocab_size from the tokenizer first"
    return Transformer(FrozenConfigDict(c))


def init_params(module: Transformer, key: jax.Array) -> Any:
    """All parameters of the module, whatever a single call would use; to be jitted or given to `jax.eval_shape`."""
    tokens_BL = jnp.zeros((1, 8), jnp.int32)
    source = {"tokens": tokens_BL} if module.c.encoder_layers else None
    return module.init(key, tokens_BL, source=source)["params"]


@functools.lru_cache(maxsize=64)
def param_shapes(module: Transformer) -> Any:
    """The shapes and types of `init_params`, ShapeDtypeStructs: nothing is computed, and a module is traced once.

    JAX does not start, so a command may still choose its devices.
    """
    with traced_for("cpu"):  # shapes are the same everywhere
        return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def padded_vocab(c: ConfigDict, tokenizer_size: int) -> int:
    """V: `c.vocab_size`, or the tokenizer's size rounded up to `c.vocab_multiple`. UserError if it is too small."""
    size = c.vocab_size or -(-tokenizer_size // c.vocab_multiple) * c.vocab_multiple
    if size < tokenizer_size:
        raise UserError(
            f"model.vocab_size={size} is less than the tokenizer's {tokenizer_size}; set it to 0 to follow the tokenizer"
        )
    return size
