"""Texts with known truth for `text_steps.py`: pages of HTML around known content, and personal data with its look-alikes.

The texts around them are this Python's: sources and documentation of the standard library and of installed packages.
"""

import html
import random
import re
import sysconfig
from pathlib import Path


def library_texts(suffixes: tuple[str, ...], megabytes: float) -> list[str]:
    """Texts of files of the standard library and of installed packages, sorted by path, up to a size."""
    texts, size = [], 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                texts.append(text)
                size += len(text.encode())
                if size >= megabytes * 1e6:
                    return texts
    return texts


def paragraphs() -> list[str]:
    """Paragraphs of prose, each on one line, none twice, from documentation and docstrings."""
    found: dict[str, None] = {}
    for text in library_texts((".py", ".rst", ".md", ".txt"), 12.0):
        for block in re.split(r"\n\s*\n", text):
            line = " ".join(block.split())
            words = line.split()
            if (
                len(words) >= 12
                and sum(w.isalpha() for w in words) >= 0.75 * len(words)
                and not re.search("[<>{}|=]", line)
            ):
                found[line[:800]] = None
    return list(found)


def make_pages(blocks: list[str], pages: int, generator: random.Random) -> list[tuple[str, list[str], list[str]]]:
    """Pages as (HTML, blocks that belong to its content, texts that do not), with the usual furniture around."""
    made = []
    for number in range(pages):
        content = generator.sample(blocks, generator.randint(8, 30))
        body, truth = [], []
        for block in content:
            kind = generator.random()
            if kind < 0.08:
                code = (
                    f"def run_{len(body)}(value):\n    if value:\n        return {len(body)}\n\n    return value  # end"
                )
                body.append(f"<div class='highlight'><pre><span></span>{html.escape(code)}\n</pre></div>")
                truth.append(code)
            elif kind < 0.14:
                cells = block.split()[:9]
                rows = [cells[i : i + 3] for i in (0, 3, 6)]
                body.append(
                    "<table>"
                    + "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in rows)
                    + "</table>"
                )
                truth += [" ".join(row) for row in rows]
            elif kind < 0.24:
                body.append(f"<ul><li>{html.escape(block)}</li><li>{html.escape(block[::-1])}</li></ul>")
                truth += [block, block[::-1]]
            else:
                marked = (
                    html.escape(block).replace(" the ", " <b>the</b> ", 1).replace(" of ", " <a href='/x'>of</a> ", 1)
                )
                body.append(f"<p>{marked}</p>\n")
                truth.append(block)
        furniture = [f"Navigation entry {i} of page {number}" for i in range(14)]
        links = "".join(f"<li><a href='/{i}'>{text}</a></li>" for i, text in enumerate(furniture))
        extra = [f"Copyright {number} of the makers of this site, all rights reserved", f"Site banner {number}"]
        wrap = generator.choice(
            ["<main>{}</main>", "<div class='content'><div class='body'>{}</div></div>", "<article>{}</article>"]
        )
        made.append((
            f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>t</title><style>{'p{margin:0} ' * 40}</style>"
            f"<script>{'var tracked = 1; ' * 60}</script></head><body><header>{extra[1]}</header><nav><ul>{links}</ul></nav>"
            + wrap.format("<h1>Title</h1>" + "".join(body))
            + f"<footer><p>{extra[0]}</p></footer></body></html>",
            truth,
            furniture + extra,
        ))  # fmt: skip
    return made


