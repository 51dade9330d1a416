"""The metadata of cards: the YAML block that the hub reads at the head of a README.md, and the licences it knows."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmjax.errors import UserError

# The hub's identifiers. Its "unknown" is left out: a card says what is allowed.
HUB_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl
    postgresql unlicense wtfpl zlib
"""
LICENSES = frozenset(HUB_LICENSES.split())
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))  # fmt: skip
# What YAML may not have within quotes as it is.
UNPRINTABLE = re.compile("[\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")


def license_of(given: str, *, name: str, link: str, option: str) -> dict[str, str]:
    """The metadata of a licence. Raises UserError for what the hub does not know, and for "other" without name and link."""
    if given not in LICENSES:
        raise UserError(
            f"{option}={given!r} is no licence that the hub knows: give its identifier, such as apache-2.0, mit or "
            "cc-by-4.0, or other with --license-name and --license-link"
        )
    if (given == "other") != bool(name and link):
        raise UserError(f"{option}=other needs --license-name and --license-link, and they need {option}=other")
    return {"license": given, **({"license_name": name, "license_link": link} if given == "other" else {})}


def languages_of(given: Iterable[str], found: Mapping[str, int]) -> list[str]:
    """The languages that were given, or else those that `prepare` found. Raises UserError for what is no language code."""
    given = list(given)
    if wrong := [one for one in given if not LANGUAGE.fullmatch(one)]:
        raise UserError(f"--language={wrong[0]!r} is no language code: give one such as en, de or pt-BR")
    return given or [name for name in found if LANGUAGE.fullmatch(name)]


def size_category(rows: int) -> str:
    """The hub's class of a number of rows."""
    return next((name for below, name in SIZES if rows < below), "n>1T")


def result(dataset: str, kind: str, task: str, metrics: Mapping[str, float], *, split: str = "") -> dict[str, Any]:
    """An entry of `model-index`: numbers of one model on one data set. Numbers that are not finite are left out.

    Args:
        dataset: its name for people.
        kind: its name for programs.
    """
    return {
        "task": {"type": task},
        "dataset": {"type": kind, "name": dataset, **({"split": split} if split else {})},
        "metrics": [
            {"type": name, "name": name.replace("_", " "), "value": float(value)}
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ],
    }


def front_matter(metadata: Mapping[str, Any]) -> str:
    """The block of YAML; keys without a value are left out. Strings are quoted, so that no is a language and not false."""
    kept = {key: value for key, value in metadata.items() if value not in (None, "", [], {})}
    return "\n".join(["---", *_block(kept), "---", ""])


def _block(value: Mapping[str, Any] | list[Any]) -> list[str]:
    lines: list[str] = []
    for head, one in (
        [(f"{k}:", v) for k, v in value.items()] if isinstance(value, Mapping) else [("-", v) for v in value]
    ):
        if not isinstance(one, (Mapping, list)):
            lines.append(f"{head} {_scalar(one)}")
            continue
        inner = _block(one)
        if head == "-":
            lines += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])]
        else:
            lines += [head, *(f"  {line}" for line in inner)]
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, float):  # YAML reads 1e-05 as text, and 1.0e-05 as a number
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTABLE.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if not "\ud800" <= found[0] <= "\udfff" else "?", text
    )
