"""Names of files and folders of a training step, and their order."""

from pathlib import Path

import pytest

from flow.runtime import step_names


@pytest.mark.parametrize("tail", ["", ".png", ".safetensors", ".ema_500.safetensors"])
def test_a_name_and_its_parts(tail):
    path = Path("run") / step_names.name_of(1234, tail)
    assert path.name == f"step_00001234{tail}" and step_names.parse(path) == (1234, tail)
    assert step_names.step_of(path) == 1234


@pytest.mark.parametrize("name", ["step_123", "step_0000123x", "tmp.step_00000001", "step_00000001_2"])
def test_other_names(name):
    assert step_names.parse(Path(name)) is None
    with pytest.raises(ValueError, match="is not named after a step"):
        step_names.step_of(Path(name))


def test_order_is_that_of_the_steps(tmp_path):
    for step in (100_000_000, 5, 99_999_999, 20):
        (tmp_path / step_names.name_of(step, ".png")).touch()
    (tmp_path / step_names.name_of(7)).mkdir()
    (tmp_path / "step_last.png").touch()
    assert list(step_names.by_step(tmp_path, ".png")) == [5, 20, 99_999_999, 100_000_000]
    assert step_names.by_step(tmp_path) == {7: tmp_path / "step_00000007"}
    assert step_names.by_step(tmp_path / "nowhere") == {}
