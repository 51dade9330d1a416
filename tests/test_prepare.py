"""The prepare stage accounts for every document, holds out what it must, and is the same for the same texts."""

import errno
import hashlib
import json
import platform
import random
from pathlib import Path

import pytest

from llmjax import config
from llmjax.data.documents import read_documents, shard_files
from llmjax.prepare import clean, shards
from llmjax.prepare import run as prepare

ROOT = Path(__file__).parents[1]
SHARED_TEXT = Path(__file__).parents[2] / "shared" / "data" / "text"


def run(workdir: Path, *sources: str | Path, **settings) -> dict:
    c = config.base()
    config.set_key(c, "data.sources", [str(source) for source in sources])
    for key, value in settings.items():
        config.set_key(c, f"data.{key}", value)
    return prepare.run(c.lock(), workdir)


def rows(workdir: Path, split: str) -> list[dict]:
    files = sorted((workdir / "prepare" / split).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(300):
        (folder / f"{n:03}.txt").write_text(f"document number {n}: \u00e9 " * (1 + n % 7))
    return folder


def test_two_runs_give_the_same_bytes_whatever_order_the_files_were_made_in(tmp_path, corpus):
    (tmp_path / "other").mkdir()
    names = [p.name for p in corpus.iterdir()]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / "other" / name).write_bytes((corpus / name).read_bytes())
    run(tmp_path / "run1", f"x={corpus}")
    run(tmp_path / "run2", f"x={tmp_path}/other")
    one, two = tree(tmp_path / "run1"), tree(tmp_path / "run2")
    named = ("prepare/manifest.json", "prepare/card.html")  # these differ in the folder's name
    kept = {name: one.pop(name) for name in named}
    assert all(two.pop(name) for name in named)
    assert one == two
    run(tmp_path / "run1", f"x={corpus}")
    assert tree(tmp_path / "run1") == {**one, **kept}


def test_neighbours_are_unrelated_and_changing_one_text_moves_no_other(tmp_path, corpus):
    run(tmp_path / "run", corpus, holdout_percent=0)
    ids = [row["id"] for row in rows(tmp_path / "run", "train")]
    assert ids == sorted(ids)
    before = [row["path"] for row in rows(tmp_path / "run", "train")]
    assert before != sorted(before)
    (corpus / "007.txt").write_text("quite another text than before")
    run(tmp_path / "run", corpus, holdout_percent=0)
    after = [row["path"] for row in rows(tmp_path / "run", "train")]
    assert [p for p in before if p != "007.txt"] == [p for p in after if p != "007.txt"]


def test_every_document_and_byte_read_is_trained_on_held_out_or_rejected_with_a_reason(tmp_path, corpus):
    (corpus / "binary.txt").write_bytes(b"a\0b" * 10)
    (corpus / "empty.txt").write_text(" \n")
    (corpus / "short.txt").write_text("short")
    (corpus / "zz-copy.txt").write_bytes((corpus / "005.txt").read_bytes())
    (corpus / "long.txt").write_bytes(b"\xff" * 20 + b"x" * 5000)  # too many bad bytes to read over them
    numbers = run(tmp_path / "run", corpus, holdout_percent=20, shard_bytes=10_000)
    assert (
        numbers["documents"] == 305 == numbers["train_documents"] + numbers["heldout_documents"] + numbers["rejected"]
    )
    assert numbers["bytes"] == sum(p.stat().st_size for p in corpus.iterdir())
    assert numbers["bytes"] == numbers["train_bytes"] + numbers["heldout_bytes"] + numbers["rejected_bytes"]
    assert 30 < numbers["heldout_documents"] == numbers["heldout_groups"] < 90
    rejected = {row["path"]: row for row in rows(tmp_path / "run", "rejected")}
    assert {path: row["reason"] for path, row in rejected.items()} == {
        "binary.txt": "binary: NUL at byte 1",
        "empty.txt": "empty",
        "long.txt": "invalid UTF-8: at byte 0",
        "short.txt": "too short: 5 bytes, data.min_bytes=16",
        "zz-copy.txt": "duplicate: of corpus: 005.txt",
    }
    assert rejected["long.txt"]["text"] == "\ufffd" * 20 + "x" * 980
    manifest = json.loads((tmp_path / "run/prepare/manifest.json").read_text())
    assert manifest["sources"]["corpus"]["rejected"]["duplicate"]["documents"] == 1
    for split in ("train", "heldout", "rejected"):
        for shard in manifest["shards"][split]["corpus"]:
            data = (tmp_path / "run/prepare" / split / shard["name"]).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), data.count(b"\n")) == (shard["sha256"], shard["documents"])
    for row in rows(tmp_path / "run", "train"):
        assert list(row) == ["id", "source", "group", "path", "text"]
        assert row["id"] == hashlib.blake2b(row["text"].encode(), digest_size=16).hexdigest()


