"""Scripts of benchmarks/ import what the package has; their results name the command and the machine."""

import importlib
import json
import re
import sys
from pathlib import Path

import common
import pytest

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
