"""The comparison with TRL: our rows have the lengths of its rows, and what is measured is kept, resumed and summed up by row."""

import json
import sys
from pathlib import Path

import pytest

from llmjax import config
from llmjax.data.conversations import read
from llmjax.data.packing import size_of
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.post import rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trl_speed

    yield trl_speed
    sys.modules.pop("trl_speed")


@pytest.mark.parametrize("row", ["sft-tiny", "dpo-small", "grpo-smollm2"])
def test_a_row_has_the_peers_lengths_and_a_config_that_takes_them(script, row, tmp_path):
    task, (numbers, _) = row.partition("-")[0], script.ROWS[row]
    given = [one.removeprefix("--config.") for one in (*script.PLAIN, *script.settings(task, numbers))]
    c = config.load(str(ROOT / "configs" / "post" / f"{task}.py"), overrides=[*given, "train.init_from='a run'"])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in script.rows_of(task, numbers)))
    made = [group for one in read(file) for group in rows.groups_of(byte_tokenizer(), one, c)]
    count, steps = numbers[0], numbers[-1]
    if task == "grpo":
        _, prompt, completion, group, _ = numbers
        assert {len(one.examples[0].ids) for one in made} == {prompt} and len(made) == count // group * steps
        assert c.train.sequence_length == prompt + completion
        return
    assert {size_of(example) for one in made for example in one.examples} == {numbers[1]}
    assert {rows.places(one, shared=c.data.share_prompts) for one in made} == {c.train.sequence_length}
    assert len(made) == count * steps and c.train.batch_size == count
    learnt = made[0].examples[0].weights.sum()
    assert learnt == numbers[1] // 2 + 1  # the end of the text is learnt too


def test_a_step_is_the_median_with_its_share_of_the_reference(script):
    made = [{"train_seconds": t} for t in (5.0, 7.0, 8.0, 9.0)]
    found = script.of_metrics("dpo", (4, 256, 4), 2, made, reference=2.0)
    assert found["step_seconds"] == 1.5 and found["tokens_per_second"] == 2 * 4 * 256 / 1.5
    made = [{**row, "rollout/length": 10.0} for row in made]
    assert script.of_metrics("grpo", (8, 128, 64, 4, 4), 1, made, reference=0)["tokens_per_step"] == 80


def test_turns_that_are_measured_are_not_measured_again(script, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(side, row, args, budget):
        asked.append((row, side))
        return {"tokens_per_second": 30.0 if side == "ours" else 10.0, "peak_memory": 5.0, "compile_seconds": 1.0}

    monkeypatch.setattr(script, "measure", measure)
    out = tmp_path / "made.json"
    given = ["x", "--scripts", "s", "--peer", "p", "--out", str(out), "--only", "sft-tiny"]
    for turns in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*given, "--turns", turns])
        script.main()
    assert asked == [("sft-tiny", "ours"), ("sft-tiny", "theirs")] * 2
    found = json.loads(out.read_text())["summary"]
    assert found.keys() == {"sft-tiny"} and found["sft-tiny"]["faster"] == 3 and found["sft-tiny"]["turns"] == 2
    assert "3.00 times as fast" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    with pytest.raises(SystemExit):
        script.main()