def test_of_equal_texts_the_first_source_and_then_the_smallest_path_is_kept(tmp_path, corpus):
    (tmp_path / "first").mkdir()
    for name in ("b.txt", "a.txt"):
        (tmp_path / "first" / name).write_bytes((corpus / "010.txt").read_bytes())
    numbers = run(tmp_path / "run", tmp_path / "first", corpus, holdout_percent=0)
    text = (corpus / "010.txt").read_text()
    kept = [row for row in rows(tmp_path / "run", "train") if row["text"] == text]
    assert [(row["source"], row["path"]) for row in kept] == [("first", "a.txt")]
    assert numbers["duplicates"] == 2


def test_no_text_is_both_trained_on_and_held_out(tmp_path, corpus):
    for n in range(0, 300, 2):
        (corpus / f"copy-{n:03}.txt").write_bytes((corpus / f"{n:03}.txt").read_bytes())
    run(tmp_path / "run", corpus, holdout_percent=50)
    train, heldout = ({row["text"] for row in rows(tmp_path / "run", split)} for split in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_held_out_groups_are_whole_and_do_not_change_when_documents_are_added(tmp_path, corpus):
    run(tmp_path / "run", corpus, holdout_percent=10)
    before = {row["group"] for row in rows(tmp_path / "run", "heldout")}
    for n in range(50):
        (corpus / f"more-{n}.txt").write_text(f"one more document, number {n}")
    run(tmp_path / "run", corpus, holdout_percent=10)
    after = {row["group"] for row in rows(tmp_path / "run", "heldout")}
    assert before == {group for group in after if not group.startswith("more")}
    assert not after & {row["group"] for row in rows(tmp_path / "run", "train")}


def test_the_tail_split_cuts_by_characters_like_nanogpt(tmp_path):
    text = "".join(random.Random(0).choices("ab\u00e9\u4e2d\U0001f600\n", k=1001))
    (tmp_path / "play.txt").write_text(text)
    run(tmp_path / "run", tmp_path / "play.txt", holdout_tail_percent=10)
    assert [row["text"] for row in rows(tmp_path / "run", "train")] == [text[: int(1001 * 0.9)]]
    assert [row["text"] for row in rows(tmp_path / "run", "heldout")] == [text[int(1001 * 0.9) :]]


def test_a_tail_that_is_the_beginning_of_another_document_is_not_held_out(tmp_path):
    licence = "the same licence at the end and at the start"
    (tmp_path / "a.txt").write_text("x" * len(licence) + licence)
    (tmp_path / "b.txt").write_text(licence + "y" * len(licence))
    numbers = run(tmp_path / "run", f"x={tmp_path}/*.txt", holdout_tail_percent=50)
    assert [row["text"] for row in rows(tmp_path / "run", "heldout")] == ["y" * len(licence)]
    assert numbers["rejected"] == 1


def test_shards_are_cut_at_shard_bytes_and_read_back_in_order(tmp_path, corpus):
    run(tmp_path / "run", corpus, f"a={corpus}/00*.txt", shard_bytes=2000, holdout_percent=0)
    folder = tmp_path / "run/prepare/train"
    manifest = json.loads((tmp_path / "run/prepare/manifest.json").read_text())
    sizes = [shard["bytes"] for shard in manifest["shards"]["train"]["corpus"]]
    assert len(sizes) > 10 and max(sizes) <= 2000 and min(sizes[:-1]) > 1700
    assert list(shard_files(folder)) == ["corpus"]  # source a holds duplicates only
    assert [d["text"] for d in read_documents(folder, source="corpus")] == [
        r["text"] for r in rows(tmp_path / "run", "train")
    ]


def test_nothing_held_out_says_to_set_the_tail(tmp_path):
    (tmp_path / "one.txt").write_text("a single file of text " * 10)
    with pytest.raises(ValueError, match="Set data.holdout_tail_percent=10"):
        run(tmp_path / "run", tmp_path / "one.txt")


def test_nothing_left_for_training_gives_the_counts_by_reason(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"\0" * 100)
    (tmp_path / "in/b.txt").write_text("b")
    with pytest.raises(ValueError, match="no document is left to train on: 2 read.*1 binary, 1 too short"):
        run(tmp_path / "run", tmp_path / "in")


def test_a_text_field_that_no_row_has_names_the_fields_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "url": "y"}\n')
    message = "has the field 'contents'; they have content, url; set data.text_field=content"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", tmp_path / "a.jsonl", text_field="contents")


