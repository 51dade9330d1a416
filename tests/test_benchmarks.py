"""Scripts of benchmarks/ import what the package has; their results name the command and the machine."""

import importlib
import json
import re
import sys
from pathlib import Path

import ablations
import airline
import common
import numpy as np
import pytest
import safety
import trl_golden

from llmjax.errors import UserError

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_name_that_a_script_imports_from_the_package_exists(script):
    """In the code that it hands to other processes as text, too."""
    for module, names in re.findall(
        r"^ *from (llmjax[\w.]*|common) import \(?([^()#\n]+|[^()]+\))", script.read_text(), re.M
    ):
        for name in re.findall(r"(\w+)(?: as \w+)?(?:,|\s*$|\))", names):
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"


def test_results_name_the_command_and_the_machine_but_none_of_its_folders(tmp_path, monkeypatch):
    script = ROOT / "benchmarks" / "moe.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), "--text", str(tmp_path / "a b.txt"), "--out", "results/x.json", "-n", "3"]
    )
    common.write({"command": "an older one", "value": 1.5}, tmp_path / "new" / "x.json")
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    assert found["command"] == "python benchmarks/moe.py --text 'a b.txt' --out results/x.json -n 3"
    assert found["value"] == 1.5
    assert found["machine"]["processor"] and found["machine"]["cores"] >= 1 and found["machine"]["memory_gb"] > 0
    assert found["machine"]["packages"].keys() >= {"jax", "numpy"}
    common.write({}, None)


def test_workers_answer_lines_and_one_that_ended_is_an_error():
    code = "import json, sys\nprint('{\"ready\": 1}', flush=True)\nfor line in sys.stdin:\n    print('noise')\n"
    code += "    if 'stop' in line: sys.exit(3)\n    print(json.dumps({'said': line.strip()}), flush=True)"
    worker, ready = common.start_worker([sys.executable, "-c", code])
    assert ready == {"ready": 1}
    assert common.ask(worker, "a") == {"said": "a"}
    with pytest.raises(common.WorkerError, match="status 3"):
        common.ask(worker, "stop")
    common.end(worker)


def test_speed_is_of_the_best_call():
    assert common.speed(lambda: sum(range(100_000)), 1_000_000, repeats=2) > 0


def test_every_result_has_the_script_or_the_config_that_made_it():
    makers = {path.stem for folder in ("benchmarks", "configs") for path in (ROOT / folder).glob("*.py")}
    for path in (ROOT / "results").glob("*.json"):  # NAME.json, or NAME-VARIANT.json and NAME_VARIANT.json
        assert any(path.stem == name or path.stem.startswith((f"{name}-", f"{name}_")) for name in makers), path.name


