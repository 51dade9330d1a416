"""The studio shows runs as they are, also while they are written; names lead nowhere else, and texts stay texts."""

import html.parser
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa
import pytest
from helpers import start_command, tiny_config
from pyarrow import parquet

pytest.importorskip("starlette")

import serving
from starlette.testclient import TestClient
from test_report import make_run, metrics_row
from test_sweep import planned

from llmjax import config, recipe, storage
from llmjax.data.tokenizer_files import load_tokenizer
from llmjax.errors import UserError
from llmjax.infer.language_model import LanguageModel
from llmjax.report.curves import bin_rows
from llmjax.serve import models
from llmjax.serve.server import Served
from llmjax.studio import batch, runs
from llmjax.studio.app import READERS, STATIC, Studio, make_app
from llmjax.studio.chat import Chat
from llmjax.studio.places import Places
from llmjax.studio.watch import Follower
from llmjax.sweep import study

OLD = time.time() - 10_000
HOSTILE = "<img src=x onerror=alert(1)>"
ELEMENTS = {
    "tr", "td", "th", "table", "thead", "tbody", "div", "section", "span", "p", "a", "h1", "h2", "h3", "h4", "b", "i", "pre", "code",
    "ul", "li", "details", "summary", "figure", "figcaption", "input", "progress", "meter", "svg", "g", "defs", "clipPath",
    "rect", "line", "path", "circle", "text", "title", "button", "form", "label", "textarea",
}  # fmt: skip


def open_studio(root: Path, *data: Path, idle_seconds: float = 60.0) -> TestClient:
    chat = Chat(config.base(), hosts={"127.0.0.1"}, idle_seconds=idle_seconds)
    app = make_app(Studio(Places(root, data), chat), hosts={"127.0.0.1"})
    return TestClient(app, base_url="http://127.0.0.1:8100")


