"""Speed and quality of the text steps on planted truth: HTML, languages, encodings, spelling, personal data.

    python benchmarks/text_steps.py --texts genesis/ --out results/text_steps.json

Texts come from this Python (sources and documentation of the standard library and of installed packages), from manual
pages in several languages where the machine has them, and from --texts: a folder of FILE.txt named by language
(english*.txt, german.txt, ...). Speeds are MB of UTF-8 per CPU second (user and system) of one process, the best of
--repeats. Peers that are not installed are left out.
"""

import gzip
import importlib
import itertools
import json
import random
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path

from common import make_parser, speed, write
from planted_text import library_texts, make_pages, near_misses, paragraphs, plant_personal
from rich.console import Console
from rich.table import Table

from llmjax.prepare.formats import RejectedError
from llmjax.prepare.formats.html import extract
from llmjax.prepare.formats.text import decode
from llmjax.prepare.steps import emoji, language, personal, repair, spelling

LANGUAGES = {"english": "en", "finnish": "fi", "french": "fr", "german": "de", "portuguese": "pt", "swedish": "sv"}
MANUALS = (
    "cs",
    "da",
    "de",
    "es",
    "fi",
    "fr",
    "hu",
    "id",
    "it",
    "ja",
    "ko",
    "nl",
    "pl",
    "pt",
    "ro",
    "ru",
    "sv",
    "tr",
    "uk",
)