def test_settings_of_trl_are_read_by_name_and_unknown_ones_refused_by_name():
    c = trl_golden.dpo_settings("['sigmoid', 'bco_pair', 'sft'], loss_weights [0.8, 0.2, 1.0], beta 0.3").preference
    assert (c.loss, c.beta) == ("sigmoid=0.8 bco=0.2 sft=1.0", 0.3)
    c = trl_golden.dpo_settings("ipo, f_divergence_type alpha_divergence, f_alpha_divergence_coef 0.3, ld_alpha 0.5")
    assert (c.preference.divergence, round(c.preference.alpha, 9), c.preference.length_weight) == ("alpha", 0.7, 0.5)
    assert (
        trl_golden.dpo_settings("hinge, f_divergence alpha_divergence, alpha 1.0").preference.divergence == "reverse_kl"
    )
    given = {"epsilon": 0.1, "cispo_epsilon_high": 5.0, "max_completion_length": 8}
    c = trl_golden.grpo_settings("dapo, sequence, beta 0.04, corrected False, epsilon_high 0.28, delta 4", given).policy
    assert (c.loss, c.aggregate, c.level, c.kl_weight, c.kl_estimator) == (
        "clip", "token", "sequence", 0.04, "k3_uncorrected")  # fmt: skip
    assert (c.clip, c.clip_high, c.dual_clip, c.length) == (0.1, 0.28, 4.0, 8)
    assert trl_golden.grpo_settings("cispo, token, beta 0.0, epsilon_high 1.1", given).policy.ratio_cap == 1.1
    for name, why in (
        ("wpo", "'wpo'"),
        ("wpo", "known are sigmoid, .*, nca_pair, bco_pair"),
        ("sigmoid, use_weighting True", "'use_weighting' is not compared: known are beta, label_smoothing"),
        ("sigmoid, beta x", "beta 'x'"),
        ("sigmoid+sigmoid", "give each loss once"),
        ("", "give each loss once"),
        ("sigmoid+sft, loss_weights 1", "2 losses have 1 weights"),
        ("sigmoid+sft, loss_weights one+two", "are no numbers"),
    ):
        with pytest.raises(UserError, match=why):
            trl_golden.dpo_settings(name)
    for name, why in (("vespo, token", "'vespo'"), ("grpo, token, top_entropy_quantile 0.2", "'top_entropy_quantile'"),
                      ("grpo, word", "'word'"), ("grpo+sapo, token", "'grpo.sapo' is not compared: known are grpo, sapo"),
                      ("grpo, token, corrected maybe", "corrected 'maybe' cannot be read: give True")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            trl_golden.grpo_settings(name, given)
    c = trl_golden.grpo_settings("grpo, token, delta 1.05, epsilon_high None", given)
    assert "cuts tokens of a positive advantage" in trl_golden.reason("grpo", c, {"weights": np.ones((2, 3))})


def test_a_file_of_another_form_is_refused_in_a_line(tmp_path, monkeypatch):
    file = tmp_path / "golden.json"
    for golden, batch, told in (
        ("{", "{}", "golden.json cannot be read"),
        ("[]", "{}", "is no JSON object"),
        ('{"dpo": {}}', None, "batch.json cannot be read"),
        ('{"dpo": {}}', "{}", "has no dpo_rows"),
        ('{"grpo": {"grpo, token": {"loss": 1}}}', '{"grpo": {}}', "give numbers for loss and grad_norm"),
        ('{"versions": {}}', "{}", "policy"),  # the models
    ):
        file.write_text(golden)
        file.with_name("batch.json").write_text(batch) if batch else file.with_name("batch.json").unlink(
            missing_ok=True
        )
        monkeypatch.setattr("sys.argv", ["trl_golden.py", "--golden", str(file)])
        with pytest.raises(SystemExit, match=told):
            trl_golden.main()


def test_what_tools_wrote_between_sampled_tokens_is_read_but_not_trained():
    given = {
        "prompt_ids": [[0, 5], [6, 7]], "prompt_mask": [[0, 1], [1, 1]], "completion_ids": [[8, 9, 10], [11, 12, 0]],
        "completion_mask": [[1, 1, 1], [1, 1, 0]], "tool_mask": [[1, 0, 1], [1, 1, 1]], "advantages": [1.0, -1.0],
        "old_log_probs": [[-1, -2, -3], [-4, -5, -6]], "reference_log_probs": [[-1, -2, -3], [-4, -5, -6]],
    }  # fmt: skip
    batch = trl_golden.rollouts(given)
    assert batch["targets"][0, :3].tolist() == [8, 9, 10]
    for row, old in ((0, [-1, -3]), (1, [-4, -5])):
        assert batch["old"][row][batch["weights"][row] > 0].tolist() == old
    np.testing.assert_array_equal(batch["advantages"].sum(axis=1), [3, -2])
    with pytest.raises(UserError, match="tool_mask"):
        trl_golden.rollouts(given | {"completion_mask": [[1, 0, 1], [1, 1, 0]]})


def test_rows_are_read_from_lines_and_lists_and_what_is_no_row_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"question": 1, "sql": null}\n\n{"question": 2, "sql": "x"}\n', encoding="utf-8-sig"
    )
    assert [row["question"] for row in common.read_rows(tmp_path / "a.jsonl", "question", "sql")] == [1, 2]
    (tmp_path / "a.json").write_text('[{"id": 1}, {"id": 2}]')
    assert len(common.read_rows(tmp_path / "a.json", "id")) == 2
    for name, text, message in (("b.json", "[]", "no rows"), ("b.json", "{}", "no rows"), ("b.json", '[{"id": 1}, 2]', "row 2"),
                                ("b.jsonl", '{"x": 1}', "row 1, has no id"), ("b.jsonl", "{", "cannot be read")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit, match=message):
            common.read_rows(tmp_path / name, "id")


