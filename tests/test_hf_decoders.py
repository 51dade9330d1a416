"""Llama, GPT-2, Falcon and their like of Hugging Face: the same logits, weights that go there and back, clear refusals."""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf import (
    GOLDEN,
    Arrays,
    Case,
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
from hf_decoders import (
    BASE,
    BLOOM,
    DECODERS,
    DEEPSEEK,
    FALCON,
    GEMMA,
    GPT2,
    GPT_OSS,
    LLAMA,
    LLAMA3,
    LONGROPE,
    OPT,
    RECURRENT_GEMMA,
    YARN,
)

from llmjax import config
from llmjax.interop import mapping
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import get, meaning

CASES = {case.name: case for case in DECODERS}
FIRST = {case.family: case.name for case in reversed(DECODERS)}  # stored, the others are run beside transformers
SECOND = {case.family: case.name for case in reversed(DECODERS) if case.name not in FIRST.values()}

OTHERS = sorted(CASES.keys() - SECOND.values())


@functools.cache
def theirs(name: str) -> tuple[Any, dict[str, Any], Arrays]:
    """Their model, its config.json and its tensors. Skips the test where there is no transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:
        return make_theirs(CASES[name], Path(folder), 0)


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The promise of every family: equal to 1e-4, and the same choice everywhere."""
    assert theirs.std() > 0.3, "too small to show anything"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", FIRST.values())
def test_logits_are_those_that_transformers_once_gave(name: str, tmp_path: Path) -> None:
    update = (lambda: tmp_path) if os.environ.get("UPDATE_GOLDEN") else None
    if update is None and not (GOLDEN / f"{name}.json").is_file():
        pytest.fail(
            "no stored logits: run UPDATE_GOLDEN=1 pytest tests/test_hf_decoders.py where transformers is installed"
        )
    assert_equal(*golden(CASES[name], update=update))


@pytest.mark.parametrize("name", SECOND.values())
def test_logits_equal_those_of_transformers(name: str) -> None:
    model, theirs_json, tensors = theirs(name)
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    batch = inputs(vocab=c.vocab_size, length=40, seed=0)
    mask = batch["mask"].astype(bool)
    assert_equal(np.asarray(CASES[name].ours(c, params, batch))[mask], CASES[name].theirs(model, batch)[mask])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 250])
