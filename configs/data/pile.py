"""A mixture of 22 sources in the manner of The Pile: its weights, from folders of your own.

    llmjax run --config configs/data/pile.py --config.data.max_epochs=4 --workdir runs/pile

Each source is a folder below pile/ (for another place: configs/data/pile.py:/data/pile) with any files that prepare
reads. A missing folder is left out, and the others keep the ratio of their weights. The weights are the shares of The
Pile's table 1 in percent. `data.max_epochs` limits how often a source is seen; the other sources then give more. Of
near copies across sources the one in the earlier source stays.

Needs the extra [data]. Hardware: as the model; the default is small enough for a laptop.

Gao et al. (2020), "The Pile: An 800GB Dataset of Diverse Text for Language Modeling".
"""

from pathlib import Path

from ml_collections import ConfigDict

from llmjax.config import base

WEIGHTS = {
    "pile_cc": 18.11, "pubmed_central": 14.40, "books3": 12.07, "openwebtext2": 10.01, "arxiv": 8.96, "github": 7.59,
    "freelaw": 6.12, "stack_exchange": 5.13, "uspto": 3.65, "pubmed_abstracts": 3.07, "gutenberg": 2.17,
    "opensubtitles": 1.55, "wikipedia": 1.53, "dm_mathematics": 1.24, "ubuntu_irc": 0.88, "bookcorpus2": 0.75,
    "europarl": 0.73, "hackernews": 0.62, "youtube_subtitles": 0.60, "philpapers": 0.38, "nih_exporter": 0.30,
    "enron_emails": 0.14,
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder of the sources' folders (pile)."""
    root = Path(arg or "pile")
    found = [name for name in WEIGHTS if (root / name).is_dir()] or list(WEIGHTS)
    c = base()
    c.name = "pile"
    c.data.sources = tuple(f"{name}={root / name}" for name in found)
    c.data.mixture = ("0%: " + " ".join(f"{name}={WEIGHTS[name]}" for name in found),)
    c.prepare.steps = ("repair", "exact", "near", "personal")
    c.prepare.encodings = ("utf-8", "detect")
    c.tokenizer.vocab_size = 32_768
    return c