def test_a_run_that_would_read_its_own_files_is_refused(tmp_path, corpus):
    run(tmp_path, corpus)  # text below the run's folder is no harm
    for source in (tmp_path, f"{tmp_path}/**/*.jsonl"):
        with pytest.raises(ValueError, match="choose another --workdir"):
            run(tmp_path, source)


def test_a_full_disk_is_reported_and_the_next_run_goes_on_from_there(tmp_path, corpus, monkeypatch):
    def full(lines, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_lines", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(tmp_path / "run", corpus)
    assert not (tmp_path / "run/prepare/manifest.json").exists()
    monkeypatch.setattr(clean, "read_part", None)  # what was read is not read again
    run(tmp_path / "run", corpus)
    monkeypatch.undo()
    run(tmp_path / "other", corpus)
    assert tree(tmp_path / "run") == tree(tmp_path / "other")


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match="100 B are free"):
        run(tmp_path / "run", corpus)


def test_a_later_run_removes_what_an_earlier_one_left(tmp_path, corpus):
    run(tmp_path / "run", f"old={corpus}")
    run(tmp_path / "run", f"new={corpus}")
    assert {row["source"] for row in rows(tmp_path / "run", "train")} == {"new"}


def test_the_standard_library_is_split_by_whole_modules(tmp_path):
    numbers = run(tmp_path / "run", "stdlib")
    assert numbers["train_bytes"] > 10_000_000
    assert 0.005 < numbers["heldout_bytes"] / numbers["bytes"] < 0.05
    train, heldout = (
        {d["group"] for d in read_documents(tmp_path / f"run/prepare/{split}", source="stdlib")}
        for split in ("train", "heldout")
    )
    assert len(heldout) > 3 and not train & heldout


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="needs ../shared/data")
def test_real_text_in_eight_languages_is_kept_unchanged(tmp_path):
    run(tmp_path / "run", f"books={SHARED_TEXT}/genesis", holdout_percent=0)
    kept = {row["path"]: row["text"] for row in rows(tmp_path / "run", "train")}
    assert kept == {p.name: p.read_text(encoding="utf-8") for p in (SHARED_TEXT / "genesis").glob("*.txt")}


def test_the_quickstart_holds_out_the_modules_that_are_listed_beside_its_figures(tmp_path):
    figures = json.loads((ROOT / "results" / "quickstart.json").read_text())
    if platform.python_version() != figures["prepare/python"]:
        pytest.skip(f"the figures are of the standard library of Python {figures['prepare/python']}")
    results = prepare.run(config.load(str(ROOT / "configs" / "quickstart.py")), tmp_path)
    listed = figures["prepare/heldout"]
    found = {row["path"]: hashlib.sha256(row["text"].encode()).hexdigest() for row in rows(tmp_path, "heldout")}
    compiled = {path for path in listed.keys() | found if path.startswith("docstrings/")}  # a build may leave some out
    assert {path: digest for path, digest in found.items() if path not in compiled} == {
        path: digest for path, digest in listed.items() if path not in compiled
    }
    assert results["heldout_documents"] == len(found)
    assert figures["prepare/heldout_documents"] == len(listed)
