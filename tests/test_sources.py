"""What users point `data.sources` at: every format is read, bad documents are kept aside, mistakes get a mend."""

import ast
import bz2
import gzip
import hashlib
import json
import lzma
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmjax import config
from llmjax.data import stdlib_corpus
from llmjax.prepare import parts
from llmjax.prepare import sources as module
from llmjax.prepare.documents import with_ids
from llmjax.prepare.formats import arrow
from llmjax.prepare.formats.rows import Fields
from llmjax.prepare.reading import read_part
from llmjax.prepare.sources import check_extras, resolve_sources, sources_fingerprint
from llmjax.prepare.steps import extract


def read(*specs: str | Path, text_field: str = "text", max_bytes: int = 10**8) -> list[SimpleNamespace]:
    """Documents as they are after the step extract."""
    sources = resolve_sources([str(spec) for spec in specs])
    check_extras(sources)
    step = extract.make(config.base().prepare)
    batches = [
        with_ids(step(batch))
        for part in parts.cut(sources)
        for batch in read_part(part, text_field=text_field, max_bytes=max_bytes, fields=Fields())
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


DOCUMENT = {"text": "the text of a row", "url": "http://x", "content": {"text": "inner text", "n": 1}}


def test_rows_of_json_are_read_in_lines_in_an_array_and_packed_in_every_way(tmp_path):
    rows = [{**DOCUMENT, "text": f"text number {n} " * 9000} for n in range(12)]  # more than a block is read at once
    lines = "\n".join(map(json.dumps, rows)).encode()
    files = {
        "lines.json": lines,
        "c4.json.gz": gzip.compress(lines),
        "array.json": json.dumps(rows, indent=1).encode(),
        "packed.json.xz": lzma.compress(json.dumps(rows).encode()),
        "lines.jsonl.bz2": bz2.compress(lines),
        "after another.json": b"\xef\xbb\xbf" + b"\n".join(json.dumps(row, indent=1).encode() for row in rows),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        documents = read(f"a={tmp_path}/{name}")
        assert [d.text for d in documents] == [row["text"] for row in rows], name
        assert [d.path for d in documents] == [f"{name}:{n}" for n in range(1, 13)] and documents[0].url == "http://x"
    (source,) = resolve_sources([str(tmp_path)])
    assert sorted(Path(file).name for file in source.files) == ["c4.json.gz", "lines.jsonl.bz2", "packed.json.xz"]
    assert source.skipped == {".json": 3}
    for name in files:
        if name.count(".") == 1:
            continue
        (tmp_path / name).write_bytes(files[name][:-20])
        *_, last = read(f"a={tmp_path}/{name}")
        assert last.reason.startswith("broken ") and "truncated" in last.reason, name


@pytest.mark.parametrize(
    ("content", "kept", "reasons"),
    [
        (b'[{"text": "one"}, {"text": "two"}, {"tex', 2, ["broken JSON: row 3"]),
        (b'[{"text": "one"}, 7, {"text": "t\xffo"}, {"text": "three"}]', 2, ["broken JSON: row 2 is no", "invalid Unicode"]),
        (b'[{"text": "one"}\n', 1, ["broken JSON: the array does not end"]),
        (b'{\n"title": "settings"}', 0, ["no text field: row 1"]),
        (b"[" * 100_000, 0, ["broken JSON: row 1"]),
        (b'[{"text": "a\\xb"}, {"text": [1, {"x": "]}\\""}}, foo, {"text": "b"}]', 1, ["broken JSON: row"] * 3),
        (b'{"text": "a"}\n{"text" "b"}\n{"text": "c"}\n}\n{"text": "d"}', 3, ["broken JSON: line"] * 2),
        (b'[{"text": "' + b"x" * 2_500_000 + b'"}, {"text": "after"}]', 1, ["too large"]),
        (b'[{"x": "' + b"[\\\"" * 800_000 + b'"}, {"text": "after"}]', 1, ["too large"]),  # over several blocks
    ],
)  # fmt: skip
def test_what_is_broken_in_json_costs_itself_or_the_rest_of_the_file(tmp_path, content, kept, reasons):
    (tmp_path / "a.json").write_bytes(content)
    documents = read(tmp_path / "a.json", max_bytes=2_000_000)
    assert sum(not d.reason for d in documents) == kept
    assert [d.reason[: len(r)] for d, r in zip([d for d in documents if d.reason], reasons, strict=True)] == reasons


def test_csv_is_read_by_the_names_of_its_first_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfn,text,lang\r\n1,"two\r\nlines, ""quoted""",en\r\n2,caf\xe9,fr\r\n3\r\n4,x,y,z\r\n5,last,de\r\n'
    )
    (tmp_path / "b.tsv").write_text("text\tn\nwith, comma\t1\n")
    documents = read(tmp_path / "a.csv", tmp_path / "b.tsv")
    assert [(d.path, d.text, d.language) for d in documents if not d.reason] == [
        ("a.csv:1", 'two\nlines, "quoted"', "en"), ("a.csv:5", "last", "de"), ("b.tsv:1", "with, comma", ""),
    ]  # fmt: skip
    assert [d.reason.partition(":")[0] for d in documents if d.reason] == [
        "invalid Unicode", "text is no string", "broken csv",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text('n,text\n1,good\n2,"never ' + "closed\n" * 200)
    documents = read(tmp_path / "a.csv", max_bytes=500)
    assert [d.reason[:10] for d in documents] == ["", "broken csv"]


def test_a_bad_byte_in_a_row_is_counted_and_costs_a_character(tmp_path):
    text = "Det var en g\u00e5ng en \u00e4lg som \u00e5t \u00e4pplen i tr\u00e4dg\u00e5rden. " * 9
    bad = json.dumps({"text": text}, ensure_ascii=False).encode().replace("\u00e4pplen".encode(), b"\xe4pplen", 1)
    cells = {"cells": [{"cell_type": "markdown", "source": text}], "metadata": None}
    files = {
        "a.jsonl": b'{"text": "before"}\n' + bad + b'\n{"text": "after"}',
        "b.json": b'[{"text": "before"}, ' + bad + b', {"text": "after"}]',
        "c.csv": b"text\nbefore\n" + text.encode().replace("\u00e4pplen".encode(), b"\xe4pplen", 1) + b"\nafter\n",
        "d.ipynb": json.dumps(cells, ensure_ascii=False).encode().replace("\u00e4pplen".encode(), b"\xe4pplen", 1),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        documents = read(tmp_path / name)
        assert [d.reason for d in documents] == [""] * len(documents), name
        (found,) = (d for d in documents if "lg som" in d.text)
        assert found.text.strip() == text.replace("\u00e4pplen", "\ufffdpplen", 1).strip()
        assert found.facts == '{"extract.bad_bytes": 1}', name
        assert name == "d.ipynb" or [d.text for d in (documents[0], documents[-1])] == ["before", "after"]


def test_a_line_of_csv_that_does_not_end_is_refused_before_it_is_held(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"n,text\n1,one\n" + b"a," * 2_000_000))
    documents = read(tmp_path / "a.csv.gz", max_bytes=1000)
    assert [d.reason.partition(";")[0] for d in documents] == ["", "broken csv: row 2: a line of more than 1,000 bytes"]


def test_a_notebook_is_its_prose_and_its_code(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "prose"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"data": {"image/png": "aGVsbG8="}}]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    (tmp_path / "b.ipynb").write_text("{}")
    good, bad = read(tmp_path)
    assert good.text == "# Title\nprose\n\n```python\nx = 1\n```\n" and not good.reason
    assert bad.reason.startswith("broken notebook")


def test_a_folder_that_datasets_saved_is_read_and_so_are_fields_within_fields(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"url": ["http://x"] * 3, "content": [{"text": f"text {n}", "n": n} for n in range(3)]})
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    for name in ("saved", "file.arrow", "rows.parquet", "rows.jsonl"):
        documents = read(tmp_path / name, text_field="content.text")
        assert [(d.text, d.url) for d in documents] == [(f"text {n}", "http://x") for n in range(3)], name
        fields = Fields()
        (part,) = parts.cut(resolve_sources([str(tmp_path / name)]))
        (batch,) = read_part(part, text_field="body", max_bytes=10**8, fields=fields)
        assert sorted(fields.names) == ["content.n", "content.text", "url"] and fields.with_field == 0, name
        assert set(batch["reason"].to_pylist()[0].split()) >= {"lacks", "'body'"}
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert read(tmp_path / "saved")[0].reason.startswith("broken arrow")


