"""The task of a flow: what does not fit together is refused."""

from types import SimpleNamespace

import pytest

from configs import loading
from configs.errors import UserError
from flow import losses, time_samplers
from flow.path import LinearPath
from flow.training.checks import check_loss

POINTS = ["data.name=toys", "data.args={name: mixture}", "model.name=mlp", "model.args={width: 16}", "train.log_with=[]"]


@pytest.mark.parametrize("prompt_bytes", [None, 32])
def test_guidance_needs_a_trained_null_label(prompt_bytes):
    net = SimpleNamespace(two_times=True, null=3, max_prompt_bytes=prompt_bytes)

    def check(label_dropout: float, **args: float) -> None:
        config = loading.load(None, ["loss.name=mean_flow", f"flow.label_dropout={label_dropout}"])
        loss = losses.build("mean_flow", LinearPath(), "velocity", time_samplers.build("uniform"), args)
        check_loss(config, loss, net, None)

    null = "prompt" if prompt_bytes else "label"
    needed = rf"loss\.args\.guidance_scale=1\.2 needs a null {null} that is trained; set flow\.label_dropout above 0"
    message = rf"flow\.label_dropout=0: {needed}"
    with pytest.raises(UserError, match=message):
        check(0, guidance_scale=1.2)
    check(0.1, guidance_scale=1.2)
    check(0, guidance_mix=0.5)  # of the velocity with the label alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flow.path=vp"], "was trained with flow.path=linear, here it is vp; set flow.path=linear"),
        (["flow.prediction=data"], "was trained with flow.prediction=velocity, here it is data; set flow.prediction=velocity"),
    ],
)
def test_weights_of_another_flow_are_refused(error, points_flow, tmp_path, overrides, message):
    weights = points_flow("mixture", 1)
    line = error("train", *POINTS, *overrides, f"train.init_from={weights}", "-e", tmp_path / "run")
    assert f"train.init_from={weights}: {message}" in line and not (tmp_path / "run").exists()