def get(client: TestClient, path: str, **parameters: Any) -> Any:
    answer = client.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def make_old(folder: Path) -> Path:
    """A run that nobody has touched for a while."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (OLD, OLD))
    return folder


def note_stages(folder: Path, **entries: Any) -> None:
    (folder / "stages.json").write_text(json.dumps(entries))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------- the list


def test_the_list_has_runs_chains_and_studies_with_their_states(root):
    done = {stage: {"done": True} for stage in ("prepare", "tokenizer", "train", "eval", "generate")}
    for name in ("finished", "failed", "stopped", "held", "fresh"):
        make_run(root / "deep" / name, steps=20)
    note_stages(root / "deep" / "finished", **done)
    note_stages(root / "deep" / "failed", **(done | {"train": {"done": False, "error": "Diverged: not finite"}}))
    note_stages(root / "deep" / "stopped", **(done | {"eval": {"done": False}}))
    for name in ("finished", "failed", "stopped", "held"):
        make_old(root / "deep" / name)
    (root / "chain").mkdir()
    (root / "chain" / "chain.json").write_text(json.dumps({"links": {"base": {}, "sft": {}}}))
    make_run(root / "chain" / "base", steps=20)
    make_run(planned(root / "study").run_folder(study.read(root / "study").trials[0]), steps=20)
    with storage.locked(root / "deep" / "held" / ".lock"):
        found = {row["name"]: row for row in get(open_studio(root), "/api/runs")["runs"]}
    states = {name: found[f"deep/{name}"]["state"] for name in ("finished", "failed", "stopped", "held", "fresh")}
    assert states == {
        "finished": "finished", "failed": "failed", "stopped": "stopped", "held": "running", "fresh": "running"
    }  # fmt: skip
    assert found["deep/failed"]["error"] == "train: Diverged: not finite"
    assert {name for name, row in found.items() if row["kind"] != "run"} == {"chain", "study"}
    assert "chain/base" in found and not any(name.startswith("study/") for name in found)
    row = found["deep/finished"]
    assert (row["step"], row["heldout_name"]) == (20, "bits per byte") and row["loss"] > 0


def test_a_stage_that_fails_leaves_its_error_for_those_who_look(tiny_run):
    c = tiny_config(tokenizer__kind="bpe", tokenizer__vocab_size=30_000)
    c.data.sources = config.from_json((tiny_run / "config.json").read_text()).data.sources
    with pytest.raises(UserError) as raised:
        recipe.run(c.lock(), tiny_run, ("tokenizer",))
    state, error = runs.state_of(tiny_run, {})
    assert state == "failed" and error == f"tokenizer: UserError: {str(raised.value).splitlines()[0]}"[: len(error)]
    c = config.from_json((tiny_run / "config.json").read_text())
    c.tokenizer.kind = "byte"
    recipe.run(c.lock(), tiny_run, ("tokenizer",))
    assert runs.state_of(tiny_run, {})[0] != "failed"


def test_tags_and_a_note_are_kept_with_the_run_and_change_nothing_else(root):
    for name in ("a", "b"):
        make_old(make_run(root / name, steps=20))
    client = open_studio(root)
    before = get(client, "/api/run", name="a")
    assert before["tags"] == [] and before["note"] == ""
    sent = {"name": "a", "tags": ["good", "seed-3", "good"], "note": " It spikes.\n"}
    assert client.post("/api/marks", json=sent).json() == {"tags": ["good", "seed-3"], "note": "It spikes."}
    after = get(client, "/api/run", name="a")
    assert after["tags"] == ["good", "seed-3"] and after["note"] == "It spikes."
    assert after["state"] == before["state"] == "stopped" and after["age"] > 1000  # a mark is no sign of life
    listed = {row["name"]: row["tags"] for row in get(client, "/api/runs")["runs"]}
    assert listed == {"a": ["good", "seed-3"], "b": []}
    for wrong, status in (
        ({"tags": ["a b"]}, 400), ({"tags": ["#a"]}, 400), ({"tags": [""]}, 400), ({"tags": ["x" * 41]}, 400), ({"tags": "a"}, 400), ({"tags": [3]}, 400),
        ({"tags": None}, 400), ({"note": "x" * 2001}, 400), ({"note": None}, 400), ({"tags": [str(i) for i in range(21)]}, 400), ({"name": "c"}, 404), ({"name": "../a"}, 400), ({"name": None}, 400),
    ):  # fmt: skip
        assert client.post("/api/marks", json={**sent, **wrong}).status_code == status, wrong
    plain = {"content-type": "text/plain"}
    assert client.post("/api/marks", content=json.dumps(sent), headers=plain).status_code == 415
    assert client.post("/api/marks", json=sent, headers={"origin": "http://evil.example"}).status_code == 403
    assert get(client, "/api/run", name="a")["tags"] == ["good", "seed-3"]
    assert client.post("/api/marks", json={"name": "a", "tags": [], "note": ""}).status_code == 200
    assert not (root / "a" / "marks.json").exists()
    (root / "a" / "marks.json").write_text('{"tags": [1, "kept"], "note": {}}')
    assert get(client, "/api/run", name="a")["tags"] == ["kept"]
    (root / "a" / "marks.json").write_text("{")
    assert get(client, "/api/run", name="a")["tags"] == []


# ---------------------------------------------------------------------- files that are being written


def test_a_run_that_is_being_written_is_read_at_every_byte(root):
    run = make_run(root / "run", steps=20)
    path, client = run / "metrics.jsonl", open_studio(root)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (0, 1, last - 1, last, *range(last + 1, len(whole), 37), len(whole) - 1, len(whole)):
        path.write_bytes(whole[:end])
        steps = whole[:end].count(b"\n")
        found = get(client, "/api/curves", name="run", metric=["loss", "heldout_bits_per_byte/*"])["runs"]["run"]
        assert found["rows"] == steps
        assert get(client, "/api/run", name="run")["name"] == "run"
    assert set(found["curves"]) == {"loss", "heldout_bits_per_byte/stdlib", "heldout_bits_per_byte/notes"}
    assert get(client, "/api/curves", name="run", metric="loss", seen=found["version"])["runs"]["run"]["same"]


def test_a_follower_has_the_curves_of_the_whole_file_whatever_happens_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(metrics_row(step, steps=1300)).encode() + b"\n" for step in range(1, 1301)]
    follower = Follower(path)
    assert follower.curves()[0].rows == 0  # it is not there yet
    for end in (1, 700, 1300):  # it grows, past the number of rows from which bins are merged
        path.write_bytes(b"".join(lines[:end]) + b'{"step": ')
        found, wanted = follower.curves()[0], bin_rows(lines[:end])
        assert found.by_name.keys() == wanted.by_name.keys() and found.bad_steps == wanted.bad_steps
        for name, curve in wanted.by_name.items():
            np.testing.assert_array_equal(vars(found.by_name[name])["mean"], curve.mean)
    storage.write_bytes(path, b"".join(lines[:900]))  # the run goes back to a checkpoint
    assert follower.curves()[0].rows == 900
    storage.write_bytes(path, b"".join(lines[10:1100]))  # another file, which is longer
    assert follower.curves()[0].rows == 1090
    path.unlink()
    assert follower.curves()[0].rows == 0


def test_no_file_of_a_run_that_is_cut_missing_or_something_else_makes_the_studio_fail(root):
    run = make_run(root / "run", steps=20)
    note_stages(run, train={"done": True})
    (run / "samples").mkdir()
    (run / "samples" / "000001.json").write_text(json.dumps([{"prompt": "a", "answer": "b", "reward": 1.0}]))
    (run / "answers").mkdir()
    (run / "answers" / "answers.jsonl").write_text('{"prompt": "a", "reward": 1.0}\n')
    client = open_studio(root)
    make_run(root / "other", steps=20)
    paths = [f"/api/{what}?name=run" for what in ("run", "curves", "batch", "samples")] + [
        "/api/runs", "/api/rollouts?name=run&round=1", "/api/compare?name=run&name=other", "/api/rows?name=run/answers/answers.jsonl",
    ]  # fmt: skip
    files = [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert len(files) >= 9
    with client:  # one event loop for all requests
        for path in files:
            whole = path.read_bytes()
            for damaged in (whole[: len(whole) // 2], b"[[]]", b'{"a": {"b": null}, "sources": 1}', None):
                if damaged is None:
                    path.unlink()
                else:
                    path.write_bytes(damaged)
                for asked in paths:
                    assert client.get(asked).status_code in (200, 400, 404, 409), (path, damaged, asked)
            path.write_bytes(whole)


# ---------------------------------------------------------------------- names


SECRET = "the secret outside"
NAMES = (
    "..", "../secret.jsonl", "run/../../secret.jsonl", "%2e%2e/secret.jsonl", "..%2fsecret.jsonl", "..\\secret.jsonl", "/etc/passwd",
    "run/\0", "run//config.json", "./run", "run/.lock", ".git", "~", "link/secret.jsonl", "link", "circle", "a" * 2000, "\ud800",
    "file:///etc/passwd", "run/config.json/x",
)  # fmt: skip


def test_no_name_leads_out_of_the_folder(root):
    (root.parent / "secret.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    make_run(root / "run", steps=20)
    (root / "link").symlink_to(root.parent)
    (root / "circle").symlink_to(root / "circle")
    with open_studio(root) as client:  # one event loop for all requests
        for path in READERS:
            for name in NAMES:
                raw = quote(name, safe="", errors="surrogatepass")
                also = "&name=run" if path == "/api/compare" else ""
                answer = client.get(f"{path}?name={raw}{also}&round=1")
                assert SECRET not in answer.text and "root:" not in answer.text
                assert answer.status_code in (200, 400, 404, 409), (path, name)
                if path not in ("/api/runs", "/api/places"):
                    assert answer.status_code != 200, (path, name)
        assert "secret" not in client.get("/api/files").text
        for path in ("/../secret.jsonl", "/%2e%2e/secret.jsonl", "/static/app.js", "/app.py"):
            assert client.get(path).status_code == 404
        assert client.get("/api/rows", params={"place": "/", "name": "etc/passwd"}).status_code == 404
        for wrong in ("-1", "1e9", "x", "9" * 30):
            assert client.get("/api/rows", params={"name": "run", "start": wrong}).status_code == 400


def test_only_this_machines_names_and_pages_are_answered(root):
    client = open_studio(root)
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/api/runs", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/chat/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/chat/v1/models").status_code == 503  # no model is loaded
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.post("/api/chat", content='{"name": null}', headers={"content-type": "text/plain"}).status_code == 415
    for body in ("", "[]", "{}", '{"name": 1}', '{"name": "a", "step": -1}', '{"name": "a", "step": true}', "[" * 9000):
        answer = client.post("/api/chat", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body
    assert client.post("/api/chat", json={"name": "x" * 20_000}).status_code == 413
    assert client.post("/api/chat", json={"name": "../run"}).status_code == 400
    with pytest.raises(UserError, match="there is no folder"):
        Places(root / "missing")


# ---------------------------------------------------------------------- tokens and rows


def texts_of(pieces: list[dict[str, Any]], **wanted: bool) -> str:
    return "".join(p["text"] for p in pieces if all(bool(p.get(key)) == value for key, value in wanted.items()))


def test_the_first_batch_is_what_the_training_reads_with_what_is_learnt_marked(root, tiny_run):
    from llmjax.data.batches import TrainBatches
    from llmjax.train import pretrain

    run = tiny_run.rename(root / "run")
    tokenizer = load_tokenizer(run / "tokenizer")
    c = pretrain.resolve(config.from_json((run / "config.json").read_text()), tokenizer)
    wanted = TrainBatches(c, run / "tokenizer" / "tokens", total_steps=8).batch(0)
    found = get(open_studio(root), "/api/batch", name="run")
    assert found["shape"] == list(wanted["tokens"].shape)
    for number, row in enumerate(found["rows"]):
        tokens, targets, weights = (wanted[key][number] for key in ("tokens", "targets", "weights"))
        learnt = [i for i, w in zip(targets.tolist(), weights.tolist(), strict=True) if w]
        assert row["learnt"] == len(learnt) == sum(p.get("learnt", False) for part in row["parts"] for p in part)
        everything = [tokens[0], *targets] if weights[-1] else tokens
        assert sum(len(part) for part in row["parts"]) == len(everything)
        names = {i: name for name, i in tokenizer.control_ids.items()}
        text = "".join(names.get(i) or tokenizer.piece_bytes[i].decode() for i in np.asarray(everything).tolist())
        assert "".join(texts_of(part) for part in row["parts"]) == text


def test_masked_tokens_say_what_they_are_to_become(tiny_run):
    tokenizer = load_tokenizer(tiny_run / "tokenizer")
    ids = tokenizer.encode("abc")
    row = {"tokens": np.array([ids[0], 300, ids[2], 0]), "targets": np.array([*ids, 0]), "weights": np.array([0.0, 1, 0, 0]),
           "segments": np.array([1, 1, 1, 0])}  # fmt: skip
    (part,) = batch._row(row, tokenizer)["parts"]
    assert part == [{"text": "a"}, {"text": "<300>", "control": True, "learnt": True, "target": "b"}, {"text": "c"}]
    pieces = batch.pieces(tokenizer, tokenizer.encode("é"))
    assert [piece["text"] for piece in pieces] == ["", "é"]  # a character of two tokens


def test_rows_of_data_come_in_pages(root, tiny_run, tmp_path):
    shutil.copytree(tiny_run, root / "run")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"row {i}", "n": i} for i in range(10)]
    (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "cu')
    parquet.write_table(pa.Table.from_pylist(rows), data / "b.parquet", row_group_size=3)
    (data / "c.csv").write_text("text,n\nrow 0,0\n")
    (data / "cut.parquet").write_bytes((data / "b.parquet").read_bytes()[:-20])
    (data / "long.json").write_text(json.dumps([{"text": "x" * 10_000, "list": list(range(1000))}]))
    client, place = open_studio(root, data), str(data)
    assert get(client, "/api/places")["places"] == ["runs", place]
    listed = get(client, "/api/files", place=place)["entries"]
    assert [(entry["name"], entry["kind"]) for entry in listed] == [
        (name, "rows") for name in ("a.jsonl", "b.parquet", "c.csv", "cut.parquet", "long.json")
    ]
    for name in ("a.jsonl", "b.parquet"):
        seen = [get(client, "/api/rows", place=place, name=name, start=s, count=4) for s in (0, 4, 8)]
        assert [row for page in seen for row in page["rows"]][:10] == rows
        assert [page["more"] for page in seen] == [True, True, False]
    assert "was cut" in seen_error(client, place, "a.jsonl", 10)
    assert client.get("/api/rows", params={"place": place, "name": "cut.parquet"}).status_code == 409
    (row,) = get(client, "/api/rows", place=place, name="long.json")["rows"]
    assert row["text"].endswith("[6,000 more characters]") and row["list"][-1] == "[900 more]"

    (stream,) = get(client, "/api/files", name="run/tokenizer/tokens/train")["entries"]
    assert stream["kind"] == "tokens"
    page = get(client, "/api/rows", name=stream["name"], start=1, count=30)
    text = next((tiny_run / "prepare" / "train").glob("*.jsonl")).read_text()
    assert json.loads(text.splitlines()[0])["text"].startswith(texts_of(page["pieces"])) and page["more"]


def seen_error(client: TestClient, place: str, name: str, start: int) -> str:
    (row,) = get(client, "/api/rows", place=place, name=name, start=start)["rows"]
    return str(row["error"])


# ---------------------------------------------------------------------- the page


@pytest.fixture
def hostile(root: Path, tiny_run: Path) -> TestClient:
    """A folder in which every text is an attack."""
    run = root / f"{HOSTILE}&\"'"
    make_run(run, name=HOSTILE, steps=20)
    shutil.copytree(tiny_run, run, dirs_exist_ok=True)
    c = json.loads((tiny_run / "config.json").read_text()) | {"name": HOSTILE}
    (run / "config.json").write_text(json.dumps(c))
    note_stages(run, **{HOSTILE: {"done": True}, "train": {"done": False, "error": HOSTILE}})
    row = {"prompt": HOSTILE, "answer": HOSTILE, "finish": HOSTILE, "reward": 1.0, "advantage": -1.0, HOSTILE: HOSTILE}
    (run / "samples").mkdir()
    (run / "samples" / "000001.json").write_text(json.dumps([row, {**row, "reward": None}]))
    (run / "answers").mkdir()
    (run / "answers" / "answers.jsonl").write_text(json.dumps(row) + "\n")
    (run / "generate" / "samples.jsonl").write_text(json.dumps({"prompt": HOSTILE, "text": HOSTILE, "finish": HOSTILE}))
    (run / "train" / "heldout.json").write_text(
        json.dumps([{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]]}])
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "loss": 1.0, HOSTILE: 2.0, f"heldout_bits_per_byte/{HOSTILE}": 1.0}) + "\n")
    (run / "marks.json").write_text(json.dumps({"tags": [HOSTILE], "note": HOSTILE}))
    make_run(root / "other", name="other", steps=20, level=1.0)
    (root / "data.jsonl").write_text(
        json.dumps({HOSTILE: HOSTILE, "messages": [{"role": HOSTILE, "content": HOSTILE}]})
    )
    (root / "chain").mkdir()
    links = {HOSTILE: {"train": {"init_from": HOSTILE}}}
    (root / "chain" / "chain.json").write_text(json.dumps({"links": links}))
    found = planned(root / "study", arms={"a": {"optimizer.learning_rate": 0.1}, "b": {"optimizer.learning_rate": 0.2}})
    for number, trial in enumerate(found.trials):
        study.note(found, trial, "done", values={found.design.metric[0]: 1.0 + number}, error=HOSTILE)
    return open_studio(root)


def nodes(tree: Any) -> Iterator[list[Any]]:
    if isinstance(tree, list) and len(tree) > 1 and isinstance(tree[0], str) and isinstance(tree[1], dict):
        yield tree
        tree = tree[2:]
    if isinstance(tree, list):
        for child in tree:
            yield from nodes(child)


def test_hostile_texts_stay_texts_in_every_view(hostile):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    name = f"{HOSTILE}&\"'"
    tokens = f"{name}/tokenizer/tokens/train"
    (stream,) = get(hostile, "/api/files", name=tokens)["entries"]
    given = {
        "hostile": HOSTILE, "runs": get(hostile, "/api/runs"), "run": get(hostile, "/api/run", name=name),
        "samples": get(hostile, "/api/samples", name=name), "rollouts": get(hostile, "/api/rollouts", name=name, round=1),
        "batch": get(hostile, "/api/batch", name=name), "compare": get(hostile, "/api/compare", name=[name, "other"]),
        "curves": get(hostile, "/api/curves", name=[name, "other"], metric=["loss", "tokens", "grad_norm", "heldout_bits_per_byte*", HOSTILE]),
        "study": get(hostile, "/api/study", name="study"), "chain": get(hostile, "/api/chain", name="chain"),
        "files": get(hostile, "/api/files", name=name),
        "pages": [get(hostile, "/api/rows", name="data.jsonl"), get(hostile, "/api/rows", name=stream["name"], count=99)],
    }  # fmt: skip
    done = subprocess.run(
        [node, Path(__file__).parent / "studio.mjs", STATIC], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    made = list(nodes(found["trees"]))
    assert {"path", "table", "meter", "summary"} <= {name for name, *_ in made} <= ELEMENTS
    for name, attributes, *_ in made:
        assert not any(key.startswith("on") or key in ("style", "src", "srcdoc") for key in attributes), (
            name,
            attributes,
        )
        assert attributes.get("href", "#/").startswith("#/") and "<" not in attributes.get("class", "")
    assert HOSTILE in json.dumps(found["trees"])  # it is shown
    assert found["matches"] == [False, True, True, False] and found["sorted"] == ["a", "b"]
    assert found["ticks"] == [[0, 0.2, 0.4, 0.6, 0.8, 1], [0, 500, 1000], [2]]
    assert found["smoothed"] == pytest.approx([1, 1, 1, 1 + 4 * 0.5 / (1 - 0.5**4)])
    assert found["scores"] == pytest.approx([4 / math.log(2) / (len(HOSTILE) + 3), 3.0]) and found["nothing"] is None
    assert found["seeds"] == {
        "xs": [10, 20],
        "ys": [3.5, None],
        "low": [3, None],
        "high": [4, None],
    }  # NaN is not hidden
    assert found["csv"] == 'line,step,value,low,high\r\n\'=1+1,1,0.5,0,\r\n\'=1+1,2,NaN,,\r\n"a""b,",-1,3,,\r\n'
    assert found["along"] == [0, 50, 100, 200]
    assert found["short"] == ["0", "1,234", "12.3K", "1.5B", "0.25", "1.23e-4", "", ""]


class Page(html.parser.HTMLParser):
    """The elements of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_elsewhere():
    page = Page()
    page.feed((STATIC / "index.html").read_text())
    assert not [tag for tag, attributes in page.elements if tag in ("iframe", "img") or "style" in attributes]
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "innerHTML" not in text and "eval(" not in text, path
        assert len(text.splitlines()) < 400