def test_a_row_of_a_table_that_python_cannot_hold_costs_no_other(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["one", "caf\u00e9 " * 40, "three"]
    data = [text.encode() for text in texts]
    data[1] = data[1].replace("\u00e9".encode(), b"\xe9", 1)
    offsets = [0, *(sum(map(len, data[: n + 1])) for n in range(3))]
    buffers = [None, pyarrow.array(offsets, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"".join(data))]
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)  # as other programs write them: not checked
    told = pyarrow.array([{"license": f"l{n}", "at": 10**18 + n} for n in range(3)],
                         pyarrow.struct([("license", pyarrow.string()), ("at", pyarrow.timestamp("ns"))]))  # fmt: skip
    late = pyarrow.array([1 << 60] * 3, pyarrow.timestamp("us"))  # a year that Python has not
    table = pyarrow.table({"text": strings, "metadata": told, "url": late,
                           "nested": pyarrow.StructArray.from_arrays([strings], ["text"]), "raw": data})  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        for field in ("text", "nested.text", "raw"):
            documents = read(tmp_path / name, text_field=field)
            assert [d.text for d in documents] == [texts[0], texts[1].replace("\u00e9", "\ufffd", 1), texts[2]], field
            assert documents[1].facts == '{"extract.bad_bytes": 1}' and [d.licence for d in documents] == [
                "l0",
                "l1",
                "l2",
            ]


