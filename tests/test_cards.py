"""Cards say what the files of a run say, in the form that the hub's own parser reads, and nothing that was made up."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import DatasetCard, ModelCard
from test_report import make_run

from llmjax import cli, config
from llmjax.errors import UserError
from llmjax.report.card_data import front_matter, size_category
from llmjax.report.cards import Given, model_card, write_cards
from llmjax.report.collect import collect

ESTIMATE = {"value": 0.4375, "error": 0.02, "count": 640}
TASKS = {
    "arc_easy": {"shots": 5, "main": "acc_norm", "metrics": {"acc_norm": ESTIMATE, "acc": {**ESTIMATE, "value": 1e-05}},
                 "notes": [], "seen_in_training": ["3"]},
    "bbq": {"shots": 0, "main": "acc", "metrics": {"acc": {**ESTIMATE, "error": None}}, "notes": [], "seen_in_training": None},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "runs" / "quickstart", name="evil: yes\n---\n# | <b>x</b>", steps=20)
    (folder / "eval" / "tasks.json").write_text(json.dumps({"tasks": TASKS, "aggregates": {}}))
    return folder


def test_the_hubs_parser_reads_the_numbers_of_the_run(run, capsys):
    arguments = ["--license", "apache-2.0", "--data-license", "cc-by-4.0", "--language", "no", "--language", "pt-BR", "--use", "Tests.",
                 "--watts", "250"]  # fmt: skip
    assert cli.main(["card", "--workdir", str(run), *arguments]) == 0
    paths = [
        Path(line.removeprefix("card: ")) for line in capsys.readouterr().out.splitlines() if line.startswith("card: ")
    ]
    assert paths == [run / "card" / "model" / "README.md", run / "card" / "data" / "README.md"]
    card, found = ModelCard.load(paths[0]), collect(run)
    assert (card.data.license, card.data.language, card.data.library_name) == ("apache-2.0", ["no", "pt-BR"], "llmjax")
    assert card.data.model_name == found.name
    told = {(one.dataset_type, one.dataset_split, one.metric_type): one.metric_value for one in card.data.eval_results}
    measured = found.stages["eval"]
    assert told["heldout", None, "bits_per_byte"] == measured["bits_per_byte"]
    assert told["heldout", "stdlib", "bits_per_byte"] == measured["bits_per_byte/stdlib"]
    assert told["arc_easy", None, "acc_norm"] == 0.4375 and told["bbq", None, "acc"] == 0.4375
    small = told["arc_easy", None, "acc"]
    assert isinstance(small, float) and small == 1e-05
    assert all(isinstance(value, float) and math.isfinite(value) for value in told.values())
    seconds = found.stages["train"]["train_seconds"]
    assert f"about {250 * seconds / 3.6e6:.3g} kWh" in card.text and "(estimate)" in card.text
    assert "| bbq | acc | 0.4375 | not known | 640 |" in card.text
    assert "Some questions of arc\\_easy stand in its training data" in card.text
    assert (
        "\n# | <b>" not in card.text and str(run.parent) not in card.text
    )  # no markup of a name, no path of this machine

    data = DatasetCard.load(paths[1])
    read = found.manifest["sources"]
    documents = sum(source[end]["documents"] for source in read.values() for end in ("train", "heldout"))
    assert (data.data.license, data.data.size_categories) == ("cc-by-4.0", [size_category(documents)])
    headings = [line for line in data.text.splitlines() if line.startswith("## ")]
    assert headings == [f"## {one}" for one in ("Motivation", "Composition", "Collection process", "Preprocessing", "Uses", "Distribution", "Maintenance")]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"license": "TODO"}, "no licence that the hub knows"), ({"license": "unknown"}, "no licence that the hub knows"),
        ({"license": ""}, "no licence that the hub knows"), ({"license": "other"}, "needs --license-name"),
        ({"license": "mit", "license_name": "x", "license_link": "y"}, "needs --license-name"),
        ({"license": "mit", "data_license": "none"}, "--data-license='none'"),
        ({"license": "mit", "languages": ("English",)}, "no language code"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_know_is_refused_before_anything_is_written(run, tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        write_cards(collect(run), Given(**given), tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_a_run_that_says_little_has_a_card_that_says_not_known(tmp_path):
    folder = tmp_path / "imported"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json(config.base()))
    given = Given(license="other", license_name="mine", license_link="https://example.org/license")
    (path,) = write_cards(collect(folder), given, tmp_path / "card")
    card = ModelCard.load(path)
    assert (card.data.license_name, card.data.eval_results) == ("mine", None)
    assert "| energy (estimate) | not known |" in card.text and "## Evaluation\n\nnot known" in card.text
    with pytest.raises(UserError, match="leave --data-license out"):
        write_cards(collect(folder), Given(license="mit", data_license="mit"), tmp_path / "other")


def test_the_energy_is_estimated_from_what_makers_publish(run):
    path = run / "train" / "results.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"device": "8 NVIDIA H100 devices, data=8", "train_seconds": 9000})
    )
    assert "about 14 kWh, at 700 W for each H100 SXM" in model_card(collect(run), Given(license="mit"))


def test_metadata_is_read_back_as_it_was():
    yaml = pytest.importorskip("yaml")
    value = {
        "a": 'quote " and \\ and \n---\n', "b": [1, 1e-05, 1e22, -0.5, True, "no", "1e-05", "null"], "c": {"d": [{"e": "é😀\x7f\u2028"}, ["x"]]},
    }  # fmt: skip
    assert yaml.safe_load(front_matter({**value, "gone": "", "also": []}).strip("-\n")) == value
