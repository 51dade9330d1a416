"""The network, from token ids to logits: embed, blocks scanned over stacked parameters, norm, head.

One module covers every architecture by configuration (`config.model`): decoders, encoders, encoder-decoders, recurrent
networks and their mixtures. Where further ones plug in: a mixer is a row in `recurrent.MIXERS` or a kind of attention
in `views.make_view`; norms, activations and positions are branches or tables in `layers.py` and `positions.py`;
attention kernels are rows in `attention.KERNELS`; initialisation schemes are rows in `init.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from llmjax.config.model_checks import ATTENTION
from llmjax.errors import UserError
from llmjax.model import positions as P
from llmjax.model.attention import takes_patterns
from llmjax.model.block import Block, Inputs, run_stacks
from llmjax.model.cache import Cache, by_stack, cached_keys, pick
from llmjax.model.head import Head, embedding_table, logits_function
from llmjax.model.init import initializer
from llmjax.model.layers import Linear, Norm, constrain, drop, dtype_of, lookup
from llmjax.model.stacks import layer_stacks
from llmjax.model.views import Keys, Pattern, Tokens, View, make_view, visible

Source = dict[str, jax.Array]


class Encoder(nn.Module):
    """The bidirectional stack of an encoder-decoder: x_BMD -> encoded_BMD."""

    c: ConfigDict
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BMD: jax.Array, tokens: Tokens) -> jax.Array:
        c = self.c
        relative = relative_table(self) if c.position == "t5" else None
        keys = Keys(tokens, visible(tokens, tokens))
        more: dict[str, Any] = {"in_order": True, "by_pattern": takes_patterns(c), "relative_embedding": relative}
        view = make_view(c, "global", tokens, keys, bidirectional=True, **more)
        inputs = Inputs({"global": view}, tokens.segments > 0, tokens.positions == 0)
        x_BMD, _ = run_stacks(self, x_BMD, inputs, {}, deterministic=self.deterministic, encoder=True)
        return final_norm(c, self.deterministic)(x_BMD, inputs.valid_BL)


def relative_table(module: nn.Module) -> jax.Array:
    """T5's (buckets, H) table, shared by the layers of a stack; a parameter of the module that calls."""
    c = module.c
    shape, dtype = (c.relative_buckets, c.heads), dtype_of(c.param_dtype)
    return module.param("relative_embedding", initializer(c, "relative"), shape, dtype)


def final_norm(c: ConfigDict, deterministic: bool) -> Callable[..., jax.Array]:
    """The norm after the last block, where the model has one; a module of the one that calls."""
    return Norm(c, deterministic=deterministic, name="final_norm") if c.final_norm else lambda x_BLD, _: x_BLD


