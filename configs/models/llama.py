"""LLaMA 1 to 3.2: RMS norms before each branch, SwiGLU, rotary positions, no biases; grouped keys in the larger ones.

    llmjax run --config configs/models/llama.py:tiny
    llmjax run --config configs/models/llama.py:llama3-8b --config.data.sources='["corpus/"]'

Papers: Touvron et al. 2023a (llama1), 2023b (llama2), Grattafiori et al. 2024 (llama3), which publish shapes, batches,
learning rates and tokens. `llama3.1-*` stretch positions from 8k to 128k tokens by the rule that is named after them,
`llama3.2-*` by a factor of 32. `tiny` has grouped keys and that rule. The 3.2 models were pruned and distilled from
larger ones; here they have the recipe of the 8B model. Llama 3's batch is 4M tokens; in `405b` it doubles twice by
token 2.87T (in the paper the first time already at 252M). Hardware: training keeps 16 bytes a parameter, 128 GB for
8B, spread over fsdp: 8 accelerators of 80 GB for 7B and 8B, hundreds for 70B. Run here: `tiny`. The parameters of the
other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, MLP width, peak learning rate, tokens
    "tiny": (2, 64, 4, 2, 176, 3e-3, ""),
    "llama1-7b": (32, 4096, 32, 32, 11008, 3e-4, "1T"),
    "llama1-13b": (40, 5120, 40, 40, 13824, 3e-4, "1T"),
    "llama1-33b": (60, 6656, 52, 52, 17920, 1.5e-4, "1.4T"),
    "llama1-65b": (80, 8192, 64, 64, 22016, 1.5e-4, "1.4T"),
    "llama2-7b": (32, 4096, 32, 32, 11008, 3e-4, "2T"),
    "llama2-13b": (40, 5120, 40, 40, 13824, 3e-4, "2T"),
    "llama2-70b": (80, 8192, 64, 8, 28672, 1.5e-4, "2T"),
    "llama3-8b": (32, 4096, 32, 8, 14336, 3e-4, "15T"),
    "llama3-70b": (80, 8192, 64, 8, 28672, 1.5e-4, "15T"),
    "llama3.1-8b": (32, 4096, 32, 8, 14336, 3e-4, "15T"),
    "llama3.1-70b": (80, 8192, 64, 8, 28672, 1.5e-4, "15T"),
    "llama3.1-405b": (126, 16384, 128, 8, 53248, 8e-5, "15.6T"),
    "llama3.2-1b": (16, 2048, 32, 8, 8192, 3e-4, "9T"),
    "llama3.2-3b": (28, 3072, 24, 8, 8192, 3e-4, "9T"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), or a generation and a size such as `llama2-7b`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    generation = "llama3.1" if size == "tiny" else size.split("-")[0]
    c = base()
    c.name = size if generation in size else f"llama-{size}"
    m = c.model
    m.layers, m.width, m.heads, m.kv_heads, m.mlp_width, rate, tokens = SIZES[size]
    m.activation = "swiglu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6 if generation == "llama1" else 1e-5
    m.position = "rotary"
    m.tie_embeddings = generation == "llama3.2"
    m.max_length = {"llama1": 2048, "llama2": 4096, "llama3": 8192}.get(generation, 131_072)
    if generation.startswith("llama3"):
        m.rotary_base = 500_000.0
    if generation in ("llama3.1", "llama3.2"):
        m.rotary_scaling = "llama3"
        m.rotary_factor = 32.0 if generation == "llama3.2" else 8.0
        m.rotary_original_length = 8192
        m.rotary_slow, m.rotary_fast = 1.0, 4.0
    if size == "tiny":
        m.max_length = 256
        m.rotary_original_length = 32
        return tiny_run(c)

    length = {"llama1": 2048, "llama2": 4096}.get(generation, 8192)
    step_tokens = 2**24 if size == "llama3.1-405b" else 2**22
    vocab = 128_256 if generation.startswith("llama3") else 32_000
    large_run(c, vocab_size=vocab, sequence_length=length, batch_size=step_tokens // length)
    c.optimizer.learning_rate = rate
    c.schedule.warmup = "8000 steps" if generation.startswith("llama3") else "2000 steps"
    c.schedule.final = 0.01 if generation.startswith("llama3") else 0.1
    if size == "llama3.1-405b":
        c.train.batch_start = 2**22 // length
        c.train.batch_ramp = "2.87T tokens"
    c.train.duration = f"{tokens} tokens"
    return c
