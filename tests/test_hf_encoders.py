"""BERT, RoBERTa, XLM, XLNet and T5 of Hugging Face: the same outputs, weights that go there and back, clear refusals."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf import (
    GOLDEN,
    Arrays,
    compare,
    family_of,
    golden,
    inputs,
    make_theirs,
    match,
    read_config,
    read_params,
    stored_case,
)
from hf_encoders import BERT, ENCODERS, T5, V1_1, XLM, XLNET, apply, ours_encoder, ours_seq2seq

from llmjax.interop import mapping
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import meaning
from llmjax.model.cache import init_cache
from llmjax.model.transformer import build

CASES = {case.name: case for case in ENCODERS}
FIRST = {
    case.family: case.name for case in reversed(ENCODERS)
}.values()  # stored, the others are run beside transformers


@functools.cache
def theirs(name: str) -> tuple[Any, dict[str, Any], Arrays]:
    """Their model, its config.json and its tensors. Skips the test where there is no transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:
        return make_theirs(CASES[name], Path(folder), 0)


def ours(name: str) -> tuple[Any, Any]:
    """`config.model` and parameters of the same model."""
    _, theirs_json, tensors = theirs(name)
    c = read_config(theirs_json)
    return c, read_params(family_of(theirs_json), c, tensors)


def assert_equal(ours: Any, theirs: Any, mask: Any = slice(None)) -> None:
    """The promise of every family: equal to 1e-4, and the same choice everywhere."""
    ours, theirs = np.asarray(ours)[mask], np.asarray(theirs)[mask]
    assert theirs.std() > 0.05, "too small to show anything"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", sorted(CASES.keys() - FIRST))
def test_outputs_equal_those_of_transformers(name: str) -> None:
    model, *_ = theirs(name)
    c, params = ours(name)
    batch = inputs(vocab=c.vocab_size, length=40, seed=0, more=CASES[name].more)
    mask = batch["mask"].astype(bool)
    assert_equal(CASES[name].ours(c, params, batch), CASES[name].theirs(model, batch), mask)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 250])
