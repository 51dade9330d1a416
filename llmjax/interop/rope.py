"""Rotary positions in a config.json: the forms of transformers 4 and 5, and the ways of stretching them.

Version 4 has rope_theta and rope_scaling (null, or a dictionary with the kind), version 5 one dictionary
rope_parameters with everything. Both are read; version 4's is written, which both versions of the library read.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.fields import choose, field, only
from llmjax.model.positions import rotary_size

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_rope(c: ConfigDict, theirs: Mapping[str, Any], *, base: float = 10_000.0, fraction: float = 1.0) -> None:
    """Set the rotary keys of `c`. Its max_length must be set; base and fraction are the model type's defaults.

    Raises UserError for kinds of scaling whose angles depend on the text's length (dynamic, longrope), and others.
    """
    said = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    read_dictionary(c, said, theirs)
    c.position = "rotary"
    everything = {**theirs, **{name: value for name, value in said.items() if value is not None}}
    c.rotary_base = float(field(everything, "rope_theta", "rotary_emb_base", default=base))
    set_fraction(c, float(field(everything, "partial_rotary_factor", "rotary_pct", default=fraction)))


def set_fraction(c: ConfigDict, fraction: float) -> None:
    """Set rotary_fraction. UserError if an odd number of dimensions would be rotated (their families disagree then)."""
    size = c.head_size or c.width // c.heads
    if int(size * fraction) % 2:
        raise UserError(
            f"config.json has partial_rotary_factor={fraction}, which rotates {int(size * fraction)} of {size} "
            "dimensions; supported: an even number"
        )
    c.rotary_fraction = fraction


def read_dictionary(c: ConfigDict, said: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Set the keys of rotary scaling from rope_scaling or rope_parameters."""
    c.rotary_scaling = choose("rope_type", said.get("rope_type", said.get("type", "default")), KINDS)
    if c.rotary_scaling == "none":
        return
    length = theirs.get("original_max_position_embeddings", said.get("original_max_position_embeddings"))
    length = length or c.max_length
    c.rotary_factor = float(field(said, "factor", default=c.max_length / length))
    if c.rotary_scaling == "linear":
        return
    c.rotary_original_length = length
    if c.rotary_scaling == "llama3":
        c.rotary_slow = float(field(said, "low_freq_factor"))
        c.rotary_fast = float(field(said, "high_freq_factor"))
        return
    c.rotary_slow = float(field(said, "beta_slow", default=1))
    c.rotary_fast = float(field(said, "beta_fast", default=32))
    only(said, "truncate", True)
    temperature = _temperature(c.rotary_factor)
    given = said.get("attention_factor")
    if given is None and said.get("mscale") and said.get("mscale_all_dim"):
        given = _temperature(c.rotary_factor, said["mscale"]) / _temperature(c.rotary_factor, said["mscale_all_dim"])
    if given is not None and not math.isclose(given, temperature, rel_tol=1e-6):
        raise UserError(
            f"config.json has a YaRN attention_factor of {given}; supported: the paper's, {temperature} for factor={c.rotary_factor}"
        )


def _temperature(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines with."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(c: ConfigDict) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json. UserError if positions are not rotary.

    NTK-aware scaling has no name of its own there, but it is a larger base, and written as such.
    """
    if c.position != "rotary":
        raise UserError(f"model.position={c.position!r} cannot be written as rope_theta; it must be rotary")
    scaling: dict[str, Any] | None = None
    base = c.rotary_base
    if c.rotary_scaling == "ntk":
        base = plain(c).rotary_base
    elif c.rotary_scaling != "none":
        scaling = {"rope_type": c.rotary_scaling, "factor": c.rotary_factor}
    if c.rotary_scaling in ("llama3", "yarn"):
        slow, fast = (
            ("low_freq_factor", "high_freq_factor") if c.rotary_scaling == "llama3" else ("beta_slow", "beta_fast")
        )
        assert scaling is not None
        scaling |= {
            "original_max_position_embeddings": c.rotary_original_length,
            slow: c.rotary_slow,
            fast: c.rotary_fast,
        }
    return {"rope_theta": base, "rope_scaling": scaling}


def plain(c: ConfigDict) -> ConfigDict:
    """The same model with NTK-aware scaling said by the base, as config.json says it; others unchanged."""
    if c.position != "rotary" or c.rotary_scaling != "ntk":
        return c
    c = c.copy_and_resolve_references()
    size = rotary_size(c)
    c.rotary_base = c.rotary_base * c.rotary_factor ** (size / (size - 2))
    c.rotary_scaling, c.rotary_factor = "none", 1.0
    return c
