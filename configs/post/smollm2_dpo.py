"""Direct preference optimisation of a real chat model: LoRA on SmolLM2-135M learns which answers people prefer.

    llmjax dpo --config configs/post/smollm2_dpo.py --config.train.init_from=runs/smollm2 --config.data.sources='["pairs.jsonl"]' --workdir runs/smollm2-dpo

It starts from the imported chat model (smollm2_sft.py says how to get it), which is also the reference. The reference reads all
rows of the files once, so give about 900 pairs. beta 0.1 as Rafailov et al. 2023. Loss (ln 2 before) and accuracy of held-out pairs are
measured before and after. `python benchmarks/smollm2_post.py` runs it. The rate is a guess: no measured quality yet.

Hardware: a laptop with 8 GB; at 100 GFLOP/s the 55 steps of 4,096 tokens take 25 minutes, and the reference another 15.
"""

from ml_collections import ConfigDict

from llmjax import config


def get_config(arg: str = "") -> ConfigDict:
    """The one run there is."""
    assert not arg, "this config has no variants"
    c = config.post_run("smollm2-dpo", objective="preference")
    c.model.adapter.kind = "lora"
    c.optimizer.learning_rate = 5e-5
    c.data.holdout_percent = 10.0
    c.train.duration = "55 steps"
    c.train.batch_size, c.train.micro_batches, c.train.sequence_length = 8, 4, 512
    c.train.eval_first, c.train.eval_every, c.train.eval_batches = True, "100%", 8
    return c
