"""Weights that are published in 4 and 8 bits become what they stand for, bit for bit; other forms are refused by name."""

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_files import LLAMA, assert_equal, expected_params, imported, random_tensors, write_model

from llmjax.errors import UserError
from llmjax.interop.dequantize import Mxfp4, dequantized, mxfp4
from llmjax.interop.tensors import Tensor

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [20, 24]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}},
        "ignore": ["lm_head"],
    }


FORMS = {  # quantization_config, the end of a scale's name, its shape for a matrix, its type
    "fp8 in blocks": (FP8, "_scale_inv", lambda m, n: (-(-m // 20), -(-n // 24)), np.float32),
    "fp8 in blocks with exponents": (
        FP8,
        "_scale_inv",
        lambda m, n: (-(-m // 20), -(-n // 24)),
        ml_dtypes.float8_e8m0fnu,
    ),
    "fp8 of matrices": ({**FP8, "weight_block_size": None}, "_scale_inv", lambda m, n: (), BF16),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, "_scale", lambda m, n: (m, 1), np.float32),
    "compressed-tensors of matrices": (compressed(strategy="tensor"), "_scale", lambda m, n: (1,), BF16),
    "compressed-tensors by outputs": (compressed(strategy="channel"), "_scale", lambda m, n: (m, 1), np.float32),
    "compressed-tensors in blocks": (
        compressed(strategy="block", block_structure=[20, 24]),
        "_scale",
        lambda m, n: (-(-m // 20), -(-n // 24)),
        np.float32,
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", lambda m, n: (), np.float32),
}


def in_float8(form: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of a model with its matrices in float8 and scales, and what they stand for, number by number."""
    _, end, shape_of, kind = FORMS[form]
    rng, stored, whole = np.random.default_rng(0), {}, {}
    for name, array in random_tensors(LLAMA, dtype=BF16).items():
        if "proj" not in name:
            stored[name] = array
            whole[name] = array.astype(np.float32)
            continue
        codes, shape = array.astype(E4M3), shape_of(*array.shape)
        scales = np.asarray(np.exp2(rng.normal(size=shape))).astype(kind)
        stored |= {name: codes, name + end: scales, name.replace("weight", "input_scale"): np.ones((), np.float32)}
        by_block = scales.astype(np.float32).reshape(shape if len(shape) == 2 else (1, 1))
        rows, columns = (20, 24) if "blocks" in form else (1 if by_block.size > 1 else 10**6, 10**6)
        made = np.empty(array.shape, np.float32)
        for i, j in itertools.product(*map(range, array.shape)):
            made[i, j] = np.float32(codes[i, j]) * by_block[i // rows, j // columns]
        whole[name] = made
    return stored, whole


@pytest.mark.parametrize("form", FORMS)
def test_a_float8_matrix_is_its_numbers_times_their_scales(form: str, tmp_path: Path) -> None:
    stored, whole = in_float8(form)
    source = write_model(tmp_path / "hf", {**LLAMA, "quantization_config": FORMS[form][0]}, stored)
    assert_equal(imported(source, tmp_path / "run"), expected_params(LLAMA, whole))


def test_what_modelopt_says_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    stored, whole = in_float8("modelopt")
    source = write_model(tmp_path / "hf", LLAMA, stored)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    assert_equal(imported(source, tmp_path / "run"), expected_params(LLAMA, whole))


class Weights:
    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.tensors = {name: Tensor(array.dtype, array.shape) for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


def test_mxfp4_is_sign_exponent_and_mantissa_times_a_power_of_two() -> None:
    codes, exponents = np.arange(16, dtype=np.uint8), np.array([0, 1, 2, 64, 127, 128, 200, 252], np.uint8)
    packed = np.broadcast_to(codes[::2] | codes[1::2] << 4, (3, len(exponents), 8))
    found = mxfp4(packed, np.broadcast_to(exponents, (3, len(exponents))))
    for e, power in enumerate(exponents.tolist()):
        for code in range(16):
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            exact = (-1) ** sign * size * 2.0 ** (power - 127)
            assert float(found[1, e * 16 + code]) == exact, (code, power)
            assert np.signbit(found[1, e * 16 + code].astype(np.float32)) == bool(sign)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    codes, exponents = (rng.integers(0, 256, shape, np.uint8) for shape in ((2, 6, 3, 16), (2, 6, 3)))
    exponents = exponents // 2 + 60
    expected = theirs.convert_moe_packed_tensors(torch.tensor(codes), torch.tensor(exponents))
    found = Mxfp4(Weights(a_blocks=codes, a_scales=exponents)).read("a")
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(torch.uint16).numpy())


def test_experts_in_mxfp4_become_the_model_of_their_numbers(tmp_path: Path) -> None:
    theirs = {**LLAMA, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "intermediate_size": 32}
    theirs |= {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": None}
    del theirs["rope_theta"]
    rng, stored, whole = np.random.default_rng(0), {}, {}
    for name, array in random_tensors(theirs, dtype=BF16).items():
        if not name.endswith("_proj"):
            stored[name] = whole[name] = array
            continue
        E, inputs, outputs = array.shape
        stored[f"{name}_blocks"] = rng.integers(0, 256, (E, outputs, inputs // 32, 16)).astype(np.uint8)
        stored[f"{name}_scales"] = rng.integers(120, 130, (E, outputs, inputs // 32)).astype(np.uint8)
        whole[name] = mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"]).swapaxes(1, 2)
    source = write_model(tmp_path / "hf", {**theirs, "quantization_config": {"quant_method": "mxfp4"}}, stored)
    found = imported(source, tmp_path / "run")
    assert_equal(found, expected_params(theirs, whole))
    assert {array.dtype for array in found.values()} == {np.dtype(BF16)}
    del stored["model.layers.0.mlp.experts.down_proj_scales"]
    source = write_model(tmp_path / "cut", {**theirs, "quantization_config": {"quant_method": "mxfp4"}}, stored)
    with pytest.raises(UserError, match="down_proj_blocks is uint8 .* with scales of None"):
        imported(source, tmp_path / "none")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'; supported are mxfp4, fp8, fbgemm_fp8"),
        ({"bits": 4}, "quant_method='None'"),
        ({**FP8, "fmt": "e3m4"}, "fmt='e3m4'; supported"),
        ({**FP8, "weight_block_size": [128]}, r"blocks of \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4'; supported: 'FP8'"),
        (compressed(num_bits=4), "group_0 has weights of type='float', num_bits=4"),
        (compressed(type="int"), "type='int', num_bits=8"),
        (compressed(symmetric=False), "symmetric=False"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity of format='sparse-24-bitmask'"),
    ],
)
def test_other_forms_are_refused_by_name(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dequantized({"quantization_config": said}, Weights())


def test_scales_of_a_shape_that_says_nothing_are_refused() -> None:
    weights = Weights(**{"a.weight": np.zeros((6, 4), E4M3), "a.weight_scale_inv": np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match=r"scales of a.weight \(6, 4\) are \(2, 2\); supported"):
        dequantized({"quantization_config": FP8}, weights)


@pytest.mark.parametrize("kind", [np.int8, E4M3, np.float64])
def test_numbers_without_a_scale_are_refused_unless_they_need_none(kind: Any, tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(kind)
    source = write_model(tmp_path / "hf", LLAMA, tensors)
    if kind is np.float64:
        imported(source, tmp_path / "run")
        return
    with pytest.raises(UserError, match=f"{name} is stored as {np.dtype(kind).name}, and neither"):
        imported(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
