"""Settings of a sampler: what tables call them, and the notes about guidance."""

from dataclasses import replace
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
    flow_map = FlowModel(SimpleNamespace(two_times=True, num_classes=3), LinearPath(), (1, 8, 8))
    note = guidance_note(SamplerSettings(method, steps, 2.0), flow_map)
    assert (note is not None) == noted and (not noted or "guides mean velocities of long steps" in note)
    assert guidance_note(SamplerSettings(method, steps), flow_map) is None


def test_note_about_an_untrained_null_label():
    """Autoguidance does not ask for it."""
    model = FlowModel(SimpleNamespace(num_classes=3), LinearPath(), (1, 8, 8), null_is_trained=False)
    assert "the null label is not trained (flow.label_dropout=0)" in guidance_note(SamplerSettings(guidance_scale=2.0), model)
    assert guidance_note(SamplerSettings(guidance_scale=2.0, guide="weaker"), model) is None
    assert guidance_note(SamplerSettings(), model) is None


def test_rows_of_other_solver_options_are_other_rows():
    """A stochastic row must not be taken for one of another noise scale, nor an optimized grid for the uniform one."""
    plain = SamplerSettings("euler_maruyama", 5)
    assert plain.title == "euler_maruyama"
    assert replace(plain, options=(("noise_scale", 0.5),)).title == "euler_maruyama, noise_scale=0.5"
    assert SamplerSettings("ab2", 5, time_grid="optimized", times=(0.0, 1.0)).title == "ab2, optimized grid"
