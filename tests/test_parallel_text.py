"""Two files of aligned lines become pairs that stay together, from the sources to the batches."""

import numpy as np
import pytest
from helpers import tiny_config

import llmjax
from llmjax import recipe
from llmjax.data import parallel_text
from llmjax.data.batches import TrainBatches, heldout_batches
from llmjax.data.documents import read_documents
from llmjax.data.parallel_text import parse_spec, read_pairs, rows_of_pairs, shorten
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.data.tokens import load_index, read_stream
from llmjax.objectives import corruption
from llmjax.prepare.sources import resolve_sources

TOKENIZER = byte_tokenizer()


def write_lines(folder, count=120):
    """a.txt and b.txt: line n of each begins with n, so that pairs can be told."""
    a = [f"{n} {'the word ' * (n % 5)}end" for n in range(count)]
    b = [f"{n} {'das wort ' * (n % 4)}ende" for n in range(count)]
    (folder / "a.txt").write_text("\n".join(a) + "\n", encoding="utf-8")
    (folder / "b.txt").write_text("\r\n".join(b) + "\r\n", encoding="utf-8")
    return f"en|de={folder / 'a.txt'}|{folder / 'b.txt'}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    spec = write_lines(folder)
    c = tiny_config(
        spec,
        objective__name="translation",
        model__languages=2,
        model__direction="bidirectional",
        train__sequence_length=64,
        data__record_tokens=50,
    )
    recipe.run(c.lock(), folder / "run", ("prepare", "tokenizer"))
    return c, folder / "run"


def decode(ids):
    return TOKENIZER.decode([int(i) for i in ids if i < 260])


def test_pairs_are_documents_held_out_by_line(run):
    _, workdir = run
    found = {}
    for split in ("train", "heldout"):
        for document in read_documents(workdir / "prepare" / split, source="en-de"):
            first, second = document["text"].split("\n")
            number = first.split()[0]
            assert number == second.split()[0] and document["path"] == f"a.txt:{int(number) + 1}"
            assert found.setdefault(number, split) == split
    assert len(found) == 120 and 10 < sum(split == "heldout" for split in found.values()) < 40


def test_the_stream_has_both_texts_of_each_pair_in_turn_and_says_where_pairs_begin(run):
    _, workdir = run
    stream = read_stream(workdir / "tokenizer" / "tokens", "train", "en-de")
    entry = load_index(workdir / "tokenizer" / "tokens").splits["train"]["en-de"]
    assert entry["languages"] == ["en", "de"]
    texts = decode(np.where(stream == 1, 4 + ord("\n"), stream)).split("\n")[1:]
    assert all("das" not in text for text in texts[::2]) and all("the" not in text for text in texts[1::2])
    starts = np.load(workdir / "tokenizer" / "tokens" / "train" / "en-de" / parallel_text.PAIRS_FILE)
    assert starts.tolist() == [*np.flatnonzero(stream == 1)[::2].tolist(), len(stream)]
    assert entry["documents"] == 2 * (len(starts) - 1) == len(texts)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_rows_hold_whole_pairs_with_their_languages_on_any_number_of_hosts(run, hosts):
    c, workdir = run
    folder, change = workdir / "tokenizer" / "tokens", corruption(c, TOKENIZER)
    parts = [TrainBatches(c, folder, total_steps=9, corruption=change, host=h, hosts=hosts) for h in range(hosts)]
    whole = TrainBatches(c, folder, total_steps=9, corruption=change)
    for k in (3, 0):
        made = [part.batch(k) for part in parts]
        for name, values in whole.batch(k).items():
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in made]), values)
    seen = 0
    for row in range(8):
        batch = {name: values[row] for name, values in whole.batch(0).items()}
        for segment in range(1, batch["segments"].max() + 1):
            here = batch["segments"] == segment
            texts = [decode(batch["targets"][here & (batch["languages"] == n)]) for n in (1, 0)]  # de is 0, en is 1
            if not texts[0].endswith("end") or not texts[1].endswith("ende"):
                continue  # one that was longer than the row
            assert texts[0].split()[0] == texts[1].split()[0]
            assert "das" not in texts[0] and "the" not in texts[1]
            seen += 1
    assert seen >= 8