def test_prompts_of_other_files_of_the_form_are_read(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,label\nHow?,Unsafe\n", encoding="utf-8-sig")
    assert [(case["label"], case["kind"]) for case in safety.read(tmp_path / "x.csv")] == [("unsafe", "")]
    (tmp_path / "x.csv").write_text("prompt,label\nHow?,maybe\n")
    with pytest.raises(SystemExit, match="row 1: it needs a prompt, and as label safe or unsafe"):
        safety.read(tmp_path / "x.csv")


def test_tasks_with_unknown_tools_other_facts_and_no_criteria_are_judged():
    payments = {"id": "u", "payment_methods": {}, "reservations": []}
    flights = {"F1": {"origin": "A", "destination": "B", "dates": {"2024-05-20": {"status": "landed"}}}}
    data = {"flights": flights, "users": {"u": payments}, "reservations": {}}
    gift = {"name": "send_certificate", "arguments": {"user_id": "u", "amount": 5}}

    def task(*actions, **more):
        criteria = {"actions": actions, "communicate_info": [1000]}
        return {"id": 7, "user_scenario": {"instructions": "Help."}, "evaluation_criteria": criteria} | more

    status = {"name": "get_flight_status", "arguments": {"flight_number": "F1", "date": "2024-05-20"}}
    tasks = [
        task(status, gift),
        task({"name": "fly", "arguments": {}}),
        task(*[gift] * 4),
        task(evaluation_criteria=None),
    ]
    replays = [airline.replay(data, one) for one in tasks]
    assert [len(errors) for _, errors in replays] == [0, 1, 1, 0]
    assert "there is no such tool" in replays[1][1][0] and "no more than 3 new certificates" in replays[2][1][0]
    tries = [airline.scripted(data, one, airline.referring(one)) for one in (tasks[0], tasks[3])]
    found = airline.judged([tasks[0], tasks[3]], [replays[0][0], replays[3][0]], tries)
    assert found["success"]["value"] == 1 and airline.goal_of(tasks[0]) == "Help."


@pytest.mark.parametrize("file", ablations.SHELF, ids=lambda file: file.stem)
def test_the_results_of_an_ablation_stand_in_its_docstring_and_in_the_table(file):
    arm = {"flops": 2.0, "states": {"done": 3}, "low": None, "high": None, "p_holm": None}
    study = {"control": "control", "arms": {
        "control": {**arm, "mean": 0.0, "value": 1.95},
        "worse": {**arm, "mean": 0.045, "low": 0.03, "high": 0.06, "p_holm": 0.01, "flops": 3.0},
        "null": {**arm, "mean": -0.01, "low": -0.03, "high": 0.01, "p_holm": 0.4},
        "failed": {**arm, "mean": None, "states": {"failed": 3}},
    }}  # fmt: skip
    once = ablations.with_results(file.read_text(), file.stem, study)
    assert ablations.with_results(once, file.stem, study) == once
    assert f"llmjax sweep --config configs/ablations/{file.name}" in once and "Not run yet" not in once
    for row in (
        "worse   +.045 (+.030 to +.060) *\n",
        "null    -.010 (-.030 to +.010)\n",
        "failed  no figure: 3 failed\n",
    ):
        assert f"    {row}" in once
    assert once.partition('"""\n\n')[2] == file.read_text().partition('"""\n\n')[2]  # the code stays
    table = ablations.table({file.stem: study})
    assert "| | worse | +.045 (+.030 to +.060) * | x 1.50 |" in table and f"`{file.stem}`" not in table