class Transformer(nn.Module):
    """A language model. tokens_BL int32 -> logits_BLV float32; with a cache or a memory (logits, the new one).

    Args of the call:
        tokens_BL: ids below `c.vocab_size`.
        positions_BL: int32, default 0, 1, 2, ... With a cache they must be contiguous in each row.
        segments_BL: int32, tokens see those of their own number only; 0 is padding; default: one document a row.
        orders_BL: int32, a token sees those whose order is not above its own; default: by `c.direction`.
        until_BL: int32, for a row that is a tree of texts with common beginnings, its tokens in depth-first order: the
            place behind the last token that continues each one. A token sees those that it continues, and positions_BL
            are depths in the tree. Not for recurrent layers, nor with a cache.
        types_BL, languages_BL: int32 ids of segment types and languages, default 0; read if the model has such.
        source: what an encoder reads: {"tokens": (B, M)} and optionally positions, segments, types, languages; or
            {"encoded": (B, M, D)} with segments, from an earlier call. Decoder tokens see the source's tokens of
            their own segment number.
        queries: for two-stream models, {"positions", "orders", "segments"} and optionally "types", (B, Q) int32 each:
            Q places to predict without seeing what is there; positions are places in the row, and a query sees the
            tokens whose order is below its own. The output is theirs.
        memory: from `init_memory` or an earlier call: what the layers made of the part before.
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
        embed, embedding_VE = self._embeddings(deterministic)
        # ------------------------------------------------------------------ the source
        encoded = sources = None
        if source is not None:
            sources, encoded = self._encode(source, embed, deterministic)
            if output == "encoded":
                return encoded
        # ------------------------------------------------------------------ tokens, and who sees whom
        index_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
        if positions_BL is None:
            positions_BL = index_BL
        if segments_BL is None:
            segments_BL = jnp.ones_like(tokens_BL)
        bidirectional = c.direction == "bidirectional"
        by_index = orders_BL is None and queries is None and memory is None and cache is None
        in_order = by_index and until_BL is None
        if orders_BL is None and not (cache is not None and not bidirectional):
            orders_BL = jnp.zeros_like(index_BL) if bidirectional else index_BL
        x_BLD = embed(tokens_BL, positions_BL, types_BL, languages_BL)
        if types_BL is None:
            types_BL = jnp.zeros_like(tokens_BL)
        orders = positions_BL if orders_BL is None else orders_BL
        # In a tree, as in a cache, how far apart two tokens are is told by their positions.
        place_BL = index_BL if cache is None and until_BL is None else positions_BL
        tokens = Tokens(place_BL, positions_BL, segments_BL, orders, types_BL, until_BL)
        kinds = {kind for stack in layer_stacks(c) for kind, _ in stack.kinds if kind in ATTENTION}
        if cache is not None:
            keys = {k: cached_keys(c, cache, tokens, k, ordered=orders_BL is not None) for k in kinds}
        else:
            found = Keys(tokens, visible(tokens, tokens))
            if memory is not None:
                tokens, found = self._remembering(memory, tokens, found)
            keys = dict.fromkeys(kinds, found)
        content = None
        if queries is not None or (c.two_stream and self.is_initializing()):
            assert cache is None
            queries = queries or dict.fromkeys(("positions", "orders", "segments"), index_BL[:, :1])
            content = tokens_BL.shape[1]
            x_BLD, tokens, found = self._with_queries(queries, x_BLD, tokens, found)
            keys = dict.fromkeys(kinds, found)
        # ------------------------------------------------------------------ blocks
        by_pattern = takes_patterns(c)
        relative = relative_table(self) if c.position == "t5" else None
        rules: dict[str, Any] = {
            "bidirectional": bidirectional,
            "causal": by_index and not bidirectional,
            "in_order": in_order and content is None,
            "by_pattern": by_pattern,
            "relative_embedding": relative,
        }
        views = {kind: make_view(c, kind, tokens, keys[kind], **rules) for kind in kinds}
        cross_view = None
        if c.encoder_layers:
            segments_BM = sources.segments if sources is not None else cache["source"] if cache is not None else None
            assert segments_BM is not None, "an encoder-decoder needs a source"
            pattern = Pattern(tokens.segments, segments_BM)
            whole = by_pattern and cache is None
            cross_view = View(None if whole else pattern.mask(), pattern=pattern if whole else None)
        starts_B = None if cache is None else positions_BL[:, 0]
        inputs = Inputs(
            views, tokens.segments > 0, tokens.positions == 0, starts_B, encoded, cross_view, content=content
        )
        states = by_stack(
            c,
            cache=None if cache is None else cache["layers"],
            memory=None if memory is None else memory["layers"],
        )
        x_BLD, states = run_stacks(self, x_BLD, inputs, states, deterministic=deterministic)
        norm = final_norm(c, deterministic)
        hidden_BLD = norm(x_BLD, inputs.valid_BL)
        if queries is not None:
            hidden_BLD = hidden_BLD[:, content:]
        # ------------------------------------------------------------------ heads
        made: Any = self._pooled(hidden_BLD, output)
        if output == "hidden":
            made = hidden_BLD
        elif output in ("logits", "ahead", "hidden_ahead") or self.is_initializing():
            head = (lambda x_BLD: x_BLD) if output == "hidden_ahead" else logits_function(self, embedding_VE)
            made = head(hidden_BLD)
            if c.ahead > 1 and (output.endswith("ahead") or self.is_initializing()):
                made = self._ahead(x_BLD, inputs, deterministic, made, norm, head)
        if cache is not None:
            new_cache = {**cache, "layers": pick(c, states, "cache")}
            if sources is not None:
                new_cache["source"] = sources.segments
            return made, new_cache
        if memory is not None:
            seen_BM = jnp.concatenate([memory["segments"], segments_BL], axis=1)
            segments_BM = seen_BM[:, seen_BM.shape[1] - memory["segments"].shape[1] :]
            return made, {"segments": segments_BM, "layers": pick(c, states, "memory")}
        return made

    @nn.nowrap
    def output_head(self) -> Head:
        """The head alone, from the output "hidden" to logits, to be applied to `head.parameters(params)`."""
        return Head(self.c)

    def _embeddings(self, deterministic: bool) -> tuple[Callable[..., jax.Array], jax.Array]:
        """The function from ids to the residual stream, and the table of tokens."""
        c = self.c
        dtype, stored = dtype_of(c.dtype), dtype_of(c.param_dtype)
        size = c.embedding_width or c.width

        def table(name: str, kind: str, rows: int, columns: int) -> jax.Array:
            return self.param(name, initializer(c, kind), (rows, columns), stored).astype(dtype)

        embedding_VE = embedding_table(self)
        project = Linear(c, (c.width,), "inward", name="embedding_projection") if size != c.width else None
        rows = c.position_offset + c.max_length
        position_MD = table("position_embedding", "position", rows, c.width) if c.position == "learned" else None
        in_types = c.types and c.position != "xlnet"  # XLNet's types are terms of the attention
        type_TD = table("type_embedding", "position", c.types, c.width) if in_types else None
        language_TD = table("language_embedding", "position", c.languages, c.width) if c.languages else None
        norm = Norm(c, deterministic=deterministic, name="embedding_norm") if c.embedding_norm else None

        def embed(
            tokens_BL: jax.Array,
            positions_BL: jax.Array,
            types_BL: jax.Array | None = None,
            languages_BL: jax.Array | None = None,
        ) -> jax.Array:
            x_BLD = lookup(embedding_VE, tokens_BL)  # gathered over fsdp first
            if c.embedding_scale != 1:
                x_BLD = x_BLD * jnp.asarray(c.embedding_scale, dtype)
            if project is not None:
                x_BLD = project(x_BLD)
            if position_MD is not None:
                # Padding may reach beyond the last position, and what it is must be a number.
                x_BLD = x_BLD + lookup(position_MD, jnp.clip(positions_BL + c.position_offset, 0, rows - 1))
            elif c.position == "sinusoidal":
                x_BLD = x_BLD + P.sinusoids(positions_BL, c.width).astype(dtype)
            for table_TD, ids_BL in ((type_TD, types_BL), (language_TD, languages_BL)):
                if table_TD is not None:
                    x_BLD = x_BLD + (table_TD[:1][None] if ids_BL is None else lookup(table_TD, ids_BL))
            if norm is not None:
                x_BLD = norm(x_BLD)
            if c.embedding_dropout and not deterministic:
                x_BLD = drop(x_BLD, c.embedding_dropout, self.make_rng("dropout"))
            return constrain(x_BLD, "BLD")

        return embed, embedding_VE

    def _encode(self, source: Source, embed: Callable[..., jax.Array], deterministic: bool) -> tuple[Tokens, jax.Array]:
        ids_BM = source["tokens"] if "tokens" in source else source["segments"]
        index_BM = jnp.broadcast_to(jnp.arange(ids_BM.shape[1])[None], ids_BM.shape)
        segments_BM = source.get("segments", jnp.ones_like(ids_BM))
        positions_BM = source.get("positions", index_BM)
        tokens = Tokens(index_BM, positions_BM, segments_BM, jnp.zeros_like(index_BM))
        if "encoded" in source:
            return tokens, source["encoded"]
        x_BMD = embed(ids_BM, positions_BM, source.get("types"), source.get("languages"))
        return tokens, Encoder(self.c, deterministic, name="encoder")(x_BMD, tokens)

    def _remembering(self, memory: dict[str, Any], tokens: Tokens, found: Keys) -> tuple[Tokens, Keys]:
        """Queries and keys when the keys begin with a memory, of which tokens see what is of their own segment."""
        before_BM = memory["segments"]
        count = before_BM.shape[1]
        places_BM = jnp.broadcast_to(jnp.arange(count)[None], before_BM.shape)
        zeros_BM = jnp.zeros_like(before_BM)

        def join(a: jax.Array, b: jax.Array | None) -> jax.Array | None:
            return None if b is None else jnp.concatenate([a, b], axis=1)

        tokens = dataclasses.replace(tokens, index=tokens.index + count)
        keys = Tokens(
            index=jnp.concatenate([places_BM, tokens.index], axis=1),
            positions=jnp.concatenate([zeros_BM, tokens.positions], axis=1),
            segments=jnp.concatenate([before_BM, tokens.segments], axis=1),
            orders=jnp.concatenate([jnp.full_like(before_BM, jnp.iinfo(jnp.int32).min), tokens.orders], axis=1),
            types=join(zeros_BM, tokens.types),
        )
        seen_BLM = before_BM[:, None, :] == tokens.segments[:, :, None]
        return tokens, Keys(keys, jnp.concatenate([seen_BLM, found.mask_BLM], axis=2), keys.positions)

    def _with_queries(
        self, queries: dict[str, jax.Array], x_BLD: jax.Array, tokens: Tokens, found: Keys
    ) -> tuple[jax.Array, Tokens, Keys]:
        """The residual stream, tokens and keys with the queries behind the content (XLNet's two streams)."""
        c = self.c
        dtype = dtype_of(c.dtype)
        start_D = self.param("query_embedding", initializer(c, "embedding"), (c.width,), dtype_of(c.param_dtype))
        at_BQ = queries["positions"]
        asked = Tokens(
            index=at_BQ + tokens.index[:, :1],
            positions=jnp.take_along_axis(tokens.positions, at_BQ, axis=1),
            segments=queries["segments"],
            orders=queries["orders"],
            types=queries.get("types", jnp.take_along_axis(tokens.types, at_BQ, axis=1)),  # type: ignore[arg-type]
        )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), tokens, asked)
        mask_BLM = jnp.concatenate([found.mask_BLM, visible(asked, found.tokens, strict=True)], axis=1)
        start_BQD = jnp.broadcast_to(start_D.astype(dtype)[None, None], (*at_BQ.shape, c.width))
        keys = Keys(found.tokens, mask_BLM, found.tokens.positions)
        return jnp.concatenate([x_BLD, start_BQD], axis=1), both, keys

    def _ahead(
        self,
        x_BLD: jax.Array,
        inputs: Inputs,
        deterministic: bool,
        first_BLV: jax.Array,
        norm: Callable[..., jax.Array],
        head: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Logits of the next A tokens (Gloeckle et al. 2024): a block each on the shared trunk, one final norm and head."""
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
        y_ABLD, _ = blocks(c, kind, deterministic=deterministic, name="ahead")(x_BLD, inputs, {"depth": jnp.ones(())})
        logits = [head(norm(y_BLD, inputs.valid_BL)) for y_BLD in y_ABLD]
        return jnp.stack([first_BLV, *logits])

    def _pooled(self, hidden_BLD: jax.Array, output: str) -> jax.Array | None:
        c = self.c
        if output not in ("pooled", "classes") and not self.is_initializing():
            return None
        pooled_BD = hidden_BLD[:, 0]
        if c.pooler:
            pooled_BD = jnp.tanh(Linear(c, (c.width,), "inward", bias=True, name="pooler")(pooled_BD))
        if output == "pooled" or not c.classes:
            return pooled_BD
        return Linear(c, (c.classes,), "head", bias=True, name="classifier")(pooled_BD).astype(jnp.float32)


def build(c: ConfigDict) -> Transformer:
    """The module for `config.model`, whose vocab_size must be resolved (see `padded_vocab`)."""
    assert c.vocab_size > 0, "resolve model.vocab_size from the tokenizer first"
    return Transformer(FrozenConfigDict(c))


def init_params(module: Transformer, key: jax.Array) -> Any:
    """All parameters of the module, whatever a single call would use; to be jitted or given to `jax.eval_shape`."""
    tokens_BL = jnp.zeros((1, 8), jnp.int32)
    source = {"tokens": tokens_BL} if module.c.encoder_layers else None
    return module.init(key, tokens_BL, source=source)["params"]


def padded_vocab(c: ConfigDict, tokenizer_size: int) -> int:
    """V: `c.vocab_size`, or the tokenizer's size rounded up to `c.vocab_multiple`. UserError if it is too small."""
    size = c.vocab_size or -(-tokenizer_size // c.vocab_multiple) * c.vocab_multiple
    if size < tokenizer_size:
        raise UserError(
            f"model.vocab_size={size} is less than the tokenizer's {tokenizer_size}; set it to 0 to follow the tokenizer"
        )
    return size
