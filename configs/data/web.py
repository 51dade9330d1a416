"""Web text made ready for training, in FineWeb's order: extraction, repair, language, quality, duplicates, personal data.

    llmjax prepare --config configs/data/web.py --config.data.sources='["crawl/"]' --workdir runs/web
    llmjax prepare --config configs/data/web.py:strict --config.data.sources='["crawl/"]' --workdir runs/web-strict

Reads folders of HTML, WARC, WET, PDF, text and JSONL. Keeps English documents that pass the rules of Gopher, C4
(without the rule of terminal marks, as in FineWeb) and FineWeb, at the thresholds of llmjax/prepare/rules.py. Finds
near duplicates over all sources at once; FineWeb does so for each crawl. `strict` also cuts out repeated passages of
50 tokens (Lee et al. 2021). Rejected documents are in WORKDIR/prepare/rejected/ with their reasons, and
WORKDIR/prepare/card.html says how much was lost at each step.

Needs the extra [data]. Hardware: any; about 5.7 MB of input a second of a core (43 MB of HTML, text and WARC, most of it
rejected: benchmarks/prepare_speed.py), most of it the rules of repetition, repair and the language.

Penedo et al. (2024), "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale".
"""

from ml_collections import ConfigDict

from llmjax.config import base, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`fineweb` (the default) or `strict`."""
    choice = parse_arg(arg, choices=("fineweb", "strict")).choice
    c = base()
    c.name = "web"
    c.prepare.steps = (
        "repair", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "exact", "near", "personal",
    )  # fmt: skip
    c.prepare.languages = ("en",)
    c.prepare.encodings = ("utf-8", "detect")
    c.prepare.c4_end_marks = False
    if choice == "strict":
        c.name = "web-strict"
        c.prepare.steps = (*c.prepare.steps[:-1], "substring", "personal")
    return c
