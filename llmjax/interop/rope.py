"""Rotary positions in a config.json: the forms of transformers 4 and 5, and the ways of stretching them.

Version 4 has rope_theta and rope_scaling (null, or a dictionary with the kind), version 5 one dictionary
rope_parameters with everything. Both are read; version 4's is written, which both versions of the library read.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from llmjax.errors import UserError
from llmjax.interop.fields import Entry, Theirs, choose, flag, mapping, number, only, refuse_unknown, typed
from llmjax.model.positions import rotary_size

# Dynamic scaling begins beyond max_position_embeddings, which is the most that a model reads here.
KINDS = {"default": "none", "dynamic": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
KINDS |= {"longrope": "longrope", "su": "longrope"}  # the older name
ORIGINAL = "original_max_position_embeddings"
BASES, FRACTIONS = ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")
NAMES = ("rope_scaling", "rope_parameters", ORIGINAL)
# What a dictionary of each kind may hold, beside the base and the fraction.
KNOWN = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_slow", "beta_fast", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
BY_KIND = "give them within full_attention and sliding_attention"
IN_ALL = ("rope_type", "type", ORIGINAL, "finetuned", *BASES, *FRACTIONS)


def rope(
    *, base: float = 10_000.0, fraction: float = 1.0, base_name: str = "rope_theta", fraction_name: str = ""
) -> Entry:
    """The entry of rotary positions, behind those of the head's size and `max_length`.

    Args:
        base, fraction: what the model type has where its config.json says nothing.
        base_name, fraction_name: the fields that are written; all spellings are read.
    """

    def read(c: ConfigDict, theirs: Theirs) -> None:
        said = mapping(theirs, "rope_scaling") or mapping(theirs, "rope_parameters")
        read_dictionary(c, said, theirs)
        everything = {**theirs, **said}
        c.position = "rotary"
        c.rotary_base = float(number(everything, _first(BASES, everything), base))
        set_fraction(c, float(number(everything, _first(FRACTIONS, everything), fraction)))

    def write(c: ConfigDict) -> dict[str, Any]:
        more = {fraction_name: c.rotary_fraction} if fraction_name else {}
        if c.rotary_scaling == "longrope":
            more["max_position_embeddings"] = round(c.rotary_original_length * c.rotary_factor)
            more[ORIGINAL] = c.rotary_original_length
        return {base_name: c.rotary_base, "rope_scaling": scaling(c), **more}

    return Entry((*NAMES, *BASES, *FRACTIONS), read, write)


def rope_by_kind(*, base: float = 10_000.0, local_name: str = "") -> Entry:
    """The entry where layers with a window have angles of their own: another base, and never stretched.

    local_name: the field of that base; "": it is the same.
    """

    def read(c: ConfigDict, theirs: Theirs) -> None:
        nested = mapping(theirs, "rope_parameters")
        full = {**mapping(nested, "full_attention"), **mapping(theirs, "rope_scaling")}
        local = mapping(nested, "sliding_attention")
        kinds = ("full_attention", "sliding_attention")
        refuse_unknown("config.json's rope_parameters", {k: v for k, v in nested.items() if k not in kinds}, BY_KIND)
        if local.get("rope_type", "default") != "default" or local.keys() - {"rope_type", "rope_theta"}:
            raise UserError(
                f"config.json has rope_parameters for sliding_attention of {local}; supported: rope_type 'default'"
            )
        for name in FRACTIONS:
            only(full, name, 1)
        read_dictionary(c, full, theirs)
        c.position = "rotary"
        c.rotary_base = float(number(full, "rope_theta", number(theirs, "rope_theta", base)))
        usual = number(theirs, local_name, c.rotary_base) if local_name else c.rotary_base
        c.rotary_local_base = float(number(local, "rope_theta", usual))

    def write(c: ConfigDict) -> dict[str, Any]:
        said = {"rope_theta": c.rotary_base, "rope_scaling": scaling(c)}
        local = c.rotary_local_base or c.rotary_base
        if local_name:
            return {**said, local_name: local}
        # Version 5 takes another base than rope_theta for layers with a window, unless it is told.
        full = {"rope_type": "default", **(said["rope_scaling"] or {}), "rope_theta": c.rotary_base}
        by_kind = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        return {**said, "rope_parameters": by_kind}

    return Entry((*NAMES, "rope_theta", *filter(None, [local_name])), read, write)


def _first(names: tuple[str, ...], theirs: Theirs) -> str:
    return next((name for name in names if theirs.get(name) is not None), names[0])


def set_fraction(c: ConfigDict, fraction: float) -> None:
    """Set rotary_fraction. UserError if an odd number of dimensions would be rotated (their families disagree then)."""
    size = c.head_size or c.width // c.heads
    if int(size * fraction) % 2:
        raise UserError(
            f"config.json has partial_rotary_factor={fraction}, which rotates {int(size * fraction)} of {size} "
            "dimensions; supported: an even number"
        )
    c.rotary_fraction = fraction


def read_dictionary(c: ConfigDict, said: Mapping[str, Any], theirs: Theirs) -> None:
    """Set the keys of rotary scaling from rope_scaling or rope_parameters.

    Raises UserError for other kinds of scaling, and for dynamic scaling from another length than `max_length`.
    """
    where = "config.json's rope_scaling"
    kind = said.get("rope_type", said.get("type", "default"))
    c.rotary_scaling = choose("rope_type", kind, KINDS)
    known = (*KNOWN[c.rotary_scaling], *IN_ALL, *(("factor",) if kind == "dynamic" else ()))
    if kind == "dynamic":
        only({**theirs, **said}, ORIGINAL, c.max_length)
    refuse_unknown(where, {name: value for name, value in said.items() if name not in known})
    if c.rotary_scaling == "none":
        return
    given = theirs.get(ORIGINAL, said.get(ORIGINAL))
    length = c.max_length if given is None else typed(ORIGINAL, given, int)
    if length < 1:
        raise UserError(f"{where} has {ORIGINAL}={length}; it must be at least 1")
    c.rotary_original_length = length if c.rotary_scaling != "linear" else c.rotary_original_length
    if c.rotary_scaling == "longrope":
        _read_longrope(c, said, given, where)
        return
    c.rotary_factor = float(number(said, "factor", c.max_length / length if given else None, where=where))
    if c.rotary_scaling == "linear":
        return
    if c.rotary_scaling == "llama3":
        c.rotary_slow = float(number(said, "low_freq_factor", where=where))
        c.rotary_fast = float(number(said, "high_freq_factor", where=where))
        return
    c.rotary_slow = float(number(said, "beta_slow", 1, where=where))
    c.rotary_fast = float(number(said, "beta_fast", 32, where=where))
    c.rotary_truncate = flag(said, "truncate", True, where=where)
    factor = _attention_factor(said, where)
    scales = [number(said, name, 0.0, where=where) for name in ("mscale", "mscale_all_dim")]
    if factor is None and all(scales):
        factor = temperature(c.rotary_factor, scales[0]) / temperature(c.rotary_factor, scales[1])
    if factor is not None and not math.isclose(factor, temperature(c.rotary_factor), rel_tol=1e-6):
        c.rotary_attention_factor = float(factor)


def _attention_factor(said: Mapping[str, Any], where: str) -> float | None:
    given = said.get("attention_factor")
    return None if given is None else float(typed("attention_factor", given, float, where=where))


def _read_longrope(c: ConfigDict, said: Mapping[str, Any], original: Any, where: str) -> None:
    """Both sets of factors; `max_length` becomes the original length, so that texts are read as transformers reads them.

    A larger one, up to rotary_factor times the original, chooses the factors of longer texts.
    """
    if original is None:
        raise UserError(f"{where} is longrope, and config.json lacks {ORIGINAL}; add it as in the published config")
    c.rotary_factor = float(number(said, "factor", c.max_length / typed(ORIGINAL, original, int), where=where))
    for name, ours in (("short_factor", "rotary_short_factors"), ("long_factor", "rotary_long_factors")):
        values = said.get(name)
        if not isinstance(values, list):
            raise UserError(f"{where} has {name}={values!r}, which is no list of numbers")
        c[ours] = tuple(float(typed(name, value, float, where=where)) for value in values)
    c.rotary_attention_factor = _attention_factor(said, where) or 0.0
    c.max_length = c.rotary_original_length


def temperature(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor on cosines and sines."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaling(c: ConfigDict) -> dict[str, Any] | None:
    """rope_scaling of a config.json, for settings that are `plain`. UserError if positions are not rotary."""
    if c.position != "rotary":
        raise UserError(f"model.position={c.position!r} cannot be written as rope_theta; it must be rotary")
    if c.rotary_scaling == "none":
        return None
    said: dict[str, Any] = {"rope_type": c.rotary_scaling, "factor": c.rotary_factor}
    if c.rotary_scaling == "llama3":
        said |= {"low_freq_factor": c.rotary_slow, "high_freq_factor": c.rotary_fast}
    elif c.rotary_scaling == "yarn":
        said |= {"beta_slow": c.rotary_slow, "beta_fast": c.rotary_fast}
        said |= {} if c.rotary_truncate else {"truncate": False}
        said |= {"attention_factor": c.rotary_attention_factor} if c.rotary_attention_factor else {}
    elif c.rotary_scaling == "longrope":
        said |= {"short_factor": list(c.rotary_short_factors), "long_factor": list(c.rotary_long_factors)}
        said |= {"attention_factor": c.rotary_attention_factor} if c.rotary_attention_factor else {}
    return said | ({} if c.rotary_scaling == "linear" else {ORIGINAL: c.rotary_original_length})


def plain(c: ConfigDict) -> ConfigDict:
    """The same model with NTK-aware scaling said by the base; others unchanged.

    That scaling has no name of its own in a config.json, but it is a larger base.
    """
    if c.position != "rotary" or c.rotary_scaling != "ntk":
        return c
    c = c.copy_and_resolve_references()
    size = rotary_size(c)
    c.rotary_base = c.rotary_base * c.rotary_factor ** (size / (size - 2))
    c.rotary_scaling, c.rotary_factor = "none", 1.0
    return c
