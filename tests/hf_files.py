"""Model folders and tokenizers as Hugging Face writes them, tiny and made here, for the tests of import and export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import mesh_of

from llmjax.config import ConfigDict
from llmjax.data.hf_tokenizer import byte_alphabet
from llmjax.interop.families import FAMILIES
from llmjax.interop.matching import Shapes
from llmjax.interop.read import import_model
from llmjax.interop.stacked import StackedReader
from llmjax.interop.tensors import Tensor, Writer, shard_names, write_index
from llmjax.interop.tokenizer_json import CONTROL, NORMAL, from_gguf
from llmjax.model import transformer
from llmjax.parallel import placement
from llmjax.parallel.placement import path_name
from llmjax.train import checkpoint, folders
from llmjax.train.step import State

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SPECIALS = ("<|start|>", "<|end|>", "<|turn|>")
CHAT = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|turn|>{% endfor %}{% if add_generation_prompt %}<|start|>bot\n{% endif %}"


def gguf_tokenizer(**more: Any) -> dict[str, Any]:
    """The tokenizer of a GGUF file: bytes, three special tokens and a few merges, byte-level BPE."""
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w"]
    joined = ["he", "ll", "hell", "hello", "\u0120w"]
    by_byte = sorted(byte_alphabet().items(), key=lambda item: item[1])
    tokens = [character for character, _ in by_byte] + list(SPECIALS) + joined
    types = [CONTROL if token in SPECIALS else NORMAL for token in tokens]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": merges}
    keys |= {"bos_token_id": 256, "eos_token_id": 257, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": CHAT}


def write_tokenizer(folder: Path, **more: Any) -> None:
    """tokenizer.json and tokenizer_config.json."""
    for name, data in from_gguf(gguf_tokenizer(**more), gemma=False).items():
        (folder / name).write_bytes(data)


def random_tensors(theirs: Mapping[str, Any], *, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a model with this config.json, by their names there."""
    family = FAMILIES[theirs["model_type"]]
    rows, shapes, rng = family.rows(family.read_config(dict(theirs))), Shapes(), np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(dtype)
        for row in rows if row.ours for name, shape in zip(row.theirs, shapes.of(row), strict=True)
    }  # fmt: skip


def write_model(
    folder: Path,
    theirs: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    tokenizer: bool = False,
) -> Path:
    """config.json and model.safetensors, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(theirs))
    names = list(tensors)
    parts = [{n: Tensor(tensors[n].dtype, tensors[n].shape) for n in names[i::shards]} for i in range(shards)]
    for file, part in zip(shard_names(shards), parts, strict=True):
        writer = Writer(folder / file, part)
        for name in part:
            writer.write(name, tensors[name])
        writer.close()
    write_index(folder, parts)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def flat(params: Any) -> dict[str, np.ndarray]:
    """path -> array."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def expected_params(theirs: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an import must make of the tensors, put together as a whole."""
    family = FAMILIES[theirs["model_type"]]
    c: ConfigDict = family.read_config(dict(theirs))
    shapes = flat_shapes(c)
    dtype = next(iter(tensors.values())).dtype
    params = {path: np.zeros(shape, dtype) for path, shape in shapes.items()}
    for row in family.rows(c):
        arrays = row.to_ours([tensors[name] for name in row.theirs]) if row.ours else []
        for slot, array in zip(row.ours, arrays, strict=True):
            params[slot.path][() if slot.layer is None else slot.layer] = array
    return params


def flat_shapes(c: ConfigDict) -> dict[str, tuple[int, ...]]:
    """path -> shape of every parameter of a model."""
    module = transformer.build(c)
    abstract = transformer.param_shapes(module)
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}


def imported(source: Path, run: Path, **settings: str) -> dict[str, np.ndarray]:
    """Import without a tokenizer, and restore the parameters as every checkpoint is."""
    import_model(source, run, **{"tokenizer": "none", **settings})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = StackedReader(folders.newest(run)).params
    abstract = {path: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=place) for path, t in shapes.items()}
    return flat(checkpoint.read_params(folders.newest(run), nested(abstract)))


def nested(by_path: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in by_path.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def assert_equal(ours: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same arrays under the same names, types and bits."""
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name, strict=True)


def save_run(run: Path, c: ConfigDict, *, mesh: str = "data=1", ema: bool = False) -> dict[str, np.ndarray]:
    """A checkpoint as training writes it, of random parameters spread over a mesh; what an export must hold."""
    rng = np.random.default_rng(0)
    arrays = nested({path: rng.normal(size=shape).astype(np.float32) for path, shape in flat_shapes(c.model).items()})
    params = jax.device_put(arrays, placement.parameter_shardings(arrays, mesh_of(mesh)))
    average = jax.tree.map(lambda x: x + 1, params) if ema else None
    state = State(
        step=np.int32(5),
        params=params,
        frozen={},
        opt_state={},
        ema=average,
        skipped=np.int32(0),
        bad_in_a_row=np.int32(0),
    )
    manager = checkpoint.manager(run / "checkpoints", keep=1)
    checkpoint.save(manager, state, step=5, meta={"step": 5, "config": c.to_dict()})
    manager.close()
    return flat(average if ema else params)
