"""GPT-NeoX and Pythia: attention and MLP in parallel behind a norm each, a quarter of each head rotated, untied head.

    llmjax run --config configs/models/neox.py:tiny
    llmjax run --config configs/models/neox.py:pythia-160m --config.data.sources='["corpus/"]'

Papers: Black et al. 2022 (GPT-NeoX-20B: 1,538 rows of 2,048 tokens, rate 9.7e-5, decay 0.01, 150,000 steps) and
Biderman et al. 2023 (Pythia: 1,024 rows, 143,000 steps, decay 0.01, cosine to a tenth, warm-up of 1%). Their
initialisation (N(0, 2/(5 D)), and 2/(N sqrt(D)) where branches end) is not among ours; here it is GPT-2's. The rates
of `pythia-14m` and `-31m` are those of 70m. The vocabulary was rounded up to what the tensor axis of their machine
divides. Hardware: 20B took 96 GPUs of 40 GB for 1,830 hours; pythia-160m fits one GPU. Run here: `tiny`. The
parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, vocabulary, peak learning rate
    "tiny": (2, 64, 4, 0, 3e-3),
    "pythia-14m": (6, 128, 4, 50_304, 1e-3),
    "pythia-31m": (6, 256, 8, 50_304, 1e-3),
    "pythia-70m": (6, 512, 8, 50_304, 1e-3),
    "pythia-160m": (12, 768, 12, 50_304, 6e-4),
    "pythia-410m": (24, 1024, 16, 50_304, 3e-4),
    "pythia-1b": (16, 2048, 8, 50_304, 3e-4),
    "pythia-1.4b": (24, 2048, 16, 50_304, 2e-4),
    "pythia-2.8b": (32, 2560, 32, 50_304, 1.6e-4),
    "pythia-6.9b": (32, 4096, 32, 50_432, 1.2e-4),
    "pythia-12b": (36, 5120, 40, 50_688, 1.2e-4),
    "neox-20b": (44, 6144, 64, 50_432, 9.7e-5),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `pythia-14m` to `pythia-12b`, or `neox-20b`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = "neox-tiny" if size == "tiny" else size
    c.model.layers, c.model.width, c.model.heads, vocab, rate = SIZES[size]
    c.model.block = "parallel"
    c.model.shared_norm = False
    c.model.activation = "gelu_tanh" if size == "neox-20b" else "gelu"
    c.model.norm = "layer"
    c.model.bias = ("qkv", "out", "mlp", "norm")
    c.model.position = "rotary"
    c.model.rotary_fraction = 0.25
    c.model.tie_embeddings = False
    c.model.max_length = 2048
    if size == "tiny":
        return tiny_run(c)

    neox = size == "neox-20b"
    large_run(c, vocab_size=vocab, sequence_length=2048, batch_size=1536 if neox else 1024)
    c.optimizer.learning_rate = rate
    c.optimizer.weight_decay = 0.01
    c.schedule.warmup = "1%"
    c.train.duration = "150000 steps" if neox else "143000 steps"
    return c
