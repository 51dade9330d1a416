"""The story of a run, told in one HTML page and one Markdown page that need nothing but themselves.

`collect` reads a run's folder (and `curves` its metrics), `facts` says what is worth telling, `plots` draws, `page`
renders one run and `comparison` several side by side. Everything comes from files that other rooms left in the run, so
a report can be made of a run that is still going, that was killed, or that another machine made; the same files give
the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import storage
from llmjax.report.collect import collect


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Write WORKDIR/report/index.html and WORKDIR/report/report.md, from whatever stages have left in the run so far.

    Returns:
        "html" and "markdown", the two files relative to WORKDIR, and "html_bytes", the size of the page.

    Raises:
        UserError: if the folder is not a run.
    """
    from llmjax.report.page import write_pages

    html, markdown = write_pages(collect(workdir, config=c), workdir / "report")
    print(f"report: {html}", flush=True)
    return {
        "html": html.relative_to(workdir).as_posix(),
        "markdown": markdown.relative_to(workdir).as_posix(),
        "html_bytes": html.stat().st_size,
    }


def compare(workdirs: Sequence[Path], *, out: Path) -> Path:
    """Lay two or more runs side by side: curves, final numbers, differences between their configs.

    Args:
        workdirs: the runs' folders; differences are given relative to the first.
        out: the folder to write index.html and report.md to (made if it is not there), and scores.md, the scores of
            `llmjax eval --tasks` with a paired test, where runs have them.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: for fewer than two runs, the same run twice, or a folder that is not a run.
    """
    from llmjax.report import scores
    from llmjax.report.comparison import write_comparison

    page = write_comparison([collect(Path(workdir)) for workdir in workdirs], out)
    if any(scores.read_scores(Path(workdir)) for workdir in workdirs):
        table = scores.comparison_table([Path(workdir) for workdir in workdirs])
        storage.write_text(out / "scores.md", table)
        print(f"{table}\nthese scores: {out / 'scores.md'}")
    return page