def test_held_out_rows_of_pairs_are_hidden_the_same_for_every_seed(run):
    c, workdir = run
    folder, change = workdir / "tokenizer" / "tokens", corruption(c, TOKENIZER)
    first = heldout_batches(c, folder, count=2, corruption=change)["en-de"]
    other = c.copy_and_resolve_references()
    other.seed = 5
    for a, b in zip(first, heldout_batches(other, folder, count=2, corruption=change)["en-de"], strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert (TrainBatches(c, folder, total_steps=9, corruption=change).batch(0)["weights"] != TrainBatches(other, folder, total_steps=9, corruption=change).batch(0)["weights"]).any()  # fmt: skip


def test_other_objectives_read_either_text_as_a_document(run):
    c, workdir = run
    batch = TrainBatches(c, workdir / "tokenizer" / "tokens", total_steps=9).batch(0)
    text = batch["targets"][batch["weights"] > 0]
    assert set(batch["languages"][batch["segments"] > 0]) == {0, 1}
    second = (batch["segments"] % 2 == 0) & (batch["segments"] > 0)
    assert (batch["languages"][second] == 0).all() and 1 not in text


def test_rows_are_filled_with_as_many_pairs_as_fit_and_long_pairs_are_cut():
    starts = np.cumsum([0, 5, 5, 5, 30, 2, 2]).astype(np.uint64)
    assert rows_of_pairs(starts, length=12).tolist() == [0, 2, 3, 4, 6]
    pair = np.array([1, *[7] * 10, 2, 1, *[8] * 4, 2])
    assert shorten(pair, length=14, start_id=1).tolist() == [1, *[7] * 6, 2, 1, *[8] * 4, 2]
    assert shorten(pair, length=8, start_id=1).tolist() == [1, 7, 7, 2, 1, 8, 8, 2]
    assert shorten(pair, length=99, start_id=1).tolist() == pair.tolist()


def test_unequal_numbers_of_lines_are_an_error_that_names_both(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1\n2\n3\n")
    b.write_text("1\n2")
    with pytest.raises(ValueError, match=r"a.txt has 3 and .*b.txt has 2: line 3 is the first without a partner"):
        list(read_pairs(a, b))
    b.write_text("1\n2\n3\n4\n5\n")
    with pytest.raises(ValueError, match=r"a.txt has 3 and .*b.txt has 5"):
        list(read_pairs(a, b))
    b.write_text("1\n \n3")
    assert [reason for _, _, reason in read_pairs(a, b)] == ["", "empty line: in b.txt", ""]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("en|de=A|B|A", "two files with as many lines"),
        ("en=A|B", "two files with as many lines"),
        ("e n|de=A|B", "'e n' cannot name a language"),
        ("en|en=A|B", "both languages are called 'en'"),
        ("en|de=A|nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_a_parallel_source_that_cannot_be_read_says_why(tmp_path, spec, message):
    write_lines(tmp_path, 3)
    spec = spec.replace("A", str(tmp_path / "a.txt")).replace("B", str(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match=message):
        resolve_sources([spec])


def test_without_names_the_files_name_the_languages(tmp_path):
    write_lines(tmp_path, 3)
    spec = parse_spec(f"{tmp_path / 'a.txt'}|{tmp_path / 'b.txt'}")
    assert spec is not None and spec.languages == ("a", "b") and spec.name == "a-b"
    assert parse_spec("stdlib") is None and parse_spec(str(tmp_path / "a.txt")) is None


def test_more_languages_than_the_model_has_are_an_error(run):
    c, workdir = run
    few = c.copy_and_resolve_references()
    few.model.languages = 1
    with pytest.raises(ValueError, match=r"there are 2 languages \(de, en\) and model.languages=1: raise it"):
        TrainBatches(few, workdir / "tokenizer" / "tokens", total_steps=9)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_causal_model_of_two_languages_is_scored_on_both_texts_of_held_out_pairs(tmp_path):
    spec = write_lines(tmp_path, 40)
    c = tiny_config(spec, model__languages=2, eval__max_bytes=0, eval__xz=False).lock()
    results = recipe.run(c, tmp_path / "run", ("prepare", "tokenizer", "train", "eval"))
    documents = list(read_documents(tmp_path / "run" / "prepare" / "heldout", source="en-de"))
    assert results["eval/bytes"] == sum(len(document["text"].encode()) - 1 for document in documents)
    model = llmjax.load(tmp_path / "run")
    ids = np.array([1, *TOKENIZER.encode("1 das wort"), 2])
    losses = [model.score([ids], languages=[n], batch_size=8).nats for n in (0, 1)]
    assert losses[0] != losses[1]
    assert model.score([ids, ids], languages=[1, 0], batch_size=8).nats == pytest.approx(sum(losses), rel=1e-5)
