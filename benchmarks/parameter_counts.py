"""Parameters of every size in configs/models/, ours against the published ones: writes results/parameter_counts.json.

    python benchmarks/parameter_counts.py            the table; exits with 1 if a difference has no explanation

The published count is transformers' count of the model of the published config.json (exact: published_models.py), a
number of the model's card, or a rounded number of the paper. Ours counts shapes, so that 600B parameters take no
memory.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import published_models
from common import make_parser, write

from llmjax import config
from llmjax.model.count import parameter_shapes

ROOT = Path(__file__).parent.parent
TRANSFORMERS = "transformers"

PAPERS: dict[str, tuple[str, dict[str, str]]] = {  # source, and numbers with the digits that it gives
    "gpt3": (
        "Brown et al. 2020, table D.1",
        {
            "small": "125M",
            "medium": "356M",
            "large": "760M",
            "xl": "1.32B",
            "2.7b": "2.65B",
            "6.7b": "6.66B",
            "13b": "12.85B",
            "175b": "174.6B",
        },
    ),
    "palm": ("Chowdhery et al. 2022, table 1", {"8b": "8.63B", "62b": "62.50B", "540b": "540.35B"}),
    "lamda": ("Thoppilan et al. 2022, without the embedding", {"2b": "2B", "8b": "8B", "137b": "137B"}),
    "opt": ("Zhang et al. 2022, table 1", {"175b": "175B"}),
    "gshard": (
        "Lepikhin et al. 2020, table 1",
        {
            "128e-12l": "12.5B",
            "512e-12l": "50B",
            "2048e-12l": "200B",
            "128e-36l": "37B",
            "512e-36l": "150B",
            "2048e-36l": "600B",
        },
    ),
    "deepseek": ("the model's card", {"16b": "16375728128"}),
    "unilm": ("Dong et al. 2019, as BERT", {"base": "110M", "large": "340M"}),
    "transformer": ("Vaswani et al. 2017, table 3", {"base": "65M", "big": "213M"}),
    "griffin": (
        "De et al. 2024, appendix C",
        {"100m": "100M", "200m": "200M", "400m": "400M", "1b": "1.3B", "3b": "3B", "7b": "7B", "14b": "14B"},
    ),
    "lstm": ("Merity et al. 2017, of Zaremba et al. 2014", {"ptb-medium": "20M", "ptb-large": "66M"}),
}

WHY: dict[str, str] = {  # family, or family:size -> what explains a difference
    "bert": "the classifier of the next sentence (2 D + 2), an objective that is not there",
    "unilm": "the paper repeats BERT's rounded size; the cased vocabulary is smaller and there is no pooler",
    "transformer": "the vocabulary is published as about 37,000; no one size fits both 65M and 213M",
    "palm:540b": "the paper cuts 540.356 off",
    "lamda:8b": "the published layers, widths and heads give 8.6B",
    "gshard": "rounded down: the experts of 2 x 1024 x 8192 alone are more (36,864 of them 618B)",
    "griffin": "the paper names its small sizes by one digit",
    "lstm": "a map from the state to the next layer, D x D in each, which theirs has not",
    "rnn": "not published; 2 V D + 2 D^2 + biases, one D^2 of which is the map from the state to the output",
    "deepseek:v3-router": "no such model: V3's experts with grouped attention",
}


def load_module(path: Path) -> Any:
    """The config file as a module."""
    spec = importlib.util.spec_from_file_location(f"models_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def families() -> dict[str, Any]:
    """Every family's config file as a module, by name."""
    return {path.stem: load_module(path) for path in sorted((ROOT / "configs" / "models").glob("*.py"))}


def published_sizes(module: Any) -> list[str]:
    """The sizes of a family that somebody published, which is all but the tiny ones."""
    return [size for size in module.SIZES if not size.startswith("tiny")]


def number(text: str) -> tuple[int, float]:
    """A published number and half of its last digit's worth: 8.63B is 8,630,000,000 give or take 5,000,000."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([MB]?)", text)
    assert match is not None, text
    unit = {"": 1, "M": 10**6, "B": 10**9}[match[3]]
    digits = len(match[2] or "")
    return round(float(f"{match[1]}.{match[2] or 0}") * unit), unit / 10**digits / 2 if unit > 1 else 0


def ours(family: str, size: str) -> int:
    """How many parameters a size of configs/models/ has here, counted as its paper does."""
    c = config.load(str(ROOT / "configs" / "models" / f"{family}.py") + f":{size}")
    skipped = ("embedding", "head/kernel") if family == "lamda" else ()
    return sum(math.prod(shape) for path, shape in parameter_shapes(c.model).items() if path not in skipped)


def row(family: str, size: str) -> dict[str, Any]:
    """One line of the table. Published is None where nobody says."""
    count = ours(family, size)
    tolerance, source, published = 0.0, "", None
    key = published_models.find(family, size)
    if key is not None:
        published = published_models.count(key, size)
        source = f"{TRANSFORMERS}, {published_models.MODELS[key][0]}"
    elif size in PAPERS.get(family, ("", {}))[1]:
        source, numbers = PAPERS[family]
        published, tolerance = number(numbers[size])
    difference = None if published is None else count - published
    why = WHY.get(f"{family}:{size}", WHY.get(family, ""))
    return {
        "family": family,
        "size": size,
        "ours": count,
        "published": published,
        "difference": difference,
        "rounded_to": int(2 * tolerance),
        "source": source,
        "why": why if difference is None or abs(difference) > tolerance else "",
    }


def main() -> None:
    """Print the table and write it."""
    parser = make_parser(__doc__, out=ROOT / "results" / "parameter_counts.json")
    args = parser.parse_args()
    rows = [row(family, size) for family, module in families().items() for size in published_sizes(module)]
    for r in rows:
        published = "-" if r["published"] is None else f"{r['published']:,}"
        difference = "" if r["difference"] is None else f"{r['difference']:+,}"
        print(
            f"{r['family']:12} {r['size']:18} {r['ours']:>18,} {published:>18} {difference:>16}  {r['source']}  {r['why']}"
        )
    write({"rows": rows}, args.out)
    unexplained = [r for r in rows if r["difference"] and abs(r["difference"]) > r["rounded_to"] / 2 and not r["why"]]
    if unexplained:
        raise SystemExit("without an explanation: " + ", ".join(f"{r['family']}:{r['size']}" for r in unexplained))


if __name__ == "__main__":
    main()
