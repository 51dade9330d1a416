"""The bar of bytes: shown on a terminal, silent elsewhere."""

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