def peer(module: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# HTML


def benchmark_html(pages: int, repeats: int) -> list[dict]:
    made = make_pages(paragraphs(), pages, random.Random(0))
    size = sum(len(page.encode()) for page, _, _ in made)
    extractors: dict[str, Callable[[str], str | None]] = {
        "llmjax main": lambda page: extract(page)[0],
        "llmjax all": lambda page: extract(page, "all")[0],
    }
    from resiliparse.extract.html2text import extract_plain_text

    extractors["resiliparse main"] = lambda page: extract_plain_text(page, main_content=True, alt_texts=False)
    if trafilatura := peer("trafilatura"):
        extractors["trafilatura"] = trafilatura.extract
    if selectolax := peer("selectolax.lexbor"):
        extractors["selectolax body"] = lambda page: selectolax.LexborHTMLParser(page).body.text(separator=" ")
    rows = []
    for name, extractor in extractors.items():
        found = missed = leaked = output = code = codes = 0
        for page, truth, furniture in made:
            text = extractor(page) or ""
            flat = " ".join(text.replace(" | ", " ").split())
            for block in truth:
                if "\n" in block:
                    codes, code = codes + 1, code + (block in text)
                elif " ".join(block.split()) in flat:
                    found += 1
                else:
                    missed += 1
            leaked += sum(len(item) for item in furniture if item in flat)
            output += len(flat)
        rows.append({
            "extractor": name, "MB/CPU-s": speed(lambda e=extractor: [e(page) for page, _, _ in made], size, repeats=repeats),
            "block recall": found / (found + missed), "code recall": code / max(codes, 1), "leak": leaked / max(output, 1),
            "pages": len(made), "MB": size / 1e6,
        })  # fmt: skip
    return rows


# Languages


def language_texts(folder: Path | None, per_language: int, *, partly_english: bool = False) -> list[tuple[str, str]]:
    """(text, ISO code) from the folder, mended, and from translated manual pages, taken in their file order.

    Pages that hold much English prose are left out unless asked for: their folder does not tell their language.
    """
    texts = []
    for path in sorted(folder.glob("*.txt")) if folder else []:
        code = next((code for name, code in LANGUAGES.items() if path.name.startswith(name)), None)
        if code:
            text = repair.repair(path.read_text(encoding="utf-8", errors="replace"))[0]
            texts += [(text[at : at + 4000], code) for at in range(0, len(text) - 4000, 4000)][:per_language]
    for code in MANUALS:
        taken = 0
        for path in sorted(Path("/usr/share/man").glob(f"{code}/man*/*")):
            if taken == per_language:
                break
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = [line for line in data.decode("utf-8", errors="ignore").split("\n") if line[:1] not in (".", "'")]
            text = re.sub(r"\\f.|\\[-&.]|\\\(..|\\", "", "\n".join(lines))
            # Many translations are in part English: gold is only where few words are those of English prose.
            english = len(re.findall(r"\b(?:the|of|and|to|is|are|this|be)\b", text[:4000])) / len(
                text[:4000].split() or [1]
            )
            if len(text) > 400 and (partly_english or english < 0.02):
                texts.append((text[:4000], code))
                taken += 1
    return texts


def benchmark_language(folder: Path | None, per_language: int, repeats: int) -> list[dict]:
    texts = language_texts(folder, per_language)
    unfiltered = language_texts(folder, per_language, partly_english=True)
    rows = []
    filtered = [(n, "without partly English pages", texts) for n in (4000, 2000, 300, 120)]
    for limit, gold, chosen in [(2000, "all pages", unfiltered), *filtered]:
        cut = [(text[:limit], code) for text, code in chosen]
        size = sum(len(text.encode()) for text, _ in cut)
        right = sum(language.identify(text)[0] == code for text, code in cut)
        certain = [(code, *language.identify(text)) for text, code in cut]
        certain = [item for item in certain if item[2] >= 0.65]
        row = {"gold": gold, "characters": limit, "texts": len(cut), "languages": len({c for _, c in cut}), "right": right / len(cut),
               "certain": len(certain) / len(cut), "right where certain": sum(a == b for a, b, _ in certain) / max(len(certain), 1),
               "MB/CPU-s": speed(lambda c=cut: [language.identify(text) for text, _ in c], size, repeats=repeats)}  # fmt: skip
        rows.append(row)
    return rows


# Encodings


def benchmark_encodings(folder: Path | None, repeats: int) -> list[dict]:
    sources = [text for text, code in language_texts(folder, 40) if code not in ("ja", "ko", "ru", "uk")]
    sources = [repair.repair(text[:3000])[0] for text in sources if not text[:3000].isascii()]

    def plant(name: str, text: str) -> str | None:
        try:
            if name == "double UTF-8":
                return text.encode().decode("sloppy-windows-1252").encode().decode("sloppy-windows-1252")
            if name.startswith("UTF-8 read as"):
                return text.encode().decode(name.split()[-1])
            return text.encode(name.split()[0]).decode("latin-1")
        except UnicodeError:
            return None

    repair._ftfy()  # registers the sloppy codecs
    kinds = ["UTF-8 read as latin-1", "UTF-8 read as sloppy-windows-1252", "double UTF-8", "cp1252 read as latin-1",
             "cp850 read as latin-1", "mac_roman read as latin-1"]  # fmt: skip
    rows = []
    for kind in kinds:
        planted = [(broken, text) for text in sources if (broken := plant(kind, text)) is not None and broken != text]
        mended = sum(repair.repair(broken)[0] == text for broken, text in planted)
        letters = [(b, t, repair.repair(b)[0]) for b, t in planted]
        words = [(w, set(m.split())) for _, t, m in letters for w in t.split() if not w.isascii()]
        rows.append({"planted": kind, "texts": len(planted), "texts equal": mended / max(len(planted), 1),
                     "words mended": sum(w in m for w, m in words) / max(len(words), 1)})  # fmt: skip
    clean = [*sources, *library_texts((".py", ".md", ".rst"), 3.0)]
    tidy = [repair.repair(text)[0] for text in clean]
    changed = sum("repair.mojibake" in repair.repair(text)[1] for text in clean)
    size = sum(len(text.encode()) for text in clean)
    rows.append({"planted": "nothing (false alarms)", "texts": len(tidy), "texts changed": changed,
                 "MB/CPU-s": speed(lambda: [repair.repair(text) for text in clean], size, repeats=repeats)})  # fmt: skip
    guessed = []
    for name in ("cp1252", "cp1250", "cp850", "mac_roman", "utf-16-le"):
        for text in sources:
            try:
                data = text.encode(name)
            except UnicodeError:
                continue
            try:
                guessed.append(decode(data, ("utf-8", "detect"))[0] == text)
            except RejectedError:
                guessed.append(False)
    rows.append(
        {"planted": "bytes of 5 encodings", "texts": len(guessed), "texts equal": sum(guessed) / max(len(guessed), 1)}
    )
    for path in sorted(folder.glob("swedish*.txt")) if folder else []:
        text = path.read_text(encoding="utf-8")
        mended, facts = repair.repair(text)
        rows.append({"planted": path.name, "texts": 1, "controls before": len(re.findall("[\x80-\x9f]", text)),
                     "controls after": len(re.findall("[\x80-\x9f]", mended)), "lines mended": facts.get("repair.mojibake", 0),
                     "sample": mended.split("\n")[1]})  # fmt: skip
    return rows


# Personal data


def benchmark_personal(count: int, repeats: int) -> list[dict]:
    generator = random.Random(0)
    blocks = [b for b in paragraphs() if personal._PREFILTER.search(b) is None]
    rows = []
    for kind in personal.CLASSES:
        found = 0
        for _ in range(count):
            words = generator.choice(blocks).split()
            at, datum = generator.randrange(len(words)), plant_personal(kind, generator)
            text = " ".join([*words[:at], datum, *words[at:]])
            masked, facts = personal.mask(text)
            found += (
                masked == text.replace(datum.removeprefix("tel: "), f"<{kind.upper()}>") and f"personal.{kind}" in facts
            )
        rows.append({"class": kind, "planted": count, "recall": found / count})
    alarms: dict[str, int] = {}
    for _ in range(count * 3):
        words = generator.choice(blocks).split()
        at = generator.randrange(len(words))
        for name in personal.mask(" ".join([*words[:at], near_misses(generator), *words[at:]]))[1]:
            alarms[name] = alarms.get(name, 0) + 1
    rows.append(
        {
            "class": "look-alikes",
            "planted": count * 3,
            "false": sum(alarms.values()) / (count * 3),
            "by class": json.dumps(alarms),
        }
    )
    sources = library_texts((".py",), 8.0)
    size = sum(len(text.encode()) for text in sources)
    found_in = {}
    for text in sources:
        for name, number in personal.mask(text)[1].items():
            found_in[name] = found_in.get(name, 0) + number
    rows.append({"class": "sources of Python", "planted": 0, "MB/CPU-s": speed(lambda: [personal.mask(t) for t in sources], size, repeats=repeats),
                 "by class": json.dumps(found_in)})  # fmt: skip
    prose = ["\n".join(blocks[i : i + 40]) for i in range(0, len(blocks), 40)]
    rows.append({"class": "prose without", "planted": 0, "MB/CPU-s": speed(
        lambda: [personal.mask(t) for t in prose], sum(len(t.encode()) for t in prose), repeats=repeats)})  # fmt: skip
    return rows


# Spelling and emoji


def benchmark_words(count: int, repeats: int) -> list[dict]:
    generator = random.Random(0)
    known, _, variants = spelling.corrector("en_US")
    blocks = [b for b in paragraphs() if not spelling.is_code(b)]
    right = wrong = missed = 0
    for _ in range(count):
        words = generator.choice(blocks).split()
        places = [
            i
            for i, w in enumerate(words)
            if len(w) >= 6 and w.isalpha() and w.islower() and known(w) and w not in variants
        ]
        if not places:
            continue
        at = generator.choice(places)
        word, k = words[at], generator.randrange(1, len(words[at]) - 1)
        planted = generator.choice([word[:k] + word[k + 1 :], word[:k] + word[k] + word[k:], word[:k] + word[k + 1] + word[k] + word[k + 2 :],
                                    word[:k] + generator.choice("aeioutrns") + word[k + 1 :]])  # fmt: skip
        if planted == word or known(planted):
            continue
        result = spelling.correct(" ".join([*words[:at], planted, *words[at + 1 :]]))[0].split()[at]
        right, wrong, missed = (
            right + (result == word),
            wrong + (result not in (word, planted)),
            missed + (result == planted),
        )
    prose = ["\n".join(blocks[i : i + 20]) for i in range(0, len(blocks), 20)]
    size = sum(len(t.encode()) for t in prose)
    corrected = sum(spelling.correct(t)[1].get("spelling.corrected", 0) for t in prose)
    total = sum(len(t.split()) for t in prose)
    smiling = [t.replace(". ", ". \U0001f642 ", 1) for t in prose]
    return [
        {"step": "spelling", "planted": right + wrong + missed, "recall": right / (right + wrong + missed),
         "precision": right / max(right + wrong, 1), "MB/CPU-s": speed(lambda: [spelling.correct(t) for t in prose], size, repeats=repeats)},
        {"step": "spelling, nothing planted", "words": total, "corrected per million": 1e6 * corrected / total},
        {"step": "emoji", "planted": len(smiling), "recall": sum(":slightly_smiling_face:" in emoji.replace_emoji(t)[0] for t in smiling) / len(smiling),
         "MB/CPU-s": speed(lambda: [emoji.replace_emoji(t) for t in smiling], size, repeats=repeats)},
    ]  # fmt: skip


def show(console: Console, title: str, rows: Iterable[dict]) -> None:
    rows = list(rows)
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(f"{row[n]:.4g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names))
    console.print(table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--texts", type=Path, help="folder of texts named by language")
    parser.add_argument("--pages", type=int, default=150, help="pages of HTML made")
    parser.add_argument("--planted", type=int, default=400, help="data planted per class")
    parser.add_argument("--per-language", type=int, default=30, help="texts per language")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each timing, of which the best counts")
    arguments = parser.parse_args()
    results = {
        "html": benchmark_html(arguments.pages, arguments.repeats),
        "language": benchmark_language(arguments.texts, arguments.per_language, arguments.repeats),
        "encodings": benchmark_encodings(arguments.texts, arguments.repeats),
        "personal": benchmark_personal(arguments.planted, arguments.repeats),
        "words": benchmark_words(arguments.planted, arguments.repeats),
    }
    console = Console(width=160)
    for title, rows in results.items():
        show(console, title, rows)
    write(results, arguments.out)


if __name__ == "__main__":
    main()
