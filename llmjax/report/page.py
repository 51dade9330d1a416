"""Render a run as one self-contained HTML page and as Markdown."""

import functools
from pathlib import Path
from typing import Any

import jinja2

from llmjax import human, storage
from llmjax.report import facts, plots
from llmjax.report.collect import Run

TEMPLATES = Path(__file__).parent / "templates"


def write_pages(run: Run, folder: Path) -> tuple[Path, Path]:
    """Write folder/index.html and folder/report.md and return their paths."""
    story: dict[str, Any] = {
        "run": run,
        "sentence": facts.sentence(run),
        "tiles": facts.tiles(run),
        "funnel": facts.funnel(run),
        "sources": facts.source_table(run),
        "tokenizer": facts.tokenizer_facts(run),
        "evaluation": facts.evaluation(run),
        "settings": facts.settings(run),
        "command": facts.command(run),
        "versions": facts.versions(),
        "plots": facts.plots(run),
        "sparklines": sparklines(run),
    }
    return write(folder, template="run", story=story)


def write(folder: Path, *, template: str, story: dict[str, Any]) -> tuple[Path, Path]:
    """Render TEMPLATE.html and TEMPLATE.md into a folder as index.html and report.md."""
    html, markdown = folder / "index.html", folder / "report.md"
    storage.write_text(html, environment(html=True).get_template(f"{template}.html").render(story))
    storage.write_text(markdown, environment(html=False).get_template(f"{template}.md").render(story))
    return html, markdown


@functools.cache
def environment(*, html: bool) -> jinja2.Environment:
    """The templates. Texts of a run are escaped, for HTML automatically, for Markdown by the filters."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"count": human.count, "size": human.size, "cell": cell, "fenced": fenced}
    made.globals |= {"show": facts.show}
    return made


def sparklines(run: Run) -> list[tuple[str, str, str]]:
    """Loss curves for the Markdown page: (label, block characters, first and last value)."""
    found = []
    for label, name in (("training loss", "loss"), ("held-out loss", "heldout_loss")):
        curve = run.curves.by_name.get(name) if run.curves else None
        if curve is not None:
            ends = f"{curve.mean[0]:.3f} to {curve.mean[-1]:.3f} nats per token"
            found.append((label, plots.sparkline(curve), ends))
    return found


def cell(text: Any) -> str:
    """Text escaped for a cell of a Markdown table."""
    clean = " ".join(str(text).split())
    for character in "\\|<>*_`[]":
        clean = clean.replace(character, "\\" + character)
    return clean


def fenced(text: str) -> str:
    """Text as a Markdown code block, with a fence longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
