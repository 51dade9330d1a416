"""DeepSeekMoE: many narrow experts, some that see every token, a dense first layer; v3: sigmoid scores, balancing bias.

    llmjax run --config configs/models/deepseek.py:tiny
    llmjax run --config configs/models/deepseek.py:tiny-v3
    llmjax run --config configs/models/deepseek.py:16b --config.data.sources='["corpus/"]'

Papers: Dai et al. 2024 (`16b`: 6 of 64 experts by softmax, not normalised, balance loss 0.001, 106,449 steps of 4,608
rows of 4,096 tokens, rate 4.2e-4 dropped to 31.6% at 80% and again at 90%) and DeepSeek-AI 2024 (`v3-router`: 8 of 256
experts by sigmoid, normalised, times 2.5, balanced by a bias of step 0.001, a second token predicted ahead).
`v3-router` is V3's shape with ordinary grouped attention (128 heads of 128, 8 of keys) in place of its multi-head
latent attention (`model.latent`). It chooses experts from all of them, not within groups. So its parameters are not
the published 671B. Balance losses are over each row, as theirs are over each sequence. Hardware: training keeps 16
bytes a parameter, 262 GB for `16b`. Run here: the tiny ones. The parameters of the other sizes are counted.
"""

from ml_collections import ConfigDict

from llmjax.config import base, large_run, parse_arg, tiny_run

SIZES = {  # layers, width, heads, key and value heads, MLP width; dense layers, expert width, experts, chosen, shared
    "tiny": (3, 64, 4, 4, 176, 1, 32, 8, 2, 2),
    "tiny-v3": (3, 64, 4, 2, 176, 1, 32, 8, 2, 1),
    "16b": (28, 2048, 16, 16, 10944, 1, 1408, 64, 6, 2),
    "v3-router": (61, 7168, 128, 8, 18432, 3, 2048, 256, 8, 1),
}


def get_config(arg: str = "") -> ConfigDict:
    """`tiny` (the default), `tiny-v3`, `16b` or `v3-router`."""
    size = parse_arg(arg, choices=tuple(SIZES)).choice
    c = base()
    c.name = f"deepseek-{size}"
    m, v3 = c.model, "v3" in size
    m.layers, m.width, m.heads, m.kv_heads, m.mlp_width, *experts = SIZES[size]
    m.moe.first, m.moe.width, m.moe.experts, m.moe.active, m.moe.shared = experts
    m.activation = "swiglu"
    m.norm = "rms"
    m.norm_epsilon = 1e-6
    m.position = "rotary"
    m.tie_embeddings = False
    m.max_length = 4096
    m.moe.z_loss = 0.0
    m.moe.balance_over = "row"
    if v3:
        m.moe.score = "sigmoid"
        m.moe.normalize = True
        m.moe.scale = 2.5
        m.moe.bias_rate = 0.001
        m.moe.balance_loss = 0.0001
        m.ahead = 2
        c.objective.name = "multi_token"
    else:
        m.moe.normalize = False
        m.moe.balance_loss = 0.001
    if size.startswith("tiny"):
        return tiny_run(c)

    m.head_size = 128
    m.init_std = 0.006
    if v3:
        large_run(c, vocab_size=129_280, sequence_length=4096, batch_size=15_360, micro_batches=64)
        c.optimizer.learning_rate = 2.2e-4
        c.train.duration = "14.8T tokens"
    else:
        large_run(c, vocab_size=102_400, sequence_length=4096, batch_size=4608)
        c.optimizer.learning_rate = 4.2e-4
        c.schedule.name = "step"
        c.schedule.drop_at = ("80%", "90%")
        c.schedule.drop_factor = 0.316
        c.train.duration = "106449 steps"
    c.schedule.warmup = "2000 steps"
    return c