def test_a_damaged_row_group_costs_itself(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"text {n} " * 9 for n in range(9)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3, use_dictionary=False, compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data[start : start + 60] = b"x" * 60
    (tmp_path / "a.parquet").write_bytes(data)
    documents = read(tmp_path)
    assert [d.path for d in documents if not d.reason] == [f"a.parquet:{n}" for n in (1, 2, 3, 7, 8, 9)]
    assert [d.reason[:14] for d in documents if d.reason] == ["broken parquet"]


def test_files_without_a_known_suffix_are_looked_at_before_they_are_taken_for_text(tmp_path):
    lines = b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(3))
    files = {
        "a.jl": lines, "b.part": gzip.compress(b"plain"), "c.data": b'[{"text": "row 0"}]',
        "d.page": b"<!DOCTYPE html><body><p>a page</p>", "e.log": b"{not JSON}\nlines of a log",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "part-00000.gz").write_bytes(gzip.compress(lines))
    assert [d.text for d in read(f"a={tmp_path}/*.jl", f"b={tmp_path}/*.gz", tmp_path / "c.data")] == [
        *("row 0", "row 1", "row 2") * 2, "row 0",
    ]  # fmt: skip
    assert [d.text for d in read(tmp_path / "d.page", tmp_path / "e.log")] == ["a page", files["e.log"].decode()]
    assert read(tmp_path / "b.part")[0].reason.startswith("binary")


