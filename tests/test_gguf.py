"""GGUF files become the same models as the safetensors that they were made from; what is not known is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import few
from hf_files import LLAMA, assert_equal, expected_params, flat, gguf_tokenizer, imported, random_tensors

import llmjax
from llmjax import config
from llmjax.errors import UserError
from llmjax.interop import gguf as ours
from llmjax.interop import gguf_metadata, tokenizer_json
from llmjax.interop.families import FAMILIES
from llmjax.interop.fields import meaning
from llmjax.interop.read import import_model

gguf = pytest.importorskip("gguf")

QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "rope_theta": 1e6}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
GEMMA3 = {
    **LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "num_hidden_layers": 7,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
GEMMA2 = {
    **GEMMA3,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "num_hidden_layers": 3,
    "rope_theta": 1e4,
}
KINDS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": GEMMA2, "gemma3": GEMMA3}


def as_converted(arch: str, theirs: Mapping[str, Any], name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor as llama.cpp's converter names and changes it."""
    inner = gguf_metadata.GEMMA_INNER if arch.startswith("gemma") else gguf_metadata.INNER
    renamed = {there: here for here, there in gguf_metadata.OUTER.items()}.get(name, name)
    if name.startswith("model.layers."):
        _, _, block, part = name.split(".", 3)
        kind = part.rpartition(".")[2]
        renamed = f"blk.{block}.{ {v: k for k, v in inner.items()}[part.rpartition('.')[0]] }.{kind}".replace(" ", "")
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        queries = theirs["num_attention_heads"]
        heads = queries if "q_proj" in name else theirs.get("num_key_value_heads", queries)
        halves = array.reshape(heads, 2, -1, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        array = array + 1
    return renamed, array


def write_gguf(
    path: Path,
    arch: str,
    theirs: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    quantized: Any = None,
    raw: tuple[np.ndarray, Any] | None = None,
    **more: Any,
) -> Path:
    """A GGUF file of a model.

    Args:
        quantized: the type of its matrices.
        raw: bytes of the output head, and their type.
        more: further metadata under the architecture.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, name in gguf_metadata.KEYS.items():
        if name in theirs:
            add = writer.add_float32 if isinstance(theirs[name], float) else writer.add_uint32
            add(f"{arch}.{key}", theirs[name])
    if "sliding_window" in theirs:
        writer.add_uint32(f"{arch}.attention.sliding_window", theirs["sliding_window"])
    for key, value in {**{f"{arch}.{k}": v for k, v in more.items()}, **gguf_tokenizer(eot_token_id=258)}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, array in tensors.items():
        renamed, changed = as_converted(arch, theirs, name, array)
        if quantized is not None and array.ndim == 2:
            data = gguf.quants.quantize(np.ascontiguousarray(changed), quantized)
            writer.add_tensor(renamed, data, raw_dtype=quantized)
        else:
            writer.add_tensor(renamed, np.ascontiguousarray(changed))
    if raw is not None:
        writer.add_tensor("output.weight", raw[0], raw_dtype=raw[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", few(["llama", "qwen3", "gemma3", "qwen2", "gemma2"], 3))
def test_a_gguf_file_becomes_the_model_that_its_safetensors_become(tmp_path, arch):
    theirs = KINDS[arch]
    tensors = random_tensors(theirs)
    if arch.startswith("gemma"):  # 1 is added and taken away again, which float32 only does exactly for round numbers
        tensors = {k: np.round(v, 1) if v.ndim == 1 else v for k, v in tensors.items()}
        tensors = {k: (v + np.float32(1)) - np.float32(1) if v.ndim == 1 else v for k, v in tensors.items()}
    found = imported(write_gguf(tmp_path / "m.gguf", arch, theirs, tensors), tmp_path / "run")
    assert_equal(found, expected_params(theirs, tensors))
    c = config.from_json((tmp_path / "run" / "config.json").read_text()).model
    expected = FAMILIES[theirs["model_type"]].read_config(dict(theirs))
    assert meaning(c) == meaning(expected)


@pytest.mark.parametrize("kind", few(["Q8_0", "Q4_0", "Q4_1", "F16"], 2))
def test_quantized_matrices_are_what_the_package_dequantizes(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK_BYTES", 1000)  # several blocks
    theirs = {**LLAMA, "intermediate_size": 64}
    tensors, quantized = random_tensors(theirs), gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "m.gguf", "llama", theirs, tensors, quantized=quantized)
    rounded = {
        k: gguf.quants.dequantize(gguf.quants.quantize(v, quantized), quantized).astype(np.float32)
        if v.ndim == 2
        else v
        for k, v in tensors.items()
    }
    assert_equal(imported(file, tmp_path / "run"), expected_params(theirs, rounded))


def test_bfloat16_matrices_stay_exact(tmp_path):
    tensors = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in random_tensors(LLAMA).items()}
    quantized = gguf.GGMLQuantizationType.BF16
    file = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, quantized=quantized)
    assert_equal(imported(file, tmp_path / "run"), expected_params(LLAMA, tensors))


def test_the_tokenizer_and_all_ends_come_with_the_file(tmp_path):
    pytest.importorskip("tokenizers")
    import_model(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, random_tensors(LLAMA)), tmp_path / "run")
    model = llmjax.load(tmp_path / "run")
    assert model.tokenizer.eos_ids == (257, 258)
    assert model.tokenizer.decode(model.tokenizer.encode("hello w\u00f6rld")) == "hello w\u00f6rld"
    assert model.tokenizer.chat_template
    assert len(flat(model.params)) == 12


def test_llama3_scaling_is_read_from_its_factors(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    frequencies = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = []
    for frequency in frequencies:  # as Llama 3's reference does, one by one
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    assert gguf_metadata.llama3_scaling(np.array(factors), base=500_000.0, size=64) == scaling
    with pytest.raises(ValueError, match=r"rope_freqs.weight.* not Llama 3's"):
        gguf_metadata.llama3_scaling(np.array(factors) + 0.1, base=500_000.0, size=64)
    tensors = {**random_tensors(LLAMA), "rope_freqs.weight": np.full(4, 8, np.float32)}
    file = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, **{"rope.dimension_count": 8})
    with pytest.raises(ValueError, match=r"m.gguf cannot be imported: .* not Llama 3's"):
        ours.open_file(file)


def test_linear_and_yarn_scaling_are_read_and_others_refused(tmp_path):
    def scaling(**more: Any) -> Any:
        return ours.open_file(
            write_gguf(tmp_path / "m.gguf", "llama", LLAMA, random_tensors(LLAMA), **more)
        ).config.get("rope_scaling")

    kind, factor, original = (f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length"))
    assert scaling() is None
    assert scaling(**{kind: "linear", factor: 4.0}) == {"rope_type": "linear", "factor": 4.0}
    assert scaling(**{kind: "yarn", factor: 2.0, original: 32})["original_max_position_embeddings"] == 32
    with pytest.raises(ValueError, match="'longrope'; known are linear and yarn"):
        scaling(**{kind: "longrope", factor: 2.0})
    with pytest.raises(UserError, match="metadata lacks llama.rope.scaling.original_context_length"):
        scaling(**{kind: "yarn", factor: 2.0})


def test_without_a_number_of_key_heads_there_are_as_many_as_heads(tmp_path):
    theirs = {**LLAMA, "num_key_value_heads": LLAMA["num_attention_heads"]}
    tensors = random_tensors(theirs)
    without = {name: value for name, value in theirs.items() if name != "num_key_value_heads"}
    ours_ = ours.open_file(write_gguf(tmp_path / "m.gguf", "llama", without, tensors))
    assert ours_.config["num_key_value_heads"] == LLAMA["num_attention_heads"]
    np.testing.assert_array_equal(
        ours_.read("model.layers.0.self_attn.k_proj.weight"), tensors["model.layers.0.self_attn.k_proj.weight"]
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes are also infinities
@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_package_unpacks_it_or_refused_by_name(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK_BYTES", 5000)  # several blocks
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (6, 512 // block * size), np.uint8)
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", LLAMA, {"model.embed_tokens.weight": np.zeros((300, 32), np.float32)}, raw=(stored, kind))
    try:
        expected = gguf.quants.dequantize(stored, kind)
    except NotImplementedError:
        with pytest.raises(
            UserError, match=rf"output.weight is stored as {kind.name}, which .* cannot unpack: get the f"
        ):
            ours.open_file(path)
        return
    found = ours.open_file(path).read("lm_head.weight")
    assert found.dtype == (ml_dtypes.bfloat16 if kind.name == "BF16" else np.float32)
    np.testing.assert_array_equal(found.astype(np.float32).view(np.uint32), expected.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize(
    ("arch", "more", "message"),
    [
        ("mamba", {}, "architecture is 'mamba'; known are gemma2, gemma3, llama"),
        ("llama", {"expert_count": 8}, "has experts"),
        ("llama", {"attention.scale": 0.5}, r"llama\.attention\.scale=0\.5, which is not understood"),
        ("llama", {"rope.dimension_count": 4}, r"rope\.dimension_count=4; supported: the size of a head, 8"),
    ],
)
def test_other_architectures_and_unknown_metadata_are_refused_by_name(tmp_path, arch, more, message):
    with pytest.raises(ValueError, match=message):
        imported(write_gguf(tmp_path / "m.gguf", arch, LLAMA, {}, **more), tmp_path / "run")


def test_damaged_files_and_metadata_are_clear_errors(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, random_tensors(LLAMA))
    for size in (file.stat().st_size - 5000, 3000, 3):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.gguf is no complete GGUF file"):
            imported(tmp_path / "cut.gguf", tmp_path / "run")
    with pytest.raises(ValueError, match="there is no file"):
        imported(tmp_path / "none.gguf", tmp_path / "run")
    lacking = {k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}
    with pytest.raises(ValueError, match="metadata lacks llama.block_count"):
        imported(write_gguf(tmp_path / "m.gguf", "llama", lacking, random_tensors(LLAMA)), tmp_path / "run")
    tensors = {**random_tensors(LLAMA), "odd.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"odd.weight \(3,\)"):
        imported(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pre": "mystery"}, "'mystery'; known are gpt-2, smollm"), ({"model": "bert"}, "kind 'bert'; known")],
)
def test_tokenizers_of_other_kinds_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_json.from_gguf(gguf_tokenizer(**change), gemma=False)


CUT_TEXT = "It's 12345, isn't IT'S?\n\n\n  x\t\u00bd caf\u00e9s\u4e2d\u6587 \u00a1Hol\u00e1! a_b.c::d\r\n"


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("gpt-2", ["It", "'s", " 12345", ",", " isn", "'t", " IT", "'", "S", "?", "\n\n\n ", " x"]),
        (
            "smollm",
            ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " isn", "'t", " IT", "'", "S", "?", "\n\n\n ", " x"],
        ),
        ("llama-bpe", ["It", "'s", " ", "123", "45", ",", " isn", "'t", " IT", "'S", "?\n\n\n", " ", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " isn", "'t", " IT", "'S", "?\n\n\n", " ", " x"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " isn", "'t", " IT", "'S", "?\n\n\n", " ", " x"]),
    ],
)
def test_text_is_cut_as_each_vocabulary_wants_it(cut, expected):
    tokenizers = pytest.importorskip("tokenizers")
    files = tokenizer_json.from_gguf(gguf_tokenizer(pre=cut), gemma=False)
    steps = json.loads(files["tokenizer.json"])["pre_tokenizer"]
    parts = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).pre_tokenizer.pre_tokenize_str(CUT_TEXT)
    assert steps["pretokenizers"][-1]["type"] == "ByteLevel"
    assert [CUT_TEXT[start:stop] for _, (start, stop) in parts][: len(expected)] == expected


def test_scores_and_places_make_merges_best_piece_first():
    ranks = {"a": 5.0, "b": 6.0, "c": 7.0, "ab": 1.0, "bc": 2.0, "abc": 0.0}
    assert tokenizer_json.implied_merges(ranks) == [["ab", "c"], ["a", "bc"], ["a", "b"], ["b", "c"]]
