"""The report of a run: what it says, and that it says it for every run, whole, unfinished or damaged."""

import doctest
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llmjax import cli, human
from llmjax.config import base, to_json
from llmjax.report import compare, run
from llmjax.report.curves import MAX_BINS, Curve, against, bin_rows
from llmjax.report.plots import Line, draw

SAMPLE = {
    "prompt": "def <b>add",
    "text": "(a, b):\n    return a + b  # ``` & <script>alert(1)</script>",
    "finish": "stop",
}


def write_json(path: Path, tree: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def metrics_row(step: int, *, steps: int, level: float = 2.0) -> dict:
    """A row as the training loop writes it, of a run whose loss falls towards `level`."""
    loss = level + 6 / (1 + step / 40) + 0.08 * math.sin(step * 12.9898)
    row = {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3 * min(step / 40, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "grad_norm": 0.4 + 3 / (1 + step / 30) + 0.1 * math.sin(step * 78.233),
        "param_norm": 60 + 0.02 * step,
        "update_norm": 0.05 + 0.2 / (1 + step / 100),
        "tokens": step * 4096,
        "flops": step * 4096 * 2.4e7,
        "tokens_per_second": 105_000 + 3000 * math.sin(step),
        "tokens_per_second_per_device": 52_500 + 1500 * math.sin(step),
        "mfu": 0.41 + 0.01 * math.sin(step),
        "train_seconds": step * 0.039,
        "skipped": int(step >= 700),
    }
    if step == 700:
        row["loss"] = row["grad_norm"] = math.nan
    if step % (steps // 10) == 0:
        row["heldout_loss"] = loss + 0.1
        for source, bits in (("", 0.0), ("/stdlib", -0.1), ("/notes", 0.25)):
            row[f"heldout_bits_per_byte{source}"] = loss / 2.4 + bits
    return row


def make_run(workdir: Path, *, name: str = "quickstart", steps: int = 1000, level: float = 2.0, **settings) -> Path:
    """A whole run's folder, in the formats that the stages write."""
    c = base()
    c.name = name
    c.data.sources = ("stdlib", "notes=/home/me/notes")
    for key, value in settings.items():
        c.optimizer[key] = value
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(c))
    rows = [metrics_row(step, steps=steps, level=level) for step in range(1, steps + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def count(documents: int, size: int) -> dict[str, int]:
        return {"documents": documents, "bytes": size}

    sources = {
        "stdlib": {
            "read": count(1764, 31_200_000),
            "rejected": {"duplicate": count(41, 212_000), "not UTF-8": count(9, 61_000), "too short": count(88, 700)},
            "train": count(1590, 30_126_300),
            "heldout": count(36, 800_000),
            "heldout_groups": ["json", "tarfile"],
        },
        "notes": {
            "read": count(120, 900_000),
            "rejected": {"duplicate": count(2, 9_000)},
            "train": count(115, 860_000),
            "heldout": count(3, 31_000),
            "heldout_groups": [],
        },
    }
    write_json(workdir / "prepare" / "manifest.json", {"total": {}, "sources": sources})
    write_json(workdir / "prepare" / "results.json", {"documents": 1884, "bytes": 32_100_000, "seconds": 7.2})
    split = {
        "stdlib": {"tokens": 9_600_000, "text_bytes": 30_126_300},
        "notes": {"tokens": 250_000, "text_bytes": 860_000},
    }
    write_json(workdir / "tokenizer" / "tokens" / "index.json", {"vocab_size": 4096, "splits": {"train": split}})
    write_json(workdir / "tokenizer" / "results.json", {"vocab_size": 4096, "seconds": 21.0})
    write_json(
        workdir / "train" / "results.json",
        {"steps": steps, "loss": level + 0.2, "tokens": steps * 4096, "flops": steps * 4096 * 2.4e7, "mfu": 0.41,
         "train_seconds": 200.4, "tokens_per_second": 105_000.0, "parameters": 4_210_000, "skipped": 1,
         "device": "TFRT_CPU x 2"},
    )  # fmt: skip
    evaluated = {
        "bits_per_byte": level / 1.25,
        "perplexity": 3.1 * level,
        "loss": level - 0.1,
        "xz_bits_per_byte": 1.83,
    }
    per_source = {"bits_per_byte/stdlib": 1.57, "perplexity/stdlib": 6.0, "bits_per_byte/notes": 2.1}
    write_json(workdir / "eval" / "results.json", {**evaluated, **per_source, "tokens": 260_000, "bytes": 831_000})
    write_json(workdir / "generate" / "results.json", {"prompts": 2, "tokens": 192})
    prompt = {"prompt": "class Queue:\n    ", "text": '"""A first-in first-out queue."""\n', "finish": "length"}
    (workdir / "generate" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in (SAMPLE, prompt)))
    return workdir


def pages(workdir: Path) -> tuple[str, str]:
    """The report of a run, as HTML and as Markdown."""
    results = run(base(), workdir)
    return (workdir / results["html"]).read_text(), (workdir / results["markdown"]).read_text()


def test_both_pages_tell_what_was_trained_on_what_and_how_well(tmp_path: Path) -> None:
    html, markdown = pages(make_run(tmp_path / "run"))
    for page in (html, markdown):
        for fact in ("4.21M parameters", "4.1M tokens", "stdlib, notes", "3 min 20 s", "1.600", "13% below xz -9e",
                     "105K", "41.0%", "exact duplicates", "221 kB", "2.1", "llmjax run --config", "jaxlib",
                     "1 skipped update" if page is markdown else "1 update was skipped"):  # fmt: skip
            assert fact in page.replace("\\", ""), fact
    assert "has not been run" not in html


def test_page_asks_nothing_from_outside_and_its_drawings_are_valid_and_have_unique_ids(tmp_path: Path) -> None:
    html, _ = pages(make_run(tmp_path / "run"))
    assert not re.findall(r"(?:src|srcset|@import|<script|<link[^>]*stylesheet)[ =(]", html)
    assert set(re.findall(r'href="([^"#]*)"', html)) <= {"data:,", "report.md"}
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 7 and "Loss by dollar" not in html  # the price is not known
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert re.search(r"<text[^>]*>0\.000[28]</text>", html), "the learning rate's ticks keep their digits"
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert not re.findall(r"#0102|#0103", html), "a placeholder colour was not replaced"


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    workdir = make_run(tmp_path / "run")
    assert pages(workdir) == pages(workdir)


class _Unwrapped(HTMLParser):
    """Cells whose text is not wrapped, and whether they are in a box that scrolls or wraps it after all."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[set[str]] = []
        self.found: list[bool] = []

    def handle_starttag(self, tag, attributes) -> None:
        if tag in ("meta", "link", "br"):
            return
        self.open.append(set((dict(attributes).get("class") or "").split()))
        if tag in ("td", "th") and "n" in self.open[-1]:
            self.found.append(any({"scroll", "columns"} & classes for classes in self.open))

    def handle_endtag(self, tag) -> None:
        self.open.pop()


def test_no_text_leaves_its_card(tmp_path: Path) -> None:
    """A training time of 40 min 29 s is wider than a card: only cells of tables that scroll are kept on one line."""
    long = make_run(tmp_path / "long", name="a-name-without-spaces" * 5)
    write_json(long / "train" / "results.json", {"train_seconds": 2429.0, "x/" + "long_name" * 9: "long_value" * 9})
    page = pages(long)[0]
    assert '<div class="value">40 min 29 s</div>' in page
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1])
    assert [name.strip() for name, style in rules if "nowrap" in style] == ["td.n, th.n"]
    wraps = {name.strip(): style for name, style in rules if "overflow-wrap" in style}
    assert "overflow-wrap: break-word" in wraps["body"] and "white-space: normal" in wraps[".columns td"]
    other = compare([long, make_run(tmp_path / "other")], out=tmp_path / "out").read_text()
    for text in (page, other):
        parser = _Unwrapped()
        parser.feed(text)
        assert parser.found and all(parser.found)


def test_texts_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    html, markdown = pages(make_run(tmp_path / "run", name="<i>a|b</i>"))
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html
    assert "<i>" not in html and "<i>" not in markdown.replace("\\<", "")
    assert "````text\ndef <b>add(a, b)" in markdown, "a sample with a fence needs a longer fence"


def test_names_are_no_formulas_and_none_is_left_out() -> None:
    curve = Curve(*(np.arange(3.0) for _ in range(4)))
    svg = draw(
        "loss", [Line(r"x$\frac{$y", curve, 0), Line("a$b$c", curve, 1), Line("_hidden", curve, 2)], y_label="loss"
    )
    for label in (r"x$\frac{$y", "a$b$c", "_hidden"):
        assert label in svg


def test_torn_last_line_and_nan_rows_are_told_and_do_not_stop_the_report(tmp_path: Path) -> None:
    workdir = make_run(tmp_path / "run")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "loss": 2.')
    html, _ = pages(workdir)
    assert "last line of metrics.jsonl is cut off" in html and "1,000 rows of metrics" in html
    assert "skipped update" in html


@pytest.mark.parametrize("kept", [(), ("prepare",), ("prepare", "tokenizer", "metrics.jsonl")])
def test_run_at_any_stage_has_a_report_that_names_the_stages_not_run(tmp_path: Path, kept: tuple[str, ...]) -> None:
    workdir = make_run(tmp_path / "run")
    for name in {"prepare", "tokenizer", "train", "eval", "generate", "metrics.jsonl"} - set(kept):
        (workdir / name).rename(tmp_path / f"away-{name}")
    for page in pages(workdir):
        assert "The stage eval has not been run" in page
        assert ("The stage prepare has not been run" in page) == ("prepare" not in kept)
        assert ("Training has begun but not finished" in page) == ("metrics.jsonl" in kept)


def test_a_training_that_went_on_with_other_settings_is_told(tmp_path: Path) -> None:
    workdir = make_run(tmp_path / "run")
    change = {"step": 400, "settings": {"optimizer.learning_rate": [1e-3, 5e-4]}}
    write_json(workdir / "stages.json", {"train": {"done": True, "settings": {}, "changes": [change]}})
    for page in pages(workdir):
        assert (
            "Training went on from step 400 although optimizer.learning_rate changed from 0.001 to 0.0005."
            in page.replace("\\", "")
        )


def test_folder_that_is_no_run_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="make one with: llmjax run"):
            run(base(), folder)


def test_long_runs_are_binned_without_losing_extremes_or_rows() -> None:
    steps = 20_000
    rows = ({"step": s, "loss": 50.0 if s == 12_345 else 1.0 + s / steps} for s in range(1, steps + 1))
    curves = bin_rows(json.dumps(row).encode() + b"\n" for row in rows)
    loss = curves.by_name["loss"]
    assert curves.rows == steps and MAX_BINS // 2 <= len(loss.step) <= 2 * MAX_BINS
    assert loss.high.max() == 50.0 and loss.low.min() == 1.0 + 1 / steps
    assert (loss.step[1:] > loss.step[:-1]).all() and curves.last["step"] == steps


def test_losses_are_drawn_by_second_and_where_the_price_is_known_by_dollar(tmp_path: Path) -> None:
    workdir = make_run(tmp_path / "run", steps=100)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"dollars": row["train_seconds"] * 2} for row in rows]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = pages(workdir)[0]
    assert "Loss by second" in page and "Loss by dollar" in page
    curves = bin_rows(json.dumps(row).encode() for row in rows)
    loss = against(curves, "heldout_loss", "dollars")
    np.testing.assert_allclose(loss.step, curves.by_name["heldout_loss"].step * 0.078, rtol=1e-3)
    np.testing.assert_array_equal(loss.mean, curves.by_name["heldout_loss"].mean)
    assert against(curves, "loss", "step") is curves.by_name["loss"]
    assert against(curves, "nothing", "step") is against(curves, "loss", "nothing") is None


def test_comparison_marks_the_best_and_shows_only_settings_that_differ(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", name="adamw")
    b = make_run(tmp_path / "b", name="low", level=1.8, learning_rate=3e-4)
    d = make_run(tmp_path / "d", name="high", level=2.2, learning_rate=3e-3)
    page = compare([a, b, d], out=tmp_path / "out")
    markdown = (page.parent / "report.md").read_text().replace("\\", "")
    assert "| eval | bits_per_byte | 1.600 | **1.440** (-10.0%) | 1.760 (+10.0%) |" in markdown
    assert "| optimizer.learning_rate | 0.001 | 0.0003 | 0.003 |" in markdown
    assert "optimizer.beta1" not in markdown
    assert page.read_text().count("<svg") == 6


def test_comparison_needs_two_different_runs(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    for workdirs in ([a], [a, a]):
        with pytest.raises(ValueError, match="two or more different runs"):
            compare(workdirs, out=tmp_path / "out")


def test_numbers_read_as_people_say_them() -> None:
    assert doctest.testmod(human).failed == 0 and doctest.testmod(human).attempted >= 3
    assert [human.count(n) for n in (0, 999_700, -1500, math.inf)] == ["0", "1M", "-1.5K", "inf"]
    assert [human.duration(s) for s in (59.7, 3599.7, 86_399)] == ["1 min", "1 h", "1 d"]
    assert human.size(999.6) == "1 kB"


def test_a_batch_without_weight_has_no_loss_and_is_not_bad():
    row = {"step": 1, "loss": None, "grad_norm": 0.0, "target_tokens": 0.0, "skipped": 0}
    assert bin_rows([json.dumps(row).encode()]).bad_count == 0
    assert bin_rows([json.dumps({**row, "target_tokens": 5.0}).encode()]).bad_count == 1


def test_a_run_with_rounds_of_samples_shows_them_with_rewards_and_advantages(tmp_path):
    workdir = make_run(tmp_path / "run", steps=20)
    rounds = {"rollout/reward": 0.5, "rollout/reward/exact_match": 0.25, "ratio": 1.0, "clipped": 0.0, "k1": 0.1, "k2": 0.1,
              "k3": 0.1, "entropy": 2.0, "rollout/drift": 1e-7, "rollout/drift_max": 1e-6, "rollout/equal_groups": 0.5,
              "rollout/length": 9.0, "rollout/longest": 12.0, "rollout/cut": 0.0}  # fmt: skip
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({**row, **rounds}) + "\n" for row in rows))
    answer = {"prompt": "2+3=", "answer": "<b>5", "finish": "eos", "reward": 1.0, "advantage": 0.75}
    for number in (0, 7, 12):
        write_json(workdir / "samples" / f"{number:06d}.json", [answer, {**answer, "answer": "6", "reward": None}])  # type: ignore[arg-type]
    run(base(), workdir)
    html, markdown = ((workdir / "report" / name).read_text() for name in ("index.html", "report.md"))
    for title in (
        "Reward",
        "Clipped tokens",
        "Divergence from the reference",
        "Drift between trainer",
        "Answers that were cut",
    ):
        assert title in html
    for page in (html, markdown):
        assert "Answers of round 0" in page and "Answers of round 12" in page and "Answers of round 7" not in page
        assert "0.75" in page
    assert "<b>5" not in html and "<b>5" not in markdown


def test_marks_are_given_by_the_command_and_shown_in_reports(tmp_path: Path, capsys) -> None:
    runs = [make_run(tmp_path / name, name=name) for name in ("a", "b")]
    assert cli.main(["mark", *map(str, runs), "--tag", "good", "--tag", "seed-3", "--note", "It <b>spikes</b>."]) == 0
    assert cli.main(["mark", str(runs[1]), "--untag", "seed-3", "--tag", "good", "--note", ""]) == 0
    capsys.readouterr()
    assert cli.main(["mark", *map(str, runs)]) == 0
    assert capsys.readouterr().out == f"{runs[0]}: #good #seed-3 It <b>spikes</b>.\n{runs[1]}: #good\n"
    html, markdown = pages(runs[0])
    assert "<b>#good</b> <b>#seed-3</b> It &lt;b&gt;spikes&lt;/b&gt;." in html and "#seed-3" in markdown
    written = compare(runs, out=tmp_path / "compare")
    text = Path(written).read_text() if Path(written).is_file() else (tmp_path / "compare" / "index.html").read_text()
    assert text.count("<b>#good</b>") == 2 and "It &lt;b&gt;spikes" in text
    kept = (runs[0] / "marks.json").read_bytes()
    for wrong, message in ((["--tag", "a b"], "is no tag"), (["--untag", "bad"], "has no tag 'bad'"), (["--note", "x" * 2001], "2,001 characters")):  # fmt: skip
        assert cli.main(["mark", *map(str, runs), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["mark", str(runs[0]), str(tmp_path), "--tag", "new"]) == 2  # no run: nothing is written
    assert (runs[0] / "marks.json").read_bytes() == kept
    (runs[0] / "marks.json").write_text("{")
    assert cli.main(["mark", str(runs[0]), "--tag", "new"]) == 2 and "mend or delete it" in capsys.readouterr().err
    assert "marks.json cannot be read" in pages(runs[0])[0]
