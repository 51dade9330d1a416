"""The bar of bytes, the count: shown on a terminal, silent elsewhere."""

import sys

import pytest

from llmjax import progress


@pytest.mark.parametrize("total", [None, 3_000_000])
def test_a_terminal_sees_the_bar_and_a_file_nothing(total, monkeypatch, capsys):
    with progress.bar("copying", total) as advance:
        advance(2_000_000)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar("copying", total) as advance:
        advance(2_000_000)
    out, err = capsys.readouterr()
    assert not out
    assert "copying" in err
    assert "2.0" in err


def test_a_terminal_sees_the_count_until_all_is_done(monkeypatch, capsys):
    assert progress.counter("scoring") is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = progress.counter("scoring", " tokens")
    assert show is not None
    show(1_000, 2_000)
    assert capsys.readouterr().err == "\rscoring: 1,000 of 2,000 tokens"
    show(2_000, 2_000)
    assert capsys.readouterr().err.endswith("\r\x1b[K")
