"""The preparation as a whole: the same bytes for any number of workers and after a kill, every step, every bad input."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_prepare import rows, tree

from llmjax import cli, config, recipe
from llmjax.data.documents import languages_of
from llmjax.errors import UserError
from llmjax.prepare import documents, engine, parts, run, sources, spark

pytest.importorskip("numba")
SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life",
    "child", "world", "school", "state", "family", "student", "group", "country", "problem",
]  # fmt: skip


def configured(sources, steps=("exact",), **settings) -> config.ConfigDict:
    c = config.base()
    config.set_key(c, "data.sources", [str(source) for source in sources])
    config.set_key(c, "prepare.steps", tuple(steps))
    for key, value in settings.items():
        config.set_key(c, key.replace("__", "."), value)
    return c.lock()


def prepared(workdir: Path, sources, steps=("exact",), **settings) -> dict:
    return run.run(configured(sources, steps, **settings), workdir)


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=9)) + f" {draw.randrange(10**6)}." for _ in range(count))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """300 documents in rows, some of them copies, nearly copies, or with a passage in common."""
    passage = sentences(-1, 12)
    texts = [sentences(n, 20) for n in range(300)]
    for n in range(0, 60, 3):
        texts[n + 1] = texts[n]
        texts[n + 2] = texts[n].replace(" people ", " persons ", 2)
    for n in range(100, 130, 10):
        texts[n] = f"{texts[n]}\n{passage}"
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in texts[part * 100 : part * 100 + 100]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


EVERY = ("repair", "exact", "near", "substring", "lines", "personal")


def test_any_number_of_workers_and_a_killed_run_give_the_same_bytes(tmp_path, corpus, monkeypatch):
    monkeypatch.setitem(parts.cut.__kwdefaults__, "part_bytes", 100_000)
    prepared(tmp_path / "one", [corpus], EVERY, prepare__workers=1)
    assert len(parts.cut(run.resolve_sources([str(corpus)]))) >= 6
    monkeypatch.setattr(engine, "SMALL_BYTES", 0)
    prepared(tmp_path / "three", [corpus], EVERY, prepare__workers=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    # A run in a process of its own that is killed while it writes its parts, and then run again here.
    code = (
        "import time; from pathlib import Path; from llmjax import config; from llmjax.prepare import parts, run; from llmjax.prepare.dedup import near\n"
        "parts.cut.__kwdefaults__['part_bytes'] = 100_000\n"
        "near.near = lambda state: time.sleep(60)\n"
        f"c = config.base(); c.data.sources = ({str(corpus)!r},); c.prepare.steps = {EVERY!r}; c.prepare.workers = 1\n"
        f"run.run(c.lock(), Path({str(tmp_path / 'killed')!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    work = tmp_path / "killed/prepare/work"
    until = time.monotonic() + 120
    while not list(work.glob("*-exact-removed")) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    was = {p.name: p.stat().st_mtime_ns for p in (work / "documents-0").glob("*.arrow")}
    assert len(was) >= 6
    prepared(tmp_path / "killed", [corpus], EVERY, prepare__workers=1, prepare__keep_work=True)
    kept = tmp_path / "killed/prepare/work/documents-0"
    assert was == {p.name: p.stat().st_mtime_ns for p in kept.glob("*.arrow")}
    found = tree(tmp_path / "killed")
    assert {name: data for name, data in found.items() if not name.startswith("prepare/work")} == tree(tmp_path / "one")


def test_what_a_killed_try_was_writing_goes_before_the_next_one_begins(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(sentences(0, 20))
    left = tmp_path / "run/prepare/work/documents-0/.000000.arrow.123-456.tmp"

    def stopped(**_):
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    given = {"data__holdout_percent": 0.0, "prepare__keep_work": True}
    with monkeypatch.context() as patched:
        patched.setattr(run.clean, "clean_part", stopped)
        with pytest.raises(OSError, match="No space left"):
            prepared(tmp_path / "run", [tmp_path / "a.txt"], **given)
    begun = run.clean.clean_part

    def checked(**arguments):
        assert not left.exists()
        return begun(**arguments)

    monkeypatch.setattr(run.clean, "clean_part", checked)
    prepared(tmp_path / "run", [tmp_path / "a.txt"], **given)


def test_what_cannot_be_split_is_not_cleaned_again_with_another_split(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(sentences(0, 20))
    with pytest.raises(ValueError, match="was held out"):
        prepared(tmp_path / "run", [tmp_path / "a.txt"])
    monkeypatch.setattr(run.clean, "read_part", None)
    prepared(tmp_path / "run", [tmp_path / "a.txt"], data__holdout_tail_percent=20.0)
    assert rows(tmp_path / "run", "heldout")
    assert not (tmp_path / "run/prepare/work").exists()


def refused(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    """Settings that a preparation stops at, and what it says."""
    (tmp_path / "empty.jsonl").write_text("")
    return {
        "no model": ({"steps": ("exact", "quality")}, "needs a classifier"),
        "model away": ({"steps": ("quality",), "prepare__quality_model": "gone.npz"}, "no file gone.npz"),
        "model broken": ({"steps": ("quality",), "prepare__quality_model": str(tmp_path / "b.txt")}, "not a saved model"),
        "no items": ({"steps": ("decontaminate",), "prepare__decontaminate": (str(tmp_path / "empty.jsonl"),)}, "empty"),
        "language": ({"steps": ("language",), "prepare__languages": ("english",)}, "english"),
        "caps": ({"steps": ("exact", "caps"), "prepare__caps": ("langage:de=2GB",)}, "not understood"),
        "source": ({"steps": ("exact", "caps"), "prepare__caps": ("source:web=2GB",)}, "no source 'web'"),
        "step": ({"steps": ("exakt",)}, "did you mean exact"),
        "encodings": ({"prepare__encodings": ("utf-9",)}, "utf-9"),
        "earlier": ({"prepare__earlier": (str(tmp_path / "none"),)}, "no manifest.json"),
        "result": ({"data__min_bytes": 10**9}, "run/prepare.new/rejected has them"),
    }  # fmt: skip


def test_a_finished_preparation_survives_everything_that_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.txt").write_text(sentences(0, 20))
    (tmp_path / "b.txt").write_text(sentences(1, 20))
    monkeypatch.setattr(spark, "find_spec", lambda name: None)  # no pyspark
    given = {"prepare__workers": 1, "data__holdout_percent": 0.0}
    prepared(tmp_path / "run", [tmp_path / "a"], **given)
    finished = tree(tmp_path / "run")
    assert sorted(finished)[:2] == ["prepare/card.html", "prepare/manifest.json"]
    cases = {"engine": ({"prepare__engine": "spark"}, "needs pyspark")} | refused(tmp_path)
    for case, (settings, says) in cases.items():
        with pytest.raises(UserError, match=says):
            prepared(tmp_path / "run", [tmp_path / "a"], **{**given, **settings})
        left = {name: data for name, data in tree(tmp_path / "run").items() if not name.startswith("prepare.new/")}
        assert left == finished, case
        if case != "result":  # known only at the end
            assert not (tmp_path / "run/prepare.new").exists(), case
            c = configured([tmp_path / "a"], **settings)
            with pytest.raises(UserError, match=says):
                run.check(c, None, fresh=False)
    prepared(tmp_path / "run", [tmp_path / "a", tmp_path / "b.txt"], **given)
    assert len(rows(tmp_path / "run", "train")) == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"prepare"}


def test_a_refused_preparation_is_not_noted_as_begun(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(sentences(0, 20))
    good = configured([tmp_path / "a.txt"], data__holdout_percent=0.0)
    recipe.run(good, tmp_path / "run", ["prepare"])
    with pytest.raises(UserError, match="needs a classifier"):
        recipe.run(configured([tmp_path / "a.txt"], ("quality",)), tmp_path / "run", ["prepare"], again=True)
    recipe.run(good, tmp_path / "run", ["prepare"])
    assert "prepare: done already" in capsys.readouterr().out


def test_a_kept_work_folder_and_one_of_an_earlier_version_are_gone_on_with(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(sentences(0, 20))
    given = {"prepare__workers": 1, "prepare__keep_work": True, "data__holdout_tail_percent": 20.0}
    prepared(tmp_path / "run", [tmp_path / "a.txt"], **given)
    monkeypatch.setattr(run.clean, "read_part", None)  # nothing is read any more
    prepared(tmp_path / "run", [tmp_path / "a.txt"], **{**given, "data__holdout_tail_percent": 40.0})
    longer = len(rows(tmp_path / "run", "heldout")[0]["text"])
    (tmp_path / "run/prepare/manifest.json").unlink()  # as if it had been stopped, in the folder itself
    prepared(tmp_path / "run", [tmp_path / "a.txt"], **{**given, "prepare__keep_work": False})
    assert len(rows(tmp_path / "run", "heldout")[0]["text"]) < longer
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"prepare"}
    assert not (tmp_path / "run/prepare/work").exists()


def test_names_and_texts_that_are_no_unicode_are_read_all_the_same(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text(sentences(0, 5))
    row = {"text": sentences(1, 5), "url": "x\ud800", "meta": {"license": "\udfff"}}
    (folder / "rows.jsonl").write_text(
        json.dumps(row) + "\n\ufeff" + json.dumps({"text": sentences(2, 5)}) + "\n", encoding="utf-8"
    )
    numbers = prepared(tmp_path / "run", [folder], data__holdout_percent=0.0)
    train = {row["path"]: row for row in rows(tmp_path / "run", "train")}
    assert sorted(train) == ["caf\ufffd.txt", "rows.jsonl:1", "rows.jsonl:2"]
    assert train["rows.jsonl:1"]["url"] == "x\ufffd"
    assert numbers["unreadable"] == 0


def test_whatever_an_extractor_gives_is_made_well_formed():
    assert documents.well_formed("a\ud83d") == "a\ufffd"
    assert documents.well_formed("\ud83d\ude00") == "\U0001f600"
    batch = documents.make_batch([{"text": "a\ud83d", "path": "p\udcff", "source": "s"}])
    assert (batch["text"][0].as_py(), batch["path"][0].as_py()) == ("a\ufffd", "p\ufffd")
    assert documents.replace(batch, text=["\ud83d\ude00b"])["text"][0].as_py() == "\U0001f600b"


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources, "open_file", lambda file: Failing())
    with pytest.raises(OSError, match=r"Input/output error: '.*a.txt'"):
        prepared(tmp_path / "run", [tmp_path / "a.txt"])


def test_preparing_text_imports_no_jax(tmp_path):
    """Its import takes longer than the preparation of a few megabytes."""
    (tmp_path / "a.txt").write_text(sentences(0, 20))
    command = ["prepare", "--config", "configs/quickstart.py", f'--config.data.sources=["{tmp_path}/a.txt"]',
               "--config.data.holdout_percent=0", "--workdir", str(tmp_path / "run")]  # fmt: skip
    code = f"import sys; from llmjax import cli; assert cli.main({command!r}) == 0; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_what_is_removed_names_what_it_duplicates(tmp_path, corpus):
    prepared(tmp_path / "run", [corpus], ("exact", "near"), data__holdout_percent=0.0)
    reasons = {row["path"]: row["reason"] for row in rows(tmp_path / "run", "rejected")}
    assert len(reasons) == 40
    assert reasons["0.jsonl:2"] == "duplicate: of corpus: 0.jsonl:1"
    kind, _, rest = reasons["0.jsonl:3"].partition(": ")
    assert kind == "near duplicate" and rest.endswith("of corpus: 0.jsonl:1") and float(rest.split()[0]) >= 0.7
    manifest = json.loads((tmp_path / "run/prepare/manifest.json").read_text())
    assert manifest["overall"]["near"]["removed"] == 20 and manifest["overall"]["exact"]["removed"] == 20
    assert manifest["total"]["documents"] == 300 and manifest["total"]["train_documents"] == 260


def test_near_duplicates_that_stay_longest(tmp_path):
    long, short = sentences(1, 40), sentences(1, 36)
    (tmp_path / "a.txt").write_text(short)
    (tmp_path / "b.txt").write_text(long)
    for keep, stays in (("first", "a.txt"), ("longest", "b.txt")):
        settings = {"prepare__near_keep": keep, "data__holdout_percent": 0.0}
        prepared(tmp_path / keep, [f"x={tmp_path}/*.txt"], ("near",), **settings)
        assert [row["path"] for row in rows(tmp_path / keep, "train")] == [stays]


def test_a_repeated_passage_stays_where_it_was_read_first(tmp_path, corpus):
    prepared(tmp_path / "run", [corpus], ("substring",), data__holdout_percent=0.0)
    passage = sentences(-1, 12)
    assert [row["path"] for row in rows(tmp_path / "run", "train") if passage in row["text"]] == ["1.jsonl:1"]
    assert sum(row["text"].startswith(sentences(110, 20)[:-1]) for row in rows(tmp_path / "run", "train")) == 1


def test_repeated_lines_stay_once_and_the_rest_of_their_documents_stays(tmp_path):
    footer = "This footer stands under every page of the site."
    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"{sentences(n, 3)}\n{footer}\n")
    prepared(tmp_path / "run", [f"x={tmp_path}/*.txt"], ("lines",), data__holdout_percent=0.0)
    texts = {row["path"]: row["text"] for row in rows(tmp_path / "run", "train")}
    assert len(texts) == 5 and [path for path in texts if footer in texts[path]] == ["0.txt"]
    assert all(sentences(int(path[0]), 3) in text for path, text in texts.items())


def test_steps_after_a_step_over_all_documents_see_what_it_left(tmp_path):
    (tmp_path / "a.txt").write_text(f"write to someone@example.org, {sentences(1, 3)}")
    (tmp_path / "b.txt").write_text(f"write to someone@example.org, {sentences(1, 3)}")
    prepared(tmp_path / "run", [f"x={tmp_path}/*.txt"], ("exact", "personal", "near"), data__holdout_percent=0.0)
    (row,) = rows(tmp_path / "run", "train")
    assert "someone@" not in row["text"] and row["facts"]["personal.email"] == 1
    assert rows(tmp_path / "run", "rejected")[0]["reason"] == "duplicate: of x: a.txt"


def test_documents_that_are_much_alike_are_on_one_side_of_the_split(tmp_path):
    for n in range(60):
        shared = sentences(n, 40)
        (tmp_path / f"{n}-a.txt").write_text(f"{shared} {sentences(1000 + n, 2)}")
        (tmp_path / f"{n}-b.txt").write_text(f"{shared} {sentences(2000 + n, 2)}")
    settings = {"data__holdout_percent": 40.0, "prepare__near_jaccard": 0.98}  # so that both of a pair stay
    prepared(tmp_path / "run", [f"x={tmp_path}/*.txt"], ("near",), **settings)
    sides = {row["path"]: split for split in ("train", "heldout") for row in rows(tmp_path / "run", split)}
    pairs = [(sides.get(f"{n}-a.txt"), sides.get(f"{n}-b.txt")) for n in range(60)]
    both = [pair for pair in pairs if all(pair)]
    assert len(both) > 30 and "heldout" in sides.values()
    assert sum(a == b for a, b in both) == len(both)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_benchmark_questions_in_the_text_are_found_and_named(tmp_path):
    benchmark = SHARED / "eval/arc_challenge_test.jsonl"
    items = [json.loads(line) for line in benchmark.read_text().splitlines()]
    item = max(items[:50], key=lambda item: len(item["question"]))
    (tmp_path / "leak.txt").write_text(f"{sentences(1, 5)} {item['question']} {sentences(2, 5)}")
    (tmp_path / "clean.txt").write_text(sentences(3, 20))
    settings = {"prepare__decontaminate": (str(benchmark),), "data__holdout_percent": 0.0}
    prepared(tmp_path / "run", [f"x={tmp_path}/*.txt"], ("decontaminate",), **settings)
    assert [row["path"] for row in rows(tmp_path / "run", "train")] == ["clean.txt"]
    (leak,) = rows(tmp_path / "run", "rejected")
    assert leak["reason"].startswith(f"leak: question of arc_challenge_test {item['id']}")
    assert item["question"][:40] in leak["reason"]


def bad_inputs(folder: Path) -> None:
    folder.mkdir()
    lines = b"".join(json.dumps({"text": f"{n} " * 50}).encode() + b"\n" for n in range(3000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-300])
    (folder / "line.jsonl").write_bytes(b'{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "the row after the giant"}\n')
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 60_000_000))
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 60_000_000))
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "latin.txt").write_bytes("d\u00e9j\u00e0 vu, encore une fois".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    (folder / "cut.parquet").write_bytes(b"PAR1 cut")
    (folder / "mail.mbox").write_bytes(b"this is not a mailbox, whatever its name says\n")
    (folder / "none.warc").write_bytes(b"no record at all")
    (folder / "good.txt").write_text(sentences(0, 5))


def test_bad_input_is_counted_with_its_reason_and_the_run_goes_on(tmp_path):
    for name in ("fastwarc", "pypdfium2", "resiliparse"):
        pytest.importorskip(name)
    bad_inputs(tmp_path / "in")
    settings = {"prepare__max_document_bytes": 1_000_000, "data__holdout_percent": 0.0}
    numbers = prepared(tmp_path / "run", [tmp_path / "in"], ("repair", "exact"), **settings)
    kept = {row["path"].partition(":")[0] for row in rows(tmp_path / "run", "train")}
    assert kept == {"good.txt", "line.jsonl", "cut.jsonl.gz"}
    reasons = {row["path"].partition(":")[0]: row["reason"] for row in rows(tmp_path / "run", "rejected")}
    starts = {
        "cut.jsonl.gz": "broken gzip: the file is truncated",
        "line.jsonl": "too large: more than prepare.max_document_bytes=1,000,000",
        "bomb.jsonl.gz": "too large",
        "bomb.txt.gz": "too large",
        "binary.txt": "binary",
        "latin.txt": "invalid UTF-8: at byte 1",
        "empty.txt": "empty",
        "broken.pdf": "pdf",
        "cut.parquet": "broken parquet",
        "mail.mbox": "broken mailbox",
        "none.warc": "broken warc",
    }
    assert {name: reasons[name][: len(start)] for name, start in starts.items()} == starts
    assert numbers["rejected"] == len(rows(tmp_path / "run", "rejected"))
    assert numbers["unreadable"] == numbers["rejected"] - 1  # the empty file was read


def test_large_files_of_rows_are_cut_at_lines_and_numbered_as_a_whole(tmp_path):
    lines = [json.dumps({"text": f"row number {n} " + "x" * (n % 50)}) for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (source,) = run.resolve_sources([str(tmp_path / "a.jsonl")])
    whole = parts.cut([source])
    cut = parts.cut([source], part_bytes=7000)
    assert len(whole) == 1 and len(cut) > 10

    def read(found):
        from llmjax.prepare.formats.rows import Fields
        from llmjax.prepare.reading import read_part

        batches = [b for p in found for b in read_part(p, text_field="text", max_bytes=10**6, fields=Fields())]
        return [(row["path"], row["text"]) for batch in batches for row in batch.to_pylist()]

    assert read(cut) == read(whole) and len(read(cut)) == 2000


def test_large_parquet_files_are_cut_at_row_groups(tmp_path):
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"row {n} " * 20 for n in range(1000)], "url": [f"http://x/{n}" for n in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (source,) = run.resolve_sources([str(tmp_path / "a.parquet")])
    assert len(parts.cut([source], part_bytes=3000)) > 3
    prepared(tmp_path / "run", [tmp_path / "a.parquet"], data__holdout_percent=0.0)
    assert {row["path"]: row["url"] for row in rows(tmp_path / "run", "train")} == {
        f"a.parquet:{n + 1}": f"http://x/{n}" for n in range(1000)
    }


def test_sources_are_read_from_any_file_system(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / f"in/{n}.txt").write_text(sentences(n, 3))
    (tmp_path / "in/rows.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": sentences(9, 3)}).encode()))
    plain = prepared(tmp_path / "a", [f"x={tmp_path}/in"], data__holdout_percent=0.0)
    url = prepared(tmp_path / "b", [f"x=file://{tmp_path}/in"], data__holdout_percent=0.0)
    assert plain["train_documents"] == url["train_documents"] == 4
    assert [r["id"] for r in rows(tmp_path / "a", "train")] == [r["id"] for r in rows(tmp_path / "b", "train")]
    assert {r["path"] for r in rows(tmp_path / "b", "train")} == {"0.txt", "1.txt", "2.txt", "rows.jsonl.gz:1"}
    with pytest.raises(ValueError, match="there is no file://"):
        prepared(tmp_path / "c", [f"file://{tmp_path}/nowhere"])


def test_warc_mail_and_zstandard_are_read(tmp_path):
    for name in ("fastwarc", "zstandard"):
        pytest.importorskip(name)
    import zstandard

    text = sentences(3, 6)
    page = f"<html><body><main><h1>Title</h1><p>{text}</p></main></body></html>".encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://site.example/a\r\nContent-Type: application/http; msgtype=response\r\nWARC-Record-ID: <urn:uuid:1>\r\nContent-Length: "
    record = head + str(len(answer)).encode() + b"\r\n\r\n" + answer + b"\r\n\r\n"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.warc.gz").write_bytes(gzip.compress(record))
    (folder / "b.warc").write_bytes(record + record[:-200])
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": sentences(4, 4)}).encode()))
    message = "From a@b.c Sat Jan  3 01:05:34 1996\nFrom: a@b.c\nSubject: Hello\nMessage-ID: <1@b.c>\n\n{}\n\n"
    (folder / "d.mbox").write_text(message.format(sentences(5, 4)) + message.format(sentences(6, 4)))
    prepared(tmp_path / "run", [folder], (), data__holdout_percent=0.0)
    kept = {row["path"]: row for row in rows(tmp_path / "run", "train")}
    assert set(kept) == {"a.warc.gz@0", "b.warc@0", "c.jsonl.zst:1", "d.mbox:1", "d.mbox:2"}
    assert text in kept["a.warc.gz@0"]["text"] and kept["a.warc.gz@0"]["url"] == "http://site.example/a"
    assert kept["d.mbox:1"]["text"].startswith("Hello")
    (cut,) = rows(tmp_path / "run", "rejected")
    assert cut["reason"].startswith("broken warc")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prepare__steps": ("exakt",)}, "did you mean exact"),
        ({"prepare__steps": ("exact", "exact")}, "twice"),
        ({"prepare__steps": ("decontaminate",)}, "needs the benchmarks' files"),
        ({"prepare__engine": "beam"}, "local or spark"),
        ({"prepare__quality_model": "nowhere.npz"}, "there is no file nowhere.npz"),
    ],
)
def test_settings_that_cannot_be_used_say_so_at_once(tmp_path, settings, message):
    (tmp_path / "a.txt").write_text(sentences(0, 3))
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "run", [tmp_path / "a.txt"], settings.pop("prepare__steps", ("exact",)), **settings)


def test_rows_are_taken_from_a_part_in_any_order(tmp_path):
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("n", pa.int64())])) as writer:
        for start in range(0, 100, 7):
            writer.write_batch(pa.record_batch([pa.array(range(start, min(start + 7, 100)))], names=["n"]))
    wanted = np.random.default_rng(1).permutation(100)[:40]
    assert documents.take_rows(tmp_path / "a.arrow", wanted, columns=("n",))["n"].to_pylist() == wanted.tolist()


def test_what_an_earlier_run_kept_is_not_repeated_and_not_written_again(tmp_path, corpus):
    first = sentences(7, 20)
    (tmp_path / "old.txt").write_text(first)
    prepared(tmp_path / "old", [tmp_path / "old.txt"], data__holdout_percent=0.0)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/same.txt").write_text(first)
    (tmp_path / "new/near.txt").write_text(first.replace(" people ", " persons ", 2) + " And a little more of it.")
    (tmp_path / "new/other.txt").write_text(sentences(8, 20))
    settings = {"prepare__earlier": (str(tmp_path / "old"),), "data__holdout_percent": 0.0}
    for keep in ("first", "longest"):
        prepared(tmp_path / keep, [tmp_path / "new"], ("exact", "near"), prepare__near_keep=keep, **settings)
        assert [row["path"] for row in rows(tmp_path / keep, "train")] == ["other.txt"]
        reasons = {row["path"]: row["reason"] for row in rows(tmp_path / keep, "rejected")}
        origin = "of earlier:old: train/old-00000.jsonl:1"
        assert reasons["same.txt"] == f"duplicate: {origin}" and reasons["near.txt"].endswith(origin)
    manifest = json.loads((tmp_path / "first/prepare/manifest.json").read_text())
    assert list(manifest["sources"]) == ["new"] and manifest["total"]["documents"] == 3
    with pytest.raises(ValueError, match="is no run whose preparation was finished"):
        prepared(tmp_path / "x", [tmp_path / "new"], prepare__earlier=(str(tmp_path),))


def test_languages_are_capped_and_routed_to_shards_of_their_own(tmp_path):
    texts = {"en": "the {} house of words", "de": "das {} Haus der Worte", "fr": "la {} maison des mots"}
    lines = [{"text": text.format(n), "language": name} for name, text in texts.items() for n in range(50)]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"prepare__caps": ("language:de=400", "source:web=2kB"), "prepare__route": "language"}
    prepared(tmp_path / "run", [tmp_path / "web.jsonl"], ("caps",), data__holdout_percent=10.0, **settings)
    kept = rows(tmp_path / "run", "train") + rows(tmp_path / "run", "heldout")
    size = {name: sum(len(r["text"]) for r in kept if r["language"] == name) for name in texts}
    assert 350 < size["de"] <= 400 and 1900 < sum(size.values()) <= 2000
    names = {path.name for path in (tmp_path / "run/prepare/train").iterdir()}
    assert names == {f"web.{name}-00000.jsonl" for name in texts}
    assert {r["reason"] for r in rows(tmp_path / "run", "rejected")} == {
        "cap: language de has its 400 bytes", "cap: source web has its 2,000 bytes",
    }  # fmt: skip
    assert languages_of(tmp_path / "run/prepare", "web.de") == ("de",)
    with pytest.raises(ValueError, match="there is no source 'wep'"):
        prepared(tmp_path / "x", [tmp_path / "web.jsonl"], ("caps",), prepare__caps=("source:wep=1GB",))


def test_the_command_ends_with_4_when_some_documents_could_not_be_read(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.txt").write_text(sentences(0, 5))
    command = ["prepare", "--config", "configs/quickstart.py", f'--config.data.sources=["{tmp_path}/in"]']
    command += ["--config.data.holdout_percent=0", "--workdir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    (tmp_path / "in/bad.txt").write_bytes(b"binary\0")
    assert cli.main(command) == 4
    assert "1 documents could not be read" in capsys.readouterr().err
