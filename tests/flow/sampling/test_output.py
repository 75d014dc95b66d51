"""The folder of sample.py belongs to one flow: what of the configuration changes its images is compared."""

import json

import pytest

CHANGED = "flow.prediction=data"


@pytest.mark.parametrize(
    ("overrides", "key"), [([], "flow"), (["flow.prediction=noise"], "flow"), ([CHANGED, "flow.path=vp"], "flow")]
)
def test_flow_belongs_to_a_folder(here, error, tiny_run, tmp_path, overrides, key):
    """The same one goes on in it, whatever the other overrides are; a folder of an older version, too."""
    out = tmp_path / "out"
    sample = ["sample", "--weights", tiny_run, "--n_samples", 2, "--sampling_steps", 1, "--save_dir", out]
    here(*sample, CHANGED, "preview.seed=3")
    recorded = json.loads((out / "sampling.json").read_text())
    assert recorded["flow"]["prediction"] == "data" and "name" in recorded["model"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert f"holds images of another run ({key} " in error(*sample, *overrides)
    assert "none of them new" in here(*sample, CHANGED)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    older = {name: value for name, value in recorded.items() if name not in ("flow", "model")}
    (out / "sampling.json").write_text(json.dumps(older))
    assert "none of them new" in here(*sample, CHANGED)