@pytest.mark.parametrize("name", CASES)
def test_short_and_long_logits_equal_those_of_transformers(name: str, length: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = compare(CASES[name], tmp_path, seed=length, length=length)
    assert found["difference"] < 1e-4 and found["same_argmax"] and found["deviation"] > 0.3, found


@pytest.mark.parametrize("name", [*SECOND.values(), *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_what_is_written_is_the_same_model_in_transformers(name: str, tmp_path: Path) -> None:
    model, theirs_json, tensors = theirs(name)
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    family, c = family_of(theirs_json), read_config(theirs_json)
    written = family.write_config(c)
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path, attn_implementation=CASES[name].attention, dtype=torch.float32).eval()
    batch = inputs(vocab=c.vocab_size, length=40, seed=1)
    np.testing.assert_array_equal(CASES[name].theirs(again, batch), CASES[name].theirs(model, batch))
    assert written["architectures"] == theirs_json["architectures"]
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    # Written in version 4's form, and read as version 5's. Defaults that the first leaves out are written.
    rope = getattr(model.config, "rope_parameters", None) or {}
    assert same_keys(getattr(again.config, "rope_parameters", None), rope) == rope


def same_keys(found: Any, given: Any) -> Any:
    """The part of a tree of dicts that has the keys of another one."""
    return {key: same_keys(found[key], value) for key, value in given.items()} if isinstance(given, dict) else found


@pytest.mark.parametrize("name", FIRST.values())
def test_every_tensor_goes_there_and_back_bit_for_bit(name: str) -> None:
    theirs_json, tensors = stored_case(CASES[name])
    family, c = family_of(theirs_json), read_config(theirs_json)
    rows = match(family, c, tensors)
    assert sorted(there for row in rows for there in row.theirs) == sorted(tensors)
    for row in rows:
        back = mapping.to_theirs(row, mapping.to_ours(row, [tensors[there] for there in row.theirs]))
        for there, array in zip(row.theirs, back, strict=True):
            np.testing.assert_array_equal(array, tensors[there], err_msg=there, strict=True)
            assert array.flags.c_contiguous, there  # as it will be written


@pytest.mark.parametrize("name", CASES)
def test_a_config_written_and_read_again_is_the_same_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs_json = getattr(transformers, CASES[name].config)(**CASES[name].fields).to_dict()
    family, c = family_of(theirs_json), read_config(theirs_json)
    assert meaning(family.read_config(family.write_config(c))) == meaning(c)


def test_a_config_of_version_4_is_read_like_one_of_version_5() -> None:
    family = FAMILIES["llama"]
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {"type": LLAMA3["rope_type"]}
    del old["rope_type"]
    one = family.read_config({**LLAMA, "rope_theta": LLAMA3["rope_theta"], "rope_scaling": old})
    assert meaning(one) == meaning(family.read_config({**LLAMA, "rope_parameters": LLAMA3}))
    assert (one.rotary_base, one.rotary_scaling, one.rotary_fast) == (500.0, "llama3", 4.0)


GEMMA_1 = {name: value for name, value in GEMMA.items() if name != "query_pre_attn_scalar"}
PUBLISHED = [  # what distinguishes published configs, and what must be read from it
    ("llama", {**BASE, "rms_norm_eps": 1e-6}, {"kv_heads": 4, "rotary_base": 10_000.0, "tie_embeddings": False}),
    ("gemma", {**GEMMA_1, "hidden_act": "gelu", "hidden_activation": None}, {"activation": "geglu_tanh"}),
    (
        "gemma2",
        {**GEMMA, "num_hidden_layers": 4},
        {"pattern": ("local", "global"), "window": 4096, "logit_soft_cap": 30.0},
    ),
    (
        "gemma3",
        {"text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}},
        {
            "pattern": ("local",) * 5 + ("global",),
            "heads": 8,
            "head_size": 256,
            "tie_embeddings": True,
            "rotary_base": 1e6,
        },
    ),
    ("qwen2", {**LLAMA, "use_sliding_window": False, "sliding_window": 16}, {"pattern": ("global",), "bias": ("qkv",)}),
    ("gpt_neox", {**BASE, "rotary_emb_base": 100, "rotary_pct": 0.5}, {"rotary_fraction": 0.5, "rotary_base": 100.0}),
    ("bloom", {**BLOOM, "n_embed": 32, "num_attention_heads": 8, "n_head": None}, {"heads": 8, "mlp_width": 128}),
    ("falcon", {**FALCON, "multi_query": True, "bias": False}, {"kv_heads": 1, "shared_norm": True, "bias": ("norm",)}),
    ("opt", {**OPT, "do_layer_norm_before": False}, {"norm_place": "post", "final_norm": False, "position_offset": 2}),
    # Dynamic scaling changes nothing up to max_position_embeddings (Hugging Face's formula at that length has factor 1).
    (
        "llama",
        {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rotary_scaling": "none", "rotary_factor": 1.0},
    ),
    (
        "smollm3",
        {**LLAMA, "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "pretraining_tp": 2},
        {"pattern": ("global",)},
    ),
    (
        "phi3",
        {**LLAMA, "full_attn_mod": 1, "interpolate_factor": 1, "sliding_window": 262_144},
        {"pattern": ("global",)},
    ),
    ("recurrent_gemma", {**RECURRENT_GEMMA, "_block_types": ["attention"]}, {"pattern": ("local",)}),
    (
        "starcoder2",
        {
            **LLAMA,
            "mlp_type": "default",
            "norm_type": "layer_norm",
            "activation_function": "gelu",
            "scale_attn_weights": True,
        },
        {"activation": "gelu_tanh"},
    ),
    (
        "gpt_oss",
        {**GPT_OSS, "experts_per_token": 2, "initial_context_length": 4096, "swiglu_limit": 7.0},
        {"rotary_scaling": "yarn", "rotary_factor": 32.0, "rotary_truncate": False, "pattern": ("local", "global")},
    ),
    (
        "qwen3_moe",
        {**LLAMA, "num_hidden_layers": 6, "mlp_only_layers": [0, 3], "decoder_sparse_step": 2},
        {"moe.first": 0, "moe.every": 2, "moe.dense": (3,)},
    ),
    (
        "deepseek_v3",
        {**DEEPSEEK, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
        {"moe.groups": 2, "moe.active_groups": 1, "moe.group_score": 2, "moe.score": "sigmoid"},
    ),
    (
        "phi3",
        {**LLAMA, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
        {"rotary_scaling": "longrope", "rotary_factor": 4.0, "max_length": 64, "rotary_attention_factor": 0.0},
    ),
    ("phi", BASE, {"rotary_fraction": 0.5, "bias": ("qkv", "out", "mlp", "norm", "head"), "activation": "gelu_tanh"}),
]


@pytest.mark.parametrize(("model_type", "fields", "expected"), PUBLISHED)
def test_what_a_config_leaves_out_is_as_the_model_type_has_it(
    model_type: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    c = FAMILIES[model_type].read_config({"model_type": model_type, **fields})
    assert {key: get(c, key) for key in expected} == expected


REFUSED = [
    ("llama", LLAMA, {"rope_scaling": {"rope_type": "stretch", "factor": 2.0}}, "rope_type='stretch'.*'llama3'"),
    (
        "phi3",
        LLAMA,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "lacks original_max_position_embeddings",
    ),
    (
        "phi3",
        LLAMA,
        {"rope_scaling": {"type": "su", "short_factor": 1.0}, "original_max_position_embeddings": 64},
        "short_factor=1.0, which is no list",
    ),
    (
        "llama",
        LLAMA,
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
        "original_max_position_embeddings=8; supported",
    ),
    (
        "llama",
        LLAMA,
        {"rope_parameters": {**YARN, "attention_factor": "1"}},
        "attention_factor='1', which is no number",
    ),
    (
        "deepseek_v2",
        DEEPSEEK,
        {"topk_method": "noaux_tc", "routed_scaling_factor": 2.5},
        "topk_method='noaux_tc'; supp",
    ),
    ("llama", LLAMA, {"rope_parameters": {**YARN, "truncate": "no"}}, "truncate='no', which is neither"),
    ("gpt_oss", GPT_OSS, {"swiglu_limit": 6.0}, "swiglu_limit=6.0; supported: 7.0"),
    ("llama", LLAMA, {"hidden_act": "tanh"}, "hidden_act='tanh'.*'silu'"),
    ("llama", LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config=.*not understood"),
    ("mistral", LLAMA, {"attention_bias": True}, "attention_bias=True.*supported: False"),
    ("qwen2", LLAMA, {"layer_types": ["linear_attention"] * 3}, "layer_types='linear_attention'.*'full_attention'"),
    ("qwen3_moe", {**LLAMA, "num_experts": 4}, {"mlp_only_layers": ["1"]}, r"mlp_only_layers=\['1'\]; supported"),
    ("gemma2", GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3_text", GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gpt2", GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt_neox", BASE, {"rotary_pct": 0.4}, "rotates 3 of 8 dimensions.*an even number"),
    (
        "bloom",
        BLOOM,
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm=True",
    ),
    ("opt", OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ("phi", BASE, {"qk_layernorm": True}, "qk_layernorm=True"),
    ("falcon", FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2, new_decoder_architecture=False"),
    ("llama", {"hidden_size": 32}, {}, "config.json lacks vocab_size, num_hidden_layers"),
    # What no table names would make another model without a word.
    (
        "llama",
        LLAMA,
        {"attention_multiplier": 0.5, "no_rope_layers": [1]},
        r"attention_multiplier=0.5, no_rope_layers=\[1\]",
    ),
    ("llama", LLAMA, {"sliding_window": 16}, "sliding_window=16, which is not understood"),
    ("mixtral", LLAMA, {"norm_topk_prob": False}, "norm_topk_prob=False.*supported: True"),
    ("bert", BASE, {"architectures": ["BertModel"], "quantization_config": {"bits": 8}}, "quantization_config"),
    (
        "llama",
        LLAMA,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [4]}},
        r"mrope_section=\[4\]",
    ),
    ("llama", LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks factor"),
    ("llama", LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings='false', which is neither true nor false"),
    ("llama", LLAMA, {"hidden_size": 32.5}, "hidden_size=32.5, which is no whole number"),
    ("llama", LLAMA, {"rope_theta": "1e6"}, "rope_theta='1e6', which is no number"),
]


@pytest.mark.parametrize(("model_type", "fields", "changes", "message"), REFUSED)
def test_configs_that_cannot_be_read_are_refused_by_field(
    model_type: str, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES[model_type].read_config({"model_type": model_type, **fields, **changes})


@pytest.mark.parametrize(
    ("model_type", "fields", "key", "value"),
    [
        ("llama", LLAMA, "window", 8),
        ("llama", LLAMA, "qk_norm", True),
        ("mistral", LLAMA, "bias", ("qkv", "out")),
        ("qwen2", LLAMA, "norm_place", "sandwich"),
        ("gemma", GEMMA_1, "embedding_scale", 1.0),
        ("gemma3_text", GEMMA, "attention_scale", 0.3),
        ("gpt2", GPT2, "position", "rotary"),
        ("gpt_neox", BASE, "shared_norm", True),
        ("bloom", BLOOM, "mlp_width", 100),
        ("opt", OPT, "position_offset", 0),
        ("phi", BASE, "block", "serial"),
        ("falcon", FALCON, "embedding_norm", True),
    ],
)
def test_models_that_cannot_be_written_are_refused_by_setting(
    model_type: str, fields: dict[str, Any], key: str, value: Any
) -> None:
    family = FAMILIES[model_type]
    c = family.read_config({"model_type": model_type, **fields})
    c[key] = value
    if key == "window":
        c.pattern = ("local", "global")
    with pytest.raises(ValueError, match=rf"model\.{key if key != 'window' else 'pattern'}="):
        family.write_config(c)


@pytest.mark.parametrize(
    ("key", "init"),
    [("attention_scale", "mup"), ("logit_scale", "mup"), ("branch_scale", "completep"), ("residual_scale", "deepnorm")],
)
def test_scales_that_the_initialisation_decides_are_not_lost_in_an_export(key: str, init: str) -> None:
    c = FAMILIES["llama"].read_config({"model_type": "llama", **LLAMA})
    c.init = init
    with pytest.raises(ValueError, match=rf"model\.{key}="):
        FAMILIES["llama"].write_config(c)


def test_ntk_scaling_is_written_as_the_larger_base_that_it_is() -> None:
    c = FAMILIES["llama"].read_config(LLAMA)
    c.rotary_scaling, c.rotary_factor = "ntk", 4.0
    written = FAMILIES["llama"].write_config(c)
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == pytest.approx(10_000 * 4 ** (8 / 6))


def without(prefix: str) -> Callable[[Arrays], Arrays]:
    return lambda tensors: {name.removeprefix(prefix): array for name, array in tensors.items()}


def with_vision(tensors: Arrays) -> Arrays:
    return {f"language_model.{name}": array for name, array in tensors.items()} | {
        "vision_tower.vision_model.embeddings.patch_embedding.weight": np.zeros(3),
        "multi_modal_projector.mm_soft_emb_norm.weight": np.zeros(3),
    }


def fused(block: str, gate: str, down: str, up: str) -> Callable[[Arrays], Arrays]:
    """All experts in one tensor, as transformers 5 has them in memory and writes with save_original_format=False."""

    def fuse(tensors: Arrays) -> Arrays:
        rest = {name: array for name, array in tensors.items() if ".experts." not in name}
        made = {name.replace(f".{block}.", ".mlp."): array for name, array in rest.items()}
        for layer in {name.split(".experts.")[0] for name in tensors.keys() - rest.keys()}:
            count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
            parts = {
                part: np.stack([tensors[f"{layer}.experts.{e}.{part}.weight"] for e in range(count)])
                for part in (gate, down, up)
            }
            there = f"{layer.replace(block, 'mlp')}.experts"
            made[f"{there}.gate_up_proj"] = np.concatenate([parts[gate], parts[up]], axis=1)
            made[f"{there}.down_proj"] = parts[down]
        return made

    return fuse


OTHER_FILES: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "gpt2 without a head": ("gpt2", without("transformer.")),
    "gpt2 with masks": ("gpt2", lambda t: t | {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4))}),
    "gpt2 with its tied head": ("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]}),
    "bloom without a head": ("bloom", without("transformer.")),
    "falcon without a head": ("falcon", without("transformer.")),
    "gemma2 without a head": ("gemma2", without("model.")),
    "opt without a head": ("opt", without("model.")),
    "gemma3 with images": ("gemma3", with_vision),
    "mixtral with fused experts": ("mixtral", fused("block_sparse_moe", "w1", "w2", "w3")),
    "qwen3_moe with fused experts": ("qwen3_moe", fused("mlp", "gate_proj", "down_proj", "up_proj")),
    "llama with frequencies": ("llama", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_names_of_the_same_tensors_are_read(what: str) -> None:
    family_name, change = OTHER_FILES[what]
    theirs_json, tensors = stored_case(CASES[FIRST[family_name]])
    family, c = family_of(theirs_json), read_config(theirs_json)
    usual, other = read_params(family, c, tensors), read_params(family, c, change(tensors))
    assert config.flatten(usual).keys() == config.flatten(other).keys()
    for path, array in config.flatten(usual).items():
        np.testing.assert_array_equal(array, config.flatten(other)[path], err_msg=path)


def test_tensors_that_do_not_fit_are_named_with_their_parameter() -> None:
    theirs_json, tensors = stored_case(CASES[FIRST["llama"]])
    family, c = family_of(theirs_json), read_config(theirs_json)
    name = "model.layers.1.mlp.up_proj.weight"
    row = next(row for row in match(family, c, tensors) if row.theirs == (name,))
    _, missing, unknown = mapping.resolve(family, c, [*(tensors.keys() - {name}), "model.layers.3.mlp.up_proj.weight"])
    assert [(row.ours, names) for row, names in missing] == [(row.ours, {name})]
    assert unknown == ["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"up_proj\.weight has shape \(40, 31\), but layers/mlp/up/kernel\[1\] needs \(40, 32\)"
    ):
        mapping.to_ours(row, [np.zeros((40, 31))])
    with pytest.raises(
        ValueError, match=r"layers/mlp/up/kernel has shape \(32, 41\), but .*up_proj\.weight needs \(32, 40\)"
    ):
        mapping.to_theirs(row, [np.zeros((32, 41))])
    with pytest.raises(ValueError, match=r"both lm_head\.weight and language_model\.lm_head\.weight"):
        mapping.resolve(family, c, [*tensors, "language_model.lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST.values())
def test_models_that_transformers_saves_without_a_head_are_read(name: str, tmp_path: Path) -> None:
    model, theirs_json, tensors = theirs(name)
    from safetensors.numpy import load_file

    getattr(model, model.base_model_prefix).save_pretrained(tmp_path)
    bare = load_file(tmp_path / "model.safetensors")
    heads = {there: array for there, array in tensors.items() if there.startswith(("lm_head", "embed_out"))}
    assert len(bare) + len(heads) == len(tensors) and not bare.keys() & tensors.keys()
    family, c = family_of(theirs_json), read_config(theirs_json)
    usual, other = read_params(family, c, tensors), read_params(family, c, bare | heads)
    for path, array in config.flatten(usual).items():
        np.testing.assert_array_equal(array, config.flatten(other)[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-top2", "qwen3_moe-first_dense"])
def test_experts_that_transformers_saves_in_one_tensor_are_read(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, theirs_json, tensors = make_theirs(CASES[name], tmp_path, 0, save_original_format=False)
    assert any(there.endswith("gate_up_proj") for there in tensors)
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    batch = inputs(vocab=c.vocab_size, length=20, seed=0)
    mask = batch["mask"].astype(bool)
    assert_equal(np.asarray(CASES[name].ours(c, params, batch))[mask], CASES[name].theirs(model, batch)[mask])


@pytest.mark.slow
def test_the_text_part_of_gemma_3_with_images_is_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case = CASES["gemma3-linear"]
    text = {**case.fields, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    fields = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    both = Case("gemma3", "images", "Gemma3Config", "Gemma3ForConditionalGeneration", fields, centre=0.0)
    model, theirs_json, tensors = make_theirs(both, tmp_path, 0)
    assert theirs_json["model_type"] == "gemma3" and any("vision_tower" in there for there in tensors)
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    batch = inputs(vocab=c.vocab_size, length=20, seed=0)
    mask = batch["mask"].astype(bool)
    assert_equal(np.asarray(both.ours(c, params, batch))[mask], both.theirs(model, batch)[mask])