def luhn(digits: str) -> str:
    total = sum(sum(divmod(2 * int(d), 10)) if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def plant_personal(kind: str, generator: random.Random) -> str:
    """One datum of a class, valid, in one of its usual forms."""
    number = lambda n: "".join(generator.choice("0123456789") for _ in range(n))  # noqa: E731
    letters = lambda n: "".join(generator.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n))  # noqa: E731
    mixed = lambda n: "".join(generator.choice("abcdefghABCDEFGH0123456789") for _ in range(n - 3)) + "aZ7"  # noqa: E731
    if kind == "email":
        return f"{letters(5)}{generator.choice('._-+')}{letters(4)}@{letters(7)}{generator.choice(['.com', '.de', '.co.uk', '.org', '.io'])}"
    if kind == "phone":
        return generator.choice([
            f"+1 {generator.randint(201, 989)}-{generator.randint(201, 989)}-{number(4)}", f"({generator.randint(201, 989)}) {generator.randint(201, 989)}-{number(4)}",
            f"+44 20 {number(4)} {number(4)}", f"+46 8 {number(3)} {number(3)} {number(2)}", f"0{generator.randint(1, 9)} 4{number(1)} 5{number(1)} 6{number(1)} 7{number(1)}",
            f"+49 151 {number(8)}", f"0171/{number(7)}", f"{generator.randint(201, 989)}.{generator.randint(201, 989)}.{number(4)}", f"020 7{number(3)} {number(4)}", f"tel: 08 {number(3)} {number(4)}",
        ])  # fmt: skip
    if kind == "ip":
        if generator.random() < 0.3:
            return f"2a0{generator.randint(1, 9)}:{generator.randrange(4096, 65536):x}:{generator.randrange(65536):x}::{generator.randrange(1, 65536):x}"
        return f"{generator.randint(11, 99)}.{generator.randint(0, 255)}.{generator.randint(0, 255)}.{generator.randint(1, 254)}"
    if kind == "card":
        card = luhn(generator.choice(["4", "51", "53", "6011"]).ljust(4, "7") + number(11))
        return generator.choice([card, " ".join(re.findall("....", card)), "-".join(re.findall("....", card))])
    if kind == "iban":
        country, length = generator.choice([("DE", 18), ("FR", 23), ("SE", 20), ("ES", 20)])
        account = number(length)
        check = 98 - int("".join(str(int(c, 36)) for c in account + country + "00")) % 97
        whole = f"{country}{check:02d}{account}"
        return generator.choice([whole, " ".join(re.findall(".{1,4}", whole))])
    return generator.choice([
        f"AKIA{number(8)}ABCDEFGH", f"ghp_{mixed(36)}", f"sk-proj-{mixed(40)}", f"AIza{mixed(35)}", f"xoxb-{number(12)}-{mixed(24)}", f"eyJ{mixed(20)}.eyJ{mixed(30)}.{mixed(43)}",
        f"-----BEGIN PRIVATE KEY-----\n{mixed(64)}\n{mixed(64)}\n-----END PRIVATE KEY-----", f"hf_{mixed(34)}",
    ])  # fmt: skip


def near_misses(generator: random.Random) -> str:
    """Something that looks like personal data and is not."""
    number = lambda n: "".join(generator.choice("0123456789") for _ in range(n))  # noqa: E731
    wrong = luhn("4" + number(14))
    return generator.choice([
        f"version {generator.randint(1, 20)}.{number(1)}.{number(2)}.{generator.randint(1, 99)}", f"2{number(3)}-0{generator.randint(1, 9)}-1{number(1)} 12:{generator.randint(10, 59)}:00",
        f"192.168.{generator.randint(0, 255)}.{generator.randint(1, 254)}", f"{wrong[:-1]}{(int(wrong[-1]) + 5) % 10}", f"ISBN 978-3-16-{number(6)}-{number(1)}",
        f"{number(1)}.{number(15)}", f"timestamp 17{number(8)}", f"self.x{number(1)}@self.weight", f"DE00{number(18)}", f"#{number(8)}", f"${number(3)},{number(3)}.{number(2)}",
        f"{number(8)}-{number(4)}-4{number(3)}-a{number(3)}-{number(12)}", f"pages {number(3)}-{number(3)}", f"sha 9f{number(38)}", f"0x{number(16)}",
    ])  # fmt: skip
