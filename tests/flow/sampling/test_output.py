"""The folder of sample.py belongs to one flow: what of the configuration changes its images is compared."""

import json

import pytest

CHANGED = "flow.prediction=data"


@pytest.mark.parametrize("overrides", [[], ["flow.prediction=noise"], [CHANGED, "flow.path=vp"]])
def test_flow_belongs_to_a_folder(here, error, tiny_run, tmp_path, overrides):
    """The same one goes on in it, whatever the other overrides are; a folder of an older version, too."""
    out = tmp_path / "out"
    sample = ["sample", "--weights", tiny_run, "--n_samples", 2, "--sampling_steps", 1, "--save_dir", out]
    here(*sample, CHANGED, "flow.label_dropout=0.3")
    recorded = json.loads((out / "sampling.json").read_text())
    assert recorded["flow"]["prediction"] == "data" and "name" in recorded["model"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "holds images of another run (flow " in error(*sample, *overrides)
    assert "none of them new" in here(*sample, CHANGED)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    older = {name: value for name, value in recorded.items() if name not in ("flow", "model")}
    (out / "sampling.json").write_text(json.dumps(older))
    assert "none of them new" in here(*sample, CHANGED)


def test_network_belongs_to_a_folder(here, error, tiny_run, tmp_path):
    """Its name and arguments: another value that the same weights fit is refused, too."""
    out = tmp_path / "out"
    sample = ["sample", "--weights", tiny_run, "--n_samples", 2, "--sampling_steps", 1, "--save_dir", out]
    here(*sample)
    line = error(*sample, "model.args.dropout=0.3")
    assert "holds images of another run (model " in line and "'dropout': 0.3" in line
    assert "none of them new" in here(*sample)


def test_class_names_are_in_the_folder(here, tiny_run, tmp_path):
    """For who reads its labels; a folder of an older version goes on without."""
    sample = ["sample", "--weights", tiny_run, "--n_samples", 2, "--sampling_steps", 1, "--save_dir", tmp_path / "out"]
    here(*sample)
    recorded = json.loads((tmp_path / "out/sampling.json").read_text())
    assert len(recorded["class_names"]) == recorded["num_classes"] == 10
    (tmp_path / "out/sampling.json").write_text(json.dumps({k: v for k, v in recorded.items() if k != "class_names"}))
    assert "none of them new" in here(*sample)
