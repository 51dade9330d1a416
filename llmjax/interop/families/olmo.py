"""OLMo 2 and 3 (OLMo Team 2025): Llama's tensors with norms after the branches, and over all heads' queries and keys.

OLMo 3 has windows in three of four layers, and stretches the positions of the others alone.
"""

from llmjax.interop.families.llama import biases, family, windows
from llmjax.interop.fields import settings
from llmjax.interop.mapping import Family
from llmjax.interop.rope import rope_by_kind

NORMS = settings(norm_place="after", qk_norm=True, qk_norm_over="heads")
FAMILIES: tuple[Family, ...] = (
    family("olmo2", "Olmo2", biases(attention="asked"), windows("none"), NORMS, defaults={"rms_norm_eps": 1e-5}),
    family(
        "olmo3",
        "Olmo3",
        biases(attention="asked"),
        windows("some", periodic=True),
        NORMS,
        rope_by_kind(base=500_000.0),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
)
