"""Tiny random models of Hugging Face's transformers, read through the family rows, and their logits beside ours.

Weights are made here from a tensor's name and a seed (`weights`), so that nothing is at its default (a norm's scale of
one, a bias of zero) and the tests against stored logits need neither torch nor transformers.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import llmjax
from llmjax.interop import mapping
from llmjax.interop.families import FAMILIES
from llmjax.interop.mapping import Family, Row
from llmjax.interop.read import import_model
from llmjax.model.transformer import build, param_shapes

Arrays = dict[str, np.ndarray]
GOLDEN = Path(__file__).parent / "golden" / "hf"
GOLDEN_SEED, GOLDEN_LENGTH = 0, 12


def weights(name: str, shape: tuple[int, ...], *, seed: int, centre: float = 1.0) -> np.ndarray:
    """The random float32 values of a tensor, a function of its name and the seed.

    Matrices keep the size of what they multiply; biases are around 0, and other vectors, which are norms' scales, around
    `centre`, by 0.3.
    """
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(0.3) * values + np.float32(0.0 if name.endswith("bias") else centre)
    return values * np.float32(shape[-1] ** -0.5)


def inputs(*, vocab: int, length: int, seed: int, more: Mapping[str, int] | None = None) -> Arrays:
    """tokens and mask (5, L) int32: a full row, rows padded on the left and on the right, and single tokens so padded.

    more: further inputs of random ids, by name and number of ids (segment types, languages).
    """
    rng = np.random.default_rng((seed, 1))
    rows = [(0, length), (length // 3, length), (0, length - length // 4), (length - 1, length), (0, 1)]
    mask = np.array([[start <= i < end for i in range(length)] for start, end in rows])
    batch = {"tokens": rng.integers(0, vocab, mask.shape), "mask": mask}
    batch |= {name: rng.integers(0, size, mask.shape) for name, size in (more or {}).items()}
    return {name: array.astype(np.int32) for name, array in batch.items()}


def theirs_causal(model: Any, batch: Arrays) -> np.ndarray:
    """Logits (B, L, V) of a causal model, with the position ids that `generate` gives it."""
    import inspect

    import torch

    mask = torch.tensor(batch["mask"], dtype=torch.long)
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        tokens = torch.tensor(batch["tokens"], dtype=torch.long)
        return model(input_ids=tokens, attention_mask=mask, use_cache=False, **more).logits.numpy()


def ours_causal(c: ConfigDict, params: Any, batch: Arrays) -> jax.Array:
    """Our logits (B, L, V): padding is segment 0, and positions count real tokens."""
    positions = np.maximum(np.cumsum(batch["mask"], axis=1) - 1, 0).astype(np.int32)

    @jax.jit
    def run(params: Any, tokens_BL: jax.Array, positions_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        return build(c).apply({"params": params}, tokens_BL, positions_BL=positions_BL, segments_BL=mask_BL)

    return run(params, jnp.asarray(batch["tokens"]), jnp.asarray(positions), jnp.asarray(batch["mask"]))


@dataclass(frozen=True)
class Case:
    """A variant of a family: classes of transformers by name, the fields of its config, and how the two sides are run."""

    family: str  # the row of the table that it belongs to
    variant: str
    config: str
    model: str
    fields: dict[str, Any]
    theirs: Callable[[Any, Arrays], np.ndarray] = theirs_causal  # (B, L, ...), compared where the mask is 1
    ours: Callable[[ConfigDict, Any, Arrays], jax.Array] = ours_causal
    more: dict[str, int] = field(default_factory=dict)  # further inputs, see `inputs`
    length: int = 200  # of the long texts
    attention: str = "eager"  # their implementation
    centre: float = 1.0  # around which norms' scales lie; 0 where what is stored is the scale minus 1
    importing: dict[str, Any] = field(default_factory=dict)  # settings of the import

    @property
    def name(self) -> str:
        return f"{self.family}-{self.variant}"


def make_theirs(case: Case, folder: Path, seed: int, **saving: Any) -> tuple[Any, dict[str, Any], Arrays]:
    """Their model in float32 with our weights, its config.json, and the tensors by the names that they have on disk."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    model_class = getattr(transformers, case.model)
    model_class(getattr(transformers, case.config)(**case.fields)).save_pretrained(folder, **saving)
    path = folder / "model.safetensors"
    tensors = {
        name: weights(name, array.shape, seed=seed, centre=case.centre) for name, array in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    model = model_class.from_pretrained(folder, attn_implementation=case.attention, dtype=torch.float32)
    return model.eval(), json.loads((folder / "config.json").read_text()), tensors


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family that reads a config.json."""
    return FAMILIES[theirs["model_type"]]


def match(family: Family, c: ConfigDict, names: Iterable[str]) -> list[Row]:
    """The rows by which a checkpoint with tensors of these names is read; nothing is missing and nothing left over."""
    found, missing, unknown = mapping.resolve(family, c, names)
    assert not missing and not unknown, (missing, unknown)
    return [row for row in found if row.ours]


def read_params(family: Family, c: ConfigDict, tensors: Arrays) -> Any:
    """Our parameters from theirs; every one of ours is written exactly once."""
    abstract = param_shapes(build(c))
    leaves = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    params = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in leaves.items()}
    written = {path: np.zeros(leaf.shape[:1] if _stacked(path) else (), int) for path, leaf in leaves.items()}
    for row in match(family, c, tensors):
        arrays = [tensors[name] for name in row.theirs]
        for slot, array in zip(row.ours, mapping.to_ours(row, arrays), strict=True):
            params[slot.path][() if slot.layer is None else slot.layer] = array
            written[slot.path][() if slot.layer is None else slot.layer] += 1
    wrong = {path: count for path, count in written.items() if not np.all(count == 1)}
    assert not wrong, f"parameters that are not written exactly once: {wrong}"
    tree: dict[str, Any] = {}
    for path, array in params.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _stacked(path: str) -> bool:
    return path.removeprefix("encoder/").split("/")[0] in ("first", "layers", "last")


def read_config(theirs: Mapping[str, Any]) -> ConfigDict:
    """`config.model` for a config.json, computed by the reference kernel."""
    c = family_of(theirs).read_config(dict(theirs))
    c.attention = "reference"
    return c


def compare(case: Case, folder: Path, *, seed: int, length: int) -> dict[str, Any]:
    """Largest difference of the outputs at real tokens, whether the argmax is the same everywhere, and their size."""
    model, theirs_json, tensors = make_theirs(case, folder, seed)
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    batch = inputs(vocab=c.vocab_size, length=length, seed=seed, more=case.more)
    real = batch["mask"].astype(bool)
    theirs = case.theirs(model, batch)
    ours = np.asarray(case.ours(c, params, batch))
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours[real], theirs[real]
    return {
        "difference": float(np.abs(ours - theirs).max()),
        "same_argmax": bool(np.array_equal(ours.argmax(-1), theirs.argmax(-1))),
        "deviation": float(theirs.std()),
        "outputs": ours.size,
    }


def greedy_texts(case: Case, folder: Path, *, seed: int, new: int = 12) -> tuple[list[int], list[int]]:
    """What both sides write after a prompt, the likeliest token each time: ours, with a cache, and theirs."""
    import torch

    model, *_ = make_theirs(case, folder / "made", seed)
    import_model(folder / "made", folder / "run", tokenizer="none", **case.importing)
    prompt = list(range(5, 14))  # with the new tokens longer than the windows of the cases
    model.generation_config.eos_token_id = None
    theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new)[0, len(prompt) :].tolist()
    ours = llmjax.load(folder / "run").generate([prompt], max_new_tokens=new, temperature=0.0, top_p=1.0)[0].tokens
    return list(ours), theirs


def golden(case: Case, *, update: Callable[[], Path] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Our outputs and the stored ones of transformers for the case's stored config, at real tokens.

    update: None, or a function that makes a folder for their model, which is then run and its outputs stored.
    """
    path = GOLDEN / f"{case.name}.json"
    if update is not None:
        model, theirs_json, tensors = make_theirs(case, update(), GOLDEN_SEED)
        c = read_config(theirs_json)
        batch = inputs(vocab=c.vocab_size, length=GOLDEN_LENGTH, seed=GOLDEN_SEED, more=case.more)
        logits = case.theirs(model, batch)[batch["mask"].astype(bool)][::4]
        stored = {
            "config": theirs_json,
            "tensors": {name: list(array.shape) for name, array in tensors.items()},
            "logits": [[round(float(x), 6) for x in row] for row in logits],
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in stored.items()]
        GOLDEN.mkdir(exist_ok=True)
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    theirs_json, tensors = stored_case(case)
    c = read_config(theirs_json)
    params = read_params(family_of(theirs_json), c, tensors)
    batch = inputs(vocab=c.vocab_size, length=GOLDEN_LENGTH, seed=GOLDEN_SEED, more=case.more)
    ours = np.asarray(case.ours(c, params, batch))[batch["mask"].astype(bool)][::4]
    return ours, np.array(json.loads(path.read_text())["logits"], np.float32)


def stored_case(case: Case) -> tuple[dict[str, Any], Arrays]:
    """The stored config.json of a case, and its tensors, made again from their names and shapes."""
    stored = json.loads((GOLDEN / f"{case.name}.json").read_text())
    tensors = {
        name: weights(name, tuple(shape), seed=GOLDEN_SEED, centre=case.centre)
        for name, shape in stored["tensors"].items()
    }
    return stored["config"], tensors
