"""The shelf of ablations: every file loads, its arms are configs, and those of the default text share one control."""

from pathlib import Path

import pytest

from llmjax import config
from llmjax.sweep import design, study

SHELF = sorted((Path(__file__).parents[1] / "configs" / "ablations").glob("*.py"))


@pytest.mark.parametrize("file", SHELF, ids=lambda file: file.stem)
def test_every_ablation_is_a_study_of_valid_arms_with_its_control_in_the_folder_of_that_control(file, tmp_path):
    c = config.load(str(file))
    found = study.plan(tmp_path, c, design.read_design(config.sweep(str(file))))
    control = [trial.id for trial in found.trials if trial.arm == found.design.control]
    others = {trial.id for trial in found.trials} - set(control)
    assert len(others) == 3 * (len(found.design.arms) - 1) >= 6  # no arm is the control in other words
    shared = study.plan(tmp_path, config.ablation_run().lock(), design.Design({"control": {}}, seeds=(0, 1, 2)))
    own = "" if c.data.sources == ("stdlib",) else f"-{file.stem}"
    assert (control == [trial.id for trial in shared.trials]) == (not own)
    assert study.default_folder(c) == Path(f"runs/ablations{own}-study")
    assert f"llmjax sweep --config configs/ablations/{file.name}" in file.read_text()
