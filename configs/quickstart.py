"""The main job on a laptop: the Python standard library -> a small model that completes Python. Offline.

    llmjax run --config configs/quickstart.py            5 minutes on 2 cores, of which 4 train
    llmjax run --config configs/quickstart.py:hour       a larger model, within an hour, of which 36 minutes train
    llmjax run --config configs/quickstart.py --config.data.sources='["my_notes/"]' --workdir runs/notes

`make quickstart` runs the first of these. The time is fixed, so a faster machine takes more steps (about 1,050 on 2
cores) and ends with a lower loss. The text is what every Python carries: the library's own sources, the docstrings of
its compiled modules and the topics of `help()`, 12 MB. One module in ten of at most 64 KiB is held out, whole: a
larger one would be most of the measure. Results: README.md and results/quickstart.json.
"""

from ml_collections import ConfigDict

from llmjax.config import base, parse_arg

PROMPTS = (
    "import os\n\ndef read_lines(path):\n    ",
    'def merge(a, b):\n    """',
    "class Stack:\n    def __init__(self):\n",
    "    try:\n        value = int(text)\n    except",
)


def get_config(arg: str = "") -> ConfigDict:
    """`full` (the default) or `hour`."""
    choice = parse_arg(arg, choices=("full", "hour")).choice
    c = base()
    c.name = "quickstart"
    c.data.holdout_percent = 10.0
    c.data.holdout_max_bytes = 65_536

    c.tokenizer.vocab_size = 4096

    c.model.layers = 4
    c.model.width = 128
    c.model.heads = 4
    c.model.pattern = ("conv", "global")  # a layer that sees the last tokens, then one of attention, as LFM2
    c.model.qk_norm = True
    c.model.scan_unroll = 4  # at this size unrolled layers are the faster ones and compile in seconds

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.01
    c.optimizer.muon_learning_rate = 0.02
    c.schedule.name = "linear"
    c.schedule.final = 0.0

    c.train.batch_size = 8
    c.train.sequence_length = 256
    c.train.duration = "4 minutes"
    c.train.eval_every = "20%"
    c.checkpoint.every = "50%"

    c.generate.prompts = PROMPTS
    c.generate.max_new_tokens = 96

    if choice == "hour":
        c.name = "quickstart-hour"
        c.model.layers = 6
        c.model.scan_unroll = 6
        c.model.width = 256
        c.model.pattern = ("global",)  # convolutions were not tried at this size
        c.model.qk_norm = False
        c.train.sequence_length = 512
        c.train.duration = "36 minutes"
    return c
