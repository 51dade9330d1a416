"""Reports: a run, or several runs side by side, as one HTML page and one Markdown page without other files.

`collect` reads the folder of a run and `curves` its metrics, `facts` selects the numbers, `plots` draws, `page` renders
one run, and `comparison` several. `cards` writes model cards and data cards. A report reads only files of the run, so it
also works for a run that is going on, that was killed, or that another machine made. The same files give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llmjax import storage


def run(c: ConfigDict, workdir: Path) -> dict[str, float | int | str]:
    """Write WORKDIR/report/index.html and WORKDIR/report/report.md from the files of the stages that have run.

    Returns:
        "html" and "markdown", the two files relative to WORKDIR, and "html_bytes", the size of the page.

    Raises:
        UserError: if the folder is not a run.
    """
    from llmjax.report.collect import collect
    from llmjax.report.page import write_pages

    html, markdown = write_pages(collect(workdir, config=c), workdir / "report")
    print(f"report: {html}", flush=True)
    return {
        "html": html.relative_to(workdir).as_posix(),
        "markdown": markdown.relative_to(workdir).as_posix(),
        "html_bytes": html.stat().st_size,
    }


def compare(workdirs: Sequence[Path], *, out: Path) -> Path:
    """Write a comparison of two or more runs: curves, final numbers, differences between their configs.

    Args:
        workdirs: the folders of the runs. Differences are relative to the first.
        out: the folder for index.html, report.md, and for scores.md if runs have scores of `llmjax eval --tasks`, with
            paired tests.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: for fewer than two runs, the same run twice, or a folder that is not a run.
    """
    from llmjax.report import scores
    from llmjax.report.collect import collect
    from llmjax.report.comparison import write_comparison

    page = write_comparison([collect(Path(workdir)) for workdir in workdirs], out)
    if any(scores.read_scores(Path(workdir)) for workdir in workdirs):
        table = scores.comparison_table([Path(workdir) for workdir in workdirs])
        storage.write_text(out / "scores.md", table)
        print(f"{table}\nthese scores: {out / 'scores.md'}")
    return page