# ---------------------------------------------------------------------- chat


def test_a_model_is_loaded_when_it_is_asked_for_one_at_a_time_and_freed_when_idle(root, monkeypatch):
    for name in ("a", "b"):
        make_run(root / name, steps=20)
        (root / name / "checkpoints" / "7").mkdir(parents=True)
    opened: list[Path] = []

    def open_model(folder: Path, c: Any, *, name: str) -> Served:
        opened.append(folder)
        if folder.name == "8":
            raise UserError("there is no checkpoint of step 8")
        model: LanguageModel = serving.language_model()
        return Served(name, model, {}, 64)

    monkeypatch.setattr(models, "open_model", open_model)
    monkeypatch.setattr(models, "engines", lambda served, c: {})
    with open_studio(root, idle_seconds=0.5) as client:

        def ready(name: str) -> bool:
            state = get(client, "/api/chat")
            return bool(state["ready"] and state["name"] == name)

        assert client.post("/api/chat", json={"name": "a", "step": 7}).status_code == 200
        assert serving.until(lambda: ready("a@7"))
        assert opened == [root / "a" / "checkpoints" / "7"]
        assert [one["id"] for one in get(client, "/chat/v1/models")["data"]] == ["a@7"]
        assert "llmjax chat" in client.get("/chat/").text and client.get("/chat/app.js").status_code == 200
        assert client.post("/api/chat", json={"name": "b"}).status_code == 200
        assert serving.until(lambda: ready("b"))
        assert [one["id"] for one in get(client, "/chat/v1/models")["data"]] == ["b"]
        answer = client.post("/api/chat", json={"name": "a", "step": 8})
        assert answer.status_code == 409 and "step 8" in get(client, "/api/chat")["error"]
        client.post("/api/chat", json={"name": "b"})
        assert serving.until(lambda: ready("b"))
        assert serving.until(lambda: client.get("/api/chat").json()["name"] == "")  # nobody asks
        assert client.get("/chat/v1/models").status_code == 503


def asked(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_command_shows_a_run_and_chats_with_its_checkpoint(root, tiny_run, one_device):
    run = tiny_run.rename(root / "run")
    recipe.run(config.from_json((run / "config.json").read_text()).lock(), run, ("train",))
    started = start_command("studio", root, "--port", "0", "--config.infer.slots=2")
    try:
        assert started.stdout is not None
        url = next(line for line in started.stdout if "http://" in line).split()[-1]
        (row,) = asked(f"{url}/api/runs")["runs"]
        assert row["name"] == "run" and row["step"] == 8
        asked(f"{url}/api/chat", {"name": "run", "step": 8})
        assert serving.until(lambda: asked(f"{url}/api/chat")["ready"], 120)
        body = {"prompt": ["Text number 1", "Text"], "echo": True, "logprobs": 1, "max_tokens": 0}
        scored = [one["logprobs"]["token_logprobs"] for one in asked(f"{url}/chat/v1/completions", body)["choices"]]
        assert [values[0] for values in scored] == [None, None] and all(value < 0 for value in scored[0][1:])
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 0
    finally:
        started.kill()