def test_archives_of_pages_are_read_however_they_are_packed(tmp_path):
    pytest.importorskip("fastwarc")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\na page"
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http\r\n"
    record = head + b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(http), http)
    for suffix, pack in {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.items():
        (tmp_path / f"a.warc{suffix}").write_bytes(pack(record * 2))
        assert [d.text for d in read(tmp_path / f"a.warc{suffix}")] == ["a page"] * 2


def test_packed_tables_and_caches_of_datasets_are_not_read(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="packed parquet file is not read: unpack it"):
        read(tmp_path / "a.parquet.gz")
    (tmp_path / "cache-0123.arrow").write_bytes(b"")
    (tmp_path / "a.txt").write_text("text")
    assert [d.text for d in read(tmp_path)] == ["text"]
    assert resolve_sources([str(tmp_path)])[0].skipped == {".parquet.gz": 1, "cache": 1}


def test_few_rows_of_parquet_are_decoded_at_once_where_rows_are_large(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"{n} " * 5000 for n in range(40)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(arrow, "BATCH_BYTES", 50_000)
    seen, decoded = [], parquet.ParquetFile.iter_batches

    def counted(*args, **kwargs):
        for batch in decoded(*args, **kwargs):
            seen.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    assert [d.text for d in read(tmp_path)] == texts and max(seen) <= 5


def test_archives_are_refused_and_what_is_advised_works(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text in an archive")
    for spec in (tmp_path, tmp_path / "a.zip", tmp_path / "*.zip"):
        with pytest.raises(ValueError, match="unpack"):
            read(spec)
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path)
    assert [d.text for d in read(tmp_path)] == ["text in an archive"]
    assert resolve_sources([str(tmp_path)])[0].skipped == {".zip": 1}


def test_text_that_is_too_large_for_a_document_is_cut_at_line_ends(tmp_path):
    lines = [f"line number {n}\n" for n in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 1000))  # it may go on for ever
    documents = read(tmp_path, max_bytes=200)
    for name in ("a.txt", "b.txt.gz"):
        own = [d for d in documents if d.path.startswith(name)]
        assert "".join(d.text for d in own) == "".join(lines) and len(own) > 5
        assert all(d.size <= 200 and d.text.endswith("\n") and d.group == name for d in own)
        assert [d.path for d in own] == [f"{name}@{sum(d.size for d in own[:n])}" for n in range(len(own))]
    assert documents[-1].reason.startswith("too large") and documents[-1].path == "c.txt.gz"


@pytest.mark.parametrize("text", ["many words and no line end " * 40, "\u6cb3\u6c34\u4e0a\u6da8" * 80, "x" * 1000])
def test_large_text_without_line_ends_is_cut_at_blanks_or_between_characters(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    documents = read(tmp_path, max_bytes=200)
    assert "".join(d.text for d in documents) == text and not any(d.reason for d in documents)
    assert all(d.size <= 200 and "\ufffd" not in d.text for d in documents)
    assert " " not in text or all(d.text.endswith(" ") for d in documents)


def test_a_link_to_a_folder_around_it_is_not_gone_through(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("once")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.txt").write_text("through a link")
    (tmp_path / "a" / "beside").symlink_to(tmp_path / "other")
    assert [d.path for d in read(f"n={tmp_path}/a/**/*.txt")] == ["b/x.txt", "beside/y.txt"]


def test_a_mailbox_of_any_size_is_read_message_by_message(tmp_path):
    message = "From a@b.c Sat Jan  3 01:05:34 1996\nSubject: Number {0}\nMessage-ID: <{0}@b.c>\n\nbody {1}\n\n"
    sizes = [400 if n == 7 else 5 + n % 3 for n in range(40)]
    (tmp_path / "a.mbox").write_text("".join(message.format(n, f"words {n} " * size) for n, size in enumerate(sizes)))
    whole, pieces = read(tmp_path / "a.mbox"), read(tmp_path / "a.mbox", max_bytes=2000)
    assert [d.path for d in pieces] == [d.path for d in whole] == [f"a.mbox:{n + 1}" for n in range(40)]
    for n, (one, other) in enumerate(zip(whole, pieces, strict=True)):
        if n == 7:
            assert other.reason.startswith("too large") and not one.reason
        else:
            assert (one.text, one.offset, one.group) == (other.text, other.offset, other.group)