@pytest.mark.parametrize("name", CASES)
def test_short_and_long_outputs_equal_those_of_transformers(name: str, length: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = compare(CASES[name], tmp_path, seed=length, length=length)
    assert found["difference"] < 1e-4 and found["same_argmax"] and found["deviation"] > 0.05, found


@pytest.mark.parametrize("name", FIRST)
def test_outputs_are_those_that_transformers_once_gave(name: str, tmp_path: Path) -> None:
    update = (lambda: tmp_path) if os.environ.get("UPDATE_GOLDEN") else None
    if update is None and not (GOLDEN / f"{name}.json").is_file():
        pytest.fail("no stored outputs: run with UPDATE_GOLDEN=1 where transformers is installed")
    assert_equal(*golden(CASES[name], update=update))


@pytest.mark.parametrize("name", ["bert-body", "roberta-body", "bert-pretraining"])
def test_pooled_outputs_equal_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")

    model, *_ = theirs(name)
    c, params = ours(name)
    batch = inputs(vocab=c.vocab_size, length=10, seed=0, more=CASES[name].more)
    full = {k: v[:1].repeat(3, axis=0) for k, v in batch.items()} | {"tokens": batch["tokens"][:3] // 2 + 5}
    out = model(
        torch.tensor(full["tokens"], dtype=torch.long), token_type_ids=torch.tensor(full["types"], dtype=torch.long)
    )
    kind = "classes" if "pretraining" in name else "pooled"
    run = ours_encoder(kind, skip_padding="roberta" in name, types_BL="types")
    made = np.asarray(run(c, params, full))[:, 0]
    assert_equal(made, out["seq_relationship_logits" if "pretraining" in name else "pooler_output"])


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_loads_in_transformers_and_answers_the_same(name: str, tmp_path: Path) -> None:
    model, theirs_json, tensors = theirs(name)
    torch = pytest.importorskip("torch")
    import transformers
    from safetensors.numpy import save_file

    family, c = family_of(theirs_json), read_config(theirs_json)
    rows = match(family, c, tensors)
    made = {slot: array for row in rows for slot, array in _read(row, tensors)}
    written = family.write_config(c)
    again = family.read_config(json.loads(json.dumps(written)))
    assert meaning(again) == meaning(c)
    exported: Arrays = {}
    for row in family.rows(again):
        if row.ours:
            exported |= zip(row.theirs, mapping.to_theirs(row, [made[slot] for slot in row.ours]), strict=True)
    unused = {"cls.predictions.bias"} if name == "bert-untied" else set()  # an untied head adds its own bias
    for tensor in (tensors.keys() & exported.keys()) - unused:
        assert tensors[tensor].tobytes() == np.ascontiguousarray(exported[tensor]).tobytes(), tensor
    (tmp_path / "config.json").write_text(json.dumps(written))
    exported = {k: np.ascontiguousarray(v) for k, v in exported.items()}
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    cls = getattr(transformers, written["architectures"][0])
    loaded, info = cls.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    batch = inputs(vocab=c.vocab_size, length=9, seed=0, more=CASES[name].more)
    np.testing.assert_array_equal(CASES[name].theirs(loaded.eval(), batch), CASES[name].theirs(model, batch))


def _read(row: mapping.Row, tensors: Arrays) -> Any:
    return zip(row.ours, mapping.to_ours(row, [tensors[name] for name in row.theirs]), strict=True)


def test_t5_decoding_with_a_cache_equals_reading_the_whole_target() -> None:
    c, params = ours("t5-gated")
    batch = inputs(vocab=c.vocab_size, length=9, seed=0, more=CASES["t5-gated"].more)
    whole = ours_seq2seq(c, params, batch)
    source = {"tokens": batch["tokens"], "segments": batch["mask"]}
    cache = init_cache(c, batch=5, length=12, source_length=9)
    prompt, rest = batch["targets"][:, :4], batch["targets"][:, 4:]
    logits, cache = apply(c, params, prompt, source=source, cache=cache)
    step = jax.jit(lambda cache, tokens, at: build(c).apply({"params": params}, tokens, positions_BL=at, cache=cache))
    pieces = [logits]
    for i, tokens in enumerate(rest.T):
        logits, cache = step(cache, tokens[:, None], jnp.full((5, 1), 4 + i))
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5)


OLD_NAMES = {  # names that published files have, and what became of them
    "bert-masked": [
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("cls.predictions.transform.LayerNorm.bias", "cls.predictions.transform.LayerNorm.beta"),
        ("", "bert.pooler.dense.weight"),
        ("", "cls.seq_relationship.bias"),
        ("", "cls.predictions.decoder.weight"),
        ("", "bert.embeddings.position_ids"),
    ],
    "roberta-masked": [("", "roberta.pooler.dense.bias"), ("", "roberta.embeddings.position_ids")],
    "xlm-languages": [("", "transformer.position_ids"), ("", "pred_layer.proj.weight")],
    "xlnet-two_stream": [("", "lm_loss.weight")],
    "t5-first": [
        ("", "encoder.embed_tokens.weight"),
        ("", "lm_head.weight"),
        ("", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
    "t5-gated": [("lm_head.weight", "decoder.embed_tokens.weight")],
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_files_of_older_versions_are_read(name: str) -> None:
    theirs_json, tensors = stored_case(CASES[name]) if name in FIRST else theirs(name)[1:]
    family, names = family_of(theirs_json), set(tensors)
    c = read_config(theirs_json)
    before = {slot for row in match(family, c, names) for slot in row.ours}
    for now, once in OLD_NAMES[name]:
        names = names - {now} | {once}
    assert {slot for row in match(family, c, names) for slot in row.ours} == before


def test_a_masked_language_model_with_a_pooler_is_written_with_it() -> None:
    """So that whoever loads the body has it, as in Google's files; the architecture itself has none."""
    family = FAMILIES["bert"]
    c = family.read_config({"model_type": "bert", "architectures": ["BertForMaskedLM"], **BERT})
    c.pooler = True
    assert family.write_config(c)["architectures"] == ["BertForMaskedLM"]
    names = {name for row in family.rows(c) if row.ours for name in row.theirs}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < names
    c.pooler = False
    assert len(match(family, c, names)) == len(names) - 2


def test_a_head_that_is_not_stored_is_the_embedding() -> None:
    """A T5 v1.1 whose head equals its embedding is saved without the head, and without saying that it is tied."""
    _, theirs_json, tensors = theirs("mt5-gated")
    tensors = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    assert not c.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], params["embedding"].T)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("bert", BERT, {"is_decoder": True}, "is_decoder=True"),
    ("bert", BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'.*'absolute'"),
    ("bert", BERT, {"hidden_act": "mish"}, "hidden_act='mish'.*'gelu'"),
    ("bert", BERT, {"architectures": ["BertForTokenClassification"]}, "architectures='BertForTokenClassification'"),
    ("bert", BERT, {"hidden_size": None}, "lacks hidden_size"),
    ("roberta", BERT, {"architectures": ["RobertaForMaskedLM"], "hidden_act": "relu"}, "hidden_act='relu'"),
    ("xlm", XLM, {"asm": True}, "asm=True"),
    ("xlm", XLM, {"architectures": ["XLMForMultipleChoice"]}, "XLMForMultipleChoice.*XLMWithLMHeadModel"),
    ("xlnet", XLNET, {"clamp_len": 100}, "clamp_len=100"),
    ("xlnet", XLNET, {"bi_data": True}, "bi_data=True"),
    ("xlnet", XLNET, {"same_length": True}, "same_length=True"),
    ("xlnet", XLNET, {"attn_type": "both"}, "attn_type='both'.*'bi', 'uni'"),
    ("t5", T5, {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'.*'gated-gelu'"),
    ("t5", T5, {"is_decoder": True}, "is_decoder=True"),
]
ARCHITECTURES = {"bert": "BertForMaskedLM", "xlm": "XLMModel", "xlnet": "XLNetModel", "t5": "T5EncoderModel"}


@pytest.mark.parametrize(("model_type", "fields", "changes", "message"), REFUSED)
def test_configs_that_cannot_be_read_are_refused_by_field(
    model_type: str, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config = {"model_type": model_type, "architectures": [ARCHITECTURES.get(model_type)], **fields, **changes}
    with pytest.raises(ValueError, match=message):
        FAMILIES[model_type].read_config(config)


@pytest.mark.parametrize(
    ("model_type", "fields", "key", "value", "message"),
    [
        ("bert", BERT, "position", "rotary", "model.position='rotary', there 'learned'"),
        ("bert", BERT, "head_transform", False, "ForMaskedLM has the transform"),
        ("bert", BERT, "norm_place", "pre", "norm_place"),
        ("xlm", XLM, "types", 2, "model.types=2, there 0"),
        ("xlm", XLM, "mlp_width", 24, "model.mlp_width=24, there 128"),
        ("xlnet", XLNET, "final_norm", True, "final_norm"),
        ("t5", T5, "norm", "layer", "model.norm='layer', there 'rms'"),
        ("t5", V1_1, "attention_scale", 0.5, "attention_scale"),
    ],
)
def test_models_that_cannot_be_written_are_refused_by_setting(
    model_type: str, fields: dict[str, Any], key: str, value: Any, message: str
) -> None:
    family = FAMILIES[model_type]
    c = family.read_config({"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], **fields})
    c[key] = value
    with pytest.raises(ValueError, match=message):
        family.write_config(c)
