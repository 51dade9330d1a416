"""How a model's text is drawn when nobody says otherwise: generation_config.json is `config.generate`, both ways.

Ids at which a text ends are the tokenizer's affair (`data/hf_tokenizer.py`).
"""

from typing import Any

from ml_collections import ConfigDict

from llmjax import config
from llmjax.interop.fields import Theirs, flag, typed

FILE = "generation_config.json"
# The fields, which have the same names here, and the values that change nothing.
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
ALWAYS = ("temperature", "top_k", "top_p")  # written even then: transformers takes 50 for a top_k that is missing
# Other fields by which texts would differ, and the values that change nothing. A run has no settings for them.
NOT_READ = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_h"), 0),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
}


def not_read(theirs: Theirs) -> list[str]:
    """The fields, with their values, by which transformers would write other texts than the run does."""
    return [f"{n}={theirs[n]!r}" for n, off in NOT_READ.items() if theirs.get(n) not in (None, off, [])]


def read_generation(theirs: Theirs) -> dict[str, float]:
    """generation_config.json -> the settings of `config.generate` that it decides.

    Greedy where do_sample is false; where the file asks for sampling, what it leaves out is off. A file that says
    neither decides the repetition penalty at most. UserError for a value that is no number.
    """
    given = {n: typed(n, theirs[n], type(off), where=FILE) for n, off in OFF.items() if theirs.get(n) is not None}
    if theirs.get("do_sample") is None and not given.keys() & set(ALWAYS):
        return given
    if not flag(theirs, "do_sample", True, where=FILE):
        return {"temperature": 0.0, **{name: value for name, value in given.items() if name == "repetition_penalty"}}
    return {**OFF, **given}


def write_generation(c: ConfigDict) -> dict[str, Any]:
    """`config.generate` -> the fields of generation_config.json; none where all settings have their defaults."""
    usual = config.base().generate
    if all(c[name] == usual[name] for name in OFF):
        return {}
    sampled = c.temperature > 0
    said = {name: c[name] for name in OFF if c[name] != OFF[name] or name in ALWAYS}
    if not sampled:
        said = {name: value for name, value in said.items() if name == "repetition_penalty"}
    return {"do_sample": sampled, **said}
