"""XLM: one model of many languages; masked, causal or translation objective, language embeddings where they help.

    llmjax run --config configs/models/xlm.py:tiny
    llmjax run --config configs/models/xlm.py:tiny-clm
    llmjax run --config configs/models/xlm.py:mlm-17 --config.data.sources='["en=en/","fr=fr/"]'
    llmjax run --config configs/models/xlm.py:tlm-15 --config.data.sources='["en|fr=en.txt|fr.txt"]'

Paper: Conneau & Lample 2019, and the shapes released with it: `mlm-17` and `mlm-100` (16 layers of 1,280, 200k pieces,
no language embeddings), `clm-enfr` (6 layers of 1,024, 2 languages), `tlm-15` (12 layers of 1,024, 15 languages,
masked tokens of aligned pairs of sentences). Norms after each sum, 64 rows of 256 tokens on each of 64 GPUs, dropout
0.1, Adam with an inverse square root; learning rates from 1e-4 to 5e-4 were tried: 1e-4 here. Hardware: 64 GPUs of 32
GB. Run here: the tiny ones. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, vocabulary, languages with an embedding, objective
    "tiny": (2, 64, 4, 0, 0, "masked"),
    "tiny-clm": (2, 64, 4, 0, 2, "causal"),
    "tiny-tlm": (2, 64, 4, 0, 2, "translation"),
    "mlm-17": (16, 1280, 16, 200_000, 0, "masked"),
    "mlm-100": (16, 1280, 16, 200_000, 0, "masked"),
    "mlm-en": (12, 2048, 16, 30_145, 0, "masked"),
    "clm-enfr": (6, 1024, 8, 64_139, 2, "causal"),
    "mlm-enfr": (6, 1024, 8, 64_139, 2, "masked"),
    "tlm-15": (12, 1024, 8, 95_000, 15, "translation"),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-clm`, `tiny-tlm`, or a published model such as `mlm-17`: see SIZES."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"xlm-{size}"
    m = c.model
    m.layers, m.width, m.heads, vocab, m.languages, c.objective.name = SIZES[size]
    if c.objective.name != "causal":
        m.direction = "bidirectional"
    m.activation = "gelu"
    m.norm = "layer"
    m.norm_place = "post"
    m.norm_epsilon = 1e-12
    m.embedding_norm = True
    m.final_norm = False
    m.bias = ("qkv", "out", "mlp", "norm", "head")
    m.position = "learned"
    m.max_length = 512
    if size.startswith("tiny"):
        return tiny_run(c)

    large_run(c, vocab_size=vocab, sequence_length=256, batch_size=4096, reserved=1)
    m.dropout = m.attention_dropout = 0.1
    c.optimizer.learning_rate = 1e-4
    c.optimizer.beta2 = 0.98
    c.optimizer.weight_decay = 0.0
    c.schedule.name = "inverse_sqrt"
    c.schedule.warmup = "4000 steps"
    c.train.duration = "500000 steps"
    return c
