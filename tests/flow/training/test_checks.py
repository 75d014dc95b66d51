"""The task of a flow: what does not fit together is refused."""

from types import SimpleNamespace

import pytest

from configs import loading
from configs.errors import UserError
from flow import losses, time_samplers
from flow.losses import LOSSES, Losses
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


WRONG = [
    (lambda out: Losses(out.per_sample.mean()), "per_sample has shape []; must be [32], a number a sample"),
    (lambda out: Losses(out.per_sample[:, None].expand(-1, 2)), "per_sample has shape [32, 2]; must be [32]"),
    (lambda out: out.per_sample, "returns a torch.Tensor; must return Losses(per_sample, t, terms)"),
    (lambda out: Losses(out.per_sample, out.t, {"weight": 0.5}), "terms['weight'] is a float; must be a tensor [32]"),
    (lambda out: Losses(out.per_sample, 0.5), "t is a float; must be a tensor [32]"),
    (lambda out: Losses(out.per_sample.detach(), out.t), "per_sample has no gradient; compute it from the output of net"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_values_of_a_loss_are_named(error, monkeypatch, tmp_path, change, message):
    """In the first micro-batch of a training."""
    flow_matching = LOSSES["flow_matching"]
    loss = type("Mine", (flow_matching,), {"__call__": lambda self, *inputs: change(flow_matching.__call__(self, *inputs))})
    loss.name = "mine"
    monkeypatch.setitem(LOSSES, "mine", loss)
    line = error("train", *POINTS, "loss.name=mine", "train.batch_size=32", "train.steps=2", "-e", tmp_path / "run")
    assert line.startswith(f"error: loss mine: {message}")
