"""Values in a model's files that cannot be are refused by the name of their field, and never end in a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from hf_files import LLAMA, random_tensors, write_model, write_tokenizer

from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import get
from llmjax.interop.read import import_model

NAN, INFINITY = float("nan"), float("inf")
LLAMA3 = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
DEEPSEEK = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"vocab_size": NAN}, "vocab_size=nan, which is no finite number"),
    ("llama", {"hidden_size": INFINITY}, "hidden_size=inf, which is no finite number"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads=0.*at least 1"),
    ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1.*at least"),
    ("llama", {"rope_theta": NAN}, "rope_theta=nan"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear', which is no object"),
    ("llama", {"rope_parameters": [1]}, r"rope_parameters=\[1\], which is no object"),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "32"}}, "original_max_position_embeddings='32', which is no n"),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original_max_position_embeddings=0; it must"),
    ("llama", {"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, "mscale='1', which is no number"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2', which is no number"),
    ("llama", {"rope_scaling": {"type": ["linear"], "factor": 2}}, r"rope_type=\['linear'\]; supported"),
    ("llama", {"layer_types": 5}, "layer_types=5, which is no list"),
    ("llama", {"layer_types": [["x"]]}, r"layer_types=\['x'\]; supported"),
    ("qwen2", {"layer_types": []}, "0 layer_types for num_hidden_layers=3"),
    ("qwen2", {"layer_types": ["full_attention"] * 4}, "4 layer_types for num_hidden_layers=3"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be at least 1, or null"),
    ("mistral", {"sliding_window": "16"}, "sliding_window='16', which is no number"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0; it must"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": "1"}, "max_window_layers='1', which is no number"),
    ("gemma3_text", {**GEMMA, "sliding_window_pattern": 0}, "sliding_window_pattern=0; it must"),
    ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": -4}, "query_pre_attn_scalar=-4"),
    ("gemma3_text", {**GEMMA, "rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "factor=8.0.*within full_attention"),
    ("gemma3_text", {**GEMMA, "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5; supported: 1"),
    ("gemma3_text", {**GEMMA, "rope_parameters": {"sliding_attention": {"factor": 2}}}, "sliding_attention of {'factor': 2}"),
    ("gemma3", {"text_config": "x"}, "text_config='x', which is no object"),
    ("granite", {"logits_scaling": 0}, "logits_scaling=0"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "2 no_rope_layers for num_hidden_layers=3"),
    ("smollm3", {"no_rope_layers": "110"}, "no_rope_layers='110'; supported"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    ("qwen3_moe", {**SPARSE, "mlp_only_layers": 1}, "mlp_only_layers=1; supported"),
    ("deepseek_v3", {**DEEPSEEK, "rope_scaling": "yarn"}, "rope_scaling='yarn', which is no object"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_field(model_type, changes, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[model_type].read_config({**LLAMA, "model_type": model_type, **changes})


ACCEPTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": None, "factor": 2}}, {"rotary_scaling": "linear", "rotary_factor": 2.0}),
    ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}}, {"rotary_scaling": "none", "rotary_base": 5e5}),
    ("llama", {"head_dim": 16, "layer_types": ["full_attention"] * 3}, {"head_size": 16, "pattern": ("global",)}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 0}, {"pattern": ("global",)}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}, {"pattern": ("global",)}),
    ("mistral", {"sliding_window": None}, {"pattern": ("global",)}),
    ("mistral", {"sliding_window": 16.0}, {"pattern": ("local",), "window": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "expected"), ACCEPTED)
def test_a_value_that_is_odd_is_read_as_it_is_meant(model_type, changes, expected):
    c = FAMILIES[model_type].read_config({**LLAMA, "model_type": model_type, **changes})
    assert {key: get(c, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", [], "holds no object but list"),
        ("config.json", {**LLAMA, "model_type": ["llama"]}, r"model_type \['llama'\], which is not known"),
        ("config.json", {**LLAMA, "quantization_config": "fp8"}, "quantization_config='fp8', which is no object"),
        ("config.json", {**LLAMA, "quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "blocks of 128"),
        ("hf_quant_config.json", {"quantization": "FP8"}, "hf_quant_config.json has quantization='FP8'"),
        ("model.safetensors.index.json", {"weight_map": ["x"]}, "index.json is damaged"),
        ("model.safetensors.index.json", {"weight_map": {"x": 1}}, "index.json is damaged"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id='2', which is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template of 5"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template of None"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_with_its_name_and_leaves_nothing(file, content, message, tmp_path):
    pytest.importorskip("tokenizers")
    source = write_model(tmp_path / "hf", LLAMA, random_tensors(LLAMA), shards=2, tokenizer=True)
    (source / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_model(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def written_with(folder: Path, **files: Any) -> Any:
    """A tokenizer with other files beside it."""
    pytest.importorskip("tokenizers")
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    for name, content in files.items():
        file = folder / f"{name}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**known, **content}))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], ()), ([257, 258], (257, 258)), (257, (257,)), (None, (257,)), (-1, (257,)), ([257], (257,))],
)
def test_ends_are_read_in_every_form(ids, expected, tmp_path):
    found = written_with(tmp_path, generation_config={"eos_token_id": ids, "pad_token_id": -1})
    assert found.pad_id is None
    assert set(found.eos_ids) >= set(expected)


def test_templates_and_special_tokens_are_read_in_every_form(tmp_path):
    by_name = {"default": "plain", "tool_use": "with tools"}
    found = written_with(tmp_path / "a", tokenizer_config={"chat_template": by_name})
    assert (found.chat_template, found.tool_template) == ("plain", "with tools")
    for number, more in enumerate((["<new>"], {"new_token": "<new>"})):
        files = {"tokenizer_config": {"extra_special_tokens": more}, "added_tokens": {"<new>": found.vocab_size}}
        assert "<new>" in written_with(tmp_path / str(number), **files).special_ids
