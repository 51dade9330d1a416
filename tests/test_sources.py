"""What users point `data.sources` at: every format is read, bad documents are kept aside, mistakes get a mend."""

import ast
import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmjax import config
from llmjax.data import stdlib_corpus
from llmjax.prepare import parts
from llmjax.prepare import sources as module
from llmjax.prepare.documents import with_ids
from llmjax.prepare.reading import Fields, read_part
from llmjax.prepare.sources import check_extras, resolve_sources, sources_fingerprint
from llmjax.prepare.steps import extract


def read(*specs: str | Path, text_field: str = "text") -> list[SimpleNamespace]:
    """Documents as they are after the step extract."""
    sources = resolve_sources([str(spec) for spec in specs])
    check_extras(sources)
    step = extract.make(config.base().prepare)
    batches = [
        with_ids(step(batch))
        for part in parts.cut(sources)
        for batch in read_part(part, text_field=text_field, max_bytes=10**8, fields=Fields())
    ]
    rows = [row for batch in batches for row in batch.to_pylist()]
    return [SimpleNamespace(**{**row, "id": row["id"].hex()}) for row in rows]


def test_a_folder_is_read_recursively_in_the_order_of_paths_whatever_the_file_system_says(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/a.md", "a.py", "photo.png", "LICENSE", ".git/hook.py"):
        (tmp_path / name).write_text(f"text of {name}")
    walk = module.os.walk

    def reversed_walk(*args, **kwargs):
        for parent, folders, names in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield parent, folders, sorted(names, reverse=True)

    monkeypatch.setattr(module.os, "walk", reversed_walk)
    assert [(d.path, d.group, d.text) for d in read(tmp_path)] == [
        ("a.py", "a.py", "text of a.py"),
        ("b/a.md", "b/a.md", "text of b/a.md"),
        ("z.txt", "z.txt", "text of z.txt"),
    ]
    assert resolve_sources([str(tmp_path)])[0].skipped == {".png": 1, "hidden": 1, "no suffix": 1}


def test_a_glob_with_a_suffix_reads_files_that_a_folder_would_skip(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.log").write_text("text of a log")
    assert [(d.source, d.path, d.text) for d in read(f"docs={tmp_path}/**/*.log")] == [
        ("docs", "deep/x.log", "text of a log")
    ]


def test_line_ends_and_the_byte_order_mark_are_put_right_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff one \r\ntwo\rthree\t\u2028\n\n".encode())
    (document,) = read(tmp_path / "a.txt")
    assert document.text == " one \ntwo\nthree\t\u2028\n\n"
    data = document.text.encode()
    assert document.id == hashlib.blake2b(data, digest_size=16).hexdigest() and document.size == len(
        document.text.encode()
    )


def test_rows_are_read_from_jsonl_gzip_and_parquet_alike(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["first\r\ntext", "zweiter T\u00e9xt", "third"]
    lines = "\n\n".join(json.dumps({"n": 1, "body": text}) for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": texts}), tmp_path / "c.parquet")
    documents = read(tmp_path, text_field="body")
    assert [d.text for d in documents] == [text.replace("\r", "") for text in texts] * 3
    assert all(d.group == d.id and not d.reason for d in documents)
    assert documents[-1].path == "c.parquet:3"


def test_html_becomes_its_visible_text(tmp_path):
    pytest.importorskip("resiliparse")
    paragraph = "A paragraph that is long enough to be taken for the content of the page. " * 3
    html = f"<html><head><script>var x;</script></head><body><h1>Title</h1><p>{paragraph}<b>&amp;</b></p></body></html>"
    (tmp_path / "a.html").write_text(html)
    (document,) = read(tmp_path)
    assert document.text.startswith("Title") and paragraph + "&" in document.text and "var" not in document.text


@pytest.mark.parametrize("suffix", ["html", "pdf", "warc.gz", "jsonl.zst"])
def test_a_format_whose_extra_is_not_installed_says_what_to_install(tmp_path, monkeypatch, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llmjax\[data\]'"):
        read(tmp_path)


ROWS = [
    (b'{"text": "good enough"}', ""),
    (b'{"text": ', "broken JSON: line 2: "),
    (b'{"text": "\xff"}', "invalid UTF-8: at byte 10 of line 3"),
    (b'["text"]', "broken JSON: line 4 is no object but list"),
    (b'{"title": "x"}', "no text field: line 5 lacks 'text'"),
    (b'{"text": 7}', "text is no string: line 6 holds int"),
    (b'{"text": "half \\ud800 pair"}', "invalid Unicode: lone surrogate at character 5"),
    (b'{"text": "nul \\u0000"}', "binary: NUL at byte 4"),
    (b"[" * 100_000, "broken JSON: line 9: "),
]


def test_bad_rows_are_rejected_with_line_and_reason_and_the_others_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(row for row, _ in ROWS))
    documents = read(tmp_path)
    assert len(documents) == len(ROWS)
    for number, (document, (_, reason)) in enumerate(zip(documents, ROWS, strict=True), start=1):
        assert document.path == f"a.jsonl:{number}"
        assert document.reason.startswith(reason) if reason else document.reason == ""


def test_bad_files_are_rejected_with_the_place(tmp_path):
    lines = b"".join(json.dumps({"text": f"{n} " * 50}).encode() + b"\n" for n in range(2000))
    (tmp_path / "a.txt").write_bytes(b"text\0binary")
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    (tmp_path / "d.jsonl.gz").write_bytes(b"no gzip at all")
    *first, last = read(tmp_path)
    assert [d.reason for d in first[:2]] == ["binary: NUL at byte 4", "invalid UTF-8: at byte 3"]
    assert first[-1].reason == "broken gzip: the file is truncated" and first[-1].path.startswith("c.jsonl.gz:")
    assert len(first) > 3 and not any(d.reason for d in first[2:-1])  # the rows before the damage are used
    assert last.reason.startswith("broken gzip: Not a gzipped file")


def test_a_damaged_parquet_file_is_rejected(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    (document,) = read(tmp_path)
    assert document.reason.startswith("broken parquet: ")


def test_a_missing_path_names_the_nearest_that_exists(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(ValueError, match=r"there is no .*shakespear.txt; did you mean .*/shakespeare.txt\?"):
        read(tmp_path / "shakespear.txt")


def test_a_folder_without_readable_files_says_what_it_found(tmp_path):
    (tmp_path / "a.log").write_text("x")
    with pytest.raises(ValueError, match=r"found 1 \.log; if those are text, give them by a glob, such as .*\*\.log"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no file matches"):
        read(tmp_path / "*.md")


@pytest.mark.parametrize("specs", [("stdlib", "stdlib"), ("{}/a.txt", "a={}/b.txt"), ("{}/a.txt", "A={}/b.txt")])
def test_a_name_used_twice_is_an_error_that_offers_another(tmp_path, specs):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x")
    with pytest.raises(ValueError, match="both called .*give one another name: '.*2="):
        read(*(spec.format(tmp_path) for spec in specs))


def test_the_fingerprint_changes_when_a_file_is_added_or_written_and_only_then(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    specs = [str(tmp_path), "stdlib"]
    before = sources_fingerprint(specs)
    assert sources_fingerprint(specs) == before
    (tmp_path / "b.png").write_text("not read")
    assert sources_fingerprint(specs) == before
    (tmp_path / "b.txt").write_text("two")
    added = sources_fingerprint(specs)
    (tmp_path / "b.txt").write_text("three")
    assert len({before, added, sources_fingerprint(specs)}) == 3


@pytest.mark.parametrize(
    "path",
    [
        "json/decoder.py",
        "json/tests/x.py",
        "_json.py",
        "test/test_json.py",
        "test/test_json/test_x.py",
        "test/json_tests.py",
    ],
)
def test_a_module_and_its_tests_share_a_group(path):
    assert stdlib_corpus.group_of(path) == "json"


def test_the_embedded_corpus_holds_sources_topics_and_docstrings_and_no_trace_of_this_machine():
    before = set(sys.modules)
    entries = {entry.path: entry for entry in stdlib_corpus.entries()}
    assert "antigravity" not in set(sys.modules) - before
    assert entries["json/decoder.py"].file is not None and entries["json/decoder.py"].group == "json"
    assert "lambda" in entries["pydoc_data/topics.py#lambda"].text
    assert "pydoc_data/topics.py" not in entries
    assert "def acos(x, /):\n" in entries["docstrings/math.py"].text
    assert not any("site-packages" in path or path.startswith("_sysconfigdata") for path in entries)
    for entry in entries.values():
        assert not Path(entry.path).is_absolute()
        if entry.path.startswith("docstrings/"):
            ast.parse(entry.text)
            assert " at 0x" not in entry.text and sys.base_prefix not in entry.text
