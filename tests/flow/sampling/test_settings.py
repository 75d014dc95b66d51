"""Settings of a sampler: the notes about guidance."""

from types import SimpleNamespace

import pytest

from flow.model import FlowModel
from flow.path import LinearPath
from flow.sampling.settings import SamplerSettings, guidance_note


@pytest.mark.parametrize(
    ("method", "steps", "noted"),
    [("euler", 9, True), ("euler", 10, False), ("consistency", 10, True), ("heun", 2, False)],
)
def test_note_about_long_steps_of_a_flow_map(method, steps, noted):
    """`consistency` jumps to the data in each of its steps."""
    flow_map = FlowModel(SimpleNamespace(two_times=True, num_classes=3), LinearPath())
    note = guidance_note(SamplerSettings(method, steps, 2.0), flow_map)
    assert (note is not None) == noted and (not noted or "guides mean velocities of long steps" in note)
    assert guidance_note(SamplerSettings(method, steps), flow_map) is None
