"""Characters of Shakespeare: nanoGPT's documented CPU setting, to compare codebases on equal terms.

    llmjax run --config configs/shakespeare.py --config.data.sources='["tinyshakespeare.txt"]'

tinyshakespeare.txt is char-rnn's (1.1 MB; data/tinyshakespeare in github.com/karpathy/char-rnn). 4 layers, 4 heads,
128 wide, 64 characters of context, 12 rows a step, 2,000 steps; the last 10% of the text is held out. nanoGPT
documents a validation loss of 1.88 nats a character. The recipe differs in one thing: the peak learning rate is 2e-3,
and nanoGPT's is 1e-3, with which this config gives 1.896. The loss is measured in the same way: in windows of 64
characters side by side (eval.stride = 64), so that a character has 0 to 63 others before it. About a minute and a half
on 2 cores. Expected: `loss` in eval/results.json at most 1.88 (results/shakespeare.json).
"""

from ml_collections import ConfigDict

from llmjax.config import base, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """No argument."""
    parse_arg(arg)
    c = base()
    c.name = "shakespeare"
    c.data.sources = ("tinyshakespeare.txt",)
    c.data.holdout_percent = 0.0
    c.data.holdout_tail_percent = 10.0
    c.tokenizer.kind = "char"

    c.model.layers = 4
    c.model.width = 128
    c.model.heads = 4
    c.model.activation = "gelu"
    c.model.norm = "layer"
    c.model.position = "learned"
    c.model.max_length = 64
    c.model.scan_unroll = 4

    c.optimizer.learning_rate = 2e-3
    c.optimizer.beta2 = 0.99
    c.optimizer.weight_decay = 0.1
    c.schedule.name = "cosine"
    c.schedule.warmup = "100 steps"
    c.schedule.final = 0.1

    c.train.batch_size = 12
    c.train.sequence_length = 64
    c.train.duration = "2000 steps"
    c.eval.stride = 64

    c.generate.prompts = ("ROMEO:\n", "What ")
    c.generate.max_new_tokens = 50  # learned positions end at 64
    return c
