"""Networks of others, which say nothing of labels and prompts, or too little."""

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_RUN
from torch import nn

import models
from flow.model import FlowModel, set_defaults
from flow.runtime.errors import cli_main
from flow.training.output_checks import check_forward


class Plain(nn.Module):
    """A network that says nothing of labels and prompts."""

    def __init__(self, image_shape):
        super().__init__()
        self.layer = nn.Conv2d(image_shape[0], image_shape[0], 1)

    def forward(self, x, t, y=None):
        return self.layer(x)


def test_a_network_without_words_on_conditions(here, error, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    here("train", "-c", "configs/digits.yaml", *TINY_RUN, "model.name=plain", "-e", tmp_path / "run")
    ask = ["--weights", tmp_path / "run", "--n_samples", "2", "--sampling_steps", "1", "--save_dir", tmp_path / "out"]
    assert "was trained without labels" in error("sample", *ask, "--labels", "1")
    assert "2 images" in here("sample", *ask)
    net = FlowModel(Plain((1, 8, 8)), None, (1, 8, 8)).net
    assert (net.num_classes, net.max_prompt_bytes, net.null) == (None, None, None)
    said = here("doctor", "-c", "configs/digits.yaml", *TINY_RUN, "model.name=plain", "model.args.data_std=0.5", "-e",
                tmp_path / "none", "preview.guidance_scale=1")  # fmt: skip
    assert "network: plain, 0.00 M parameters" in said, said


def test_resuming_with_another_shape_names_the_weight(here, error, monkeypatch, tmp_path):
    """The code of a network has changed since the checkpoint."""

    class Wider(Plain):
        def __init__(self, image_shape):
            super().__init__(image_shape)
            self.layer = nn.Conv2d(image_shape[0], image_shape[0], 3, padding=1)

    monkeypatch.setitem(models.MODELS, "plain", Plain)
    here("train", "-c", "configs/digits.yaml", *TINY_RUN, "model.name=plain", "train.steps=1", "-e", tmp_path / "run")
    monkeypatch.setitem(models.MODELS, "plain", Wider)
    line = error("train", "-e", tmp_path / "run", "-r", "latest", "train.steps=2")
    assert "does not fit this configuration" in line and "size mismatch for layer.weight" in line


def test_a_network_without_labels_on_classes(here, error, monkeypatch, packed_digits, tmp_path):
    """Data with classes ask for as many; null trains without them."""
    monkeypatch.setitem(models.MODELS, "plain", Plain)
    train = ["train", *TINY_RUN, "model.name=plain", "data.name=packed", f"data.args.path={packed_digits / 'train'}"]
    train += ["train.steps=1", "-e", tmp_path / "run"]
    assert "model: plain takes no labels; model.args.num_classes=null trains it without them" in error(*train)
    assert "no labels" in here(*train, "model.args.num_classes=null")


def test_a_network_that_reads_prompts_needs_an_encoder(error, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "plain", type("Reader", (Plain,), {"max_prompt_bytes": 8}))
    line = error("train", "-c", "configs/digits.yaml", *TINY_RUN, "model.name=plain", "-e", tmp_path / "run")
    assert "Reader has max_prompt_bytes: it needs encode(prompts), and null" in line


class Labelled(Plain):
    """A network with labels that forgets the null label."""

    def __init__(self, image_shape, num_classes=10):
        super().__init__(image_shape)
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes, 1)

    def forward(self, x, t, y=None):
        return self.layer(x) + self.embedding(y)[:, :, None, None]


class Thin(Plain):
    def forward(self, x, t, y=None):
        return super().forward(x, t)[..., :1]


class Tuple(Plain):
    def forward(self, x, t, y=None):
        return super().forward(x, t), None


class Forgetful(Plain):
    def forward(self, x):
        return super().forward(x, None)


WRONG = [
    (Thin, "returns [2, 1, 8, 1] for x [2, 1, 8, 8]; must return a tensor of the shape of x"),
    (Tuple, "returns a tuple for x [2, 1, 8, 8]; must return a tensor of the shape of x"),
    (Labelled, "fails on y = 10, the null label (IndexError: index out of range in self)"),
    (Forgetful, "fails on x [2, 1, 8, 8], t [2], y = None (TypeError: Forgetful.forward() takes 2 positional arguments"),
]


@pytest.mark.parametrize(("network", "message"), WRONG)
def test_wrong_networks_are_refused(main_of, error, capsys, monkeypatch, tmp_path, network, message):
    """A network that fails, or returns no tensor of the shape of x, is named before anything is written."""
    monkeypatch.setitem(models.MODELS, "mine", network)
    arguments = ["-c", "configs/digits.yaml", *TINY_RUN, "model.name=mine", "model.args={}", "-e", tmp_path / "run"]
    assert error("train", *arguments).startswith(f"error: model.name=mine: {message}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", *arguments))
    assert f"fail  network: model.name=mine: {message}" in capsys.readouterr().out


def test_a_scaled_network_of_another_shape(error, monkeypatch, tmp_path):
    """The preconditioning would broadcast it."""
    monkeypatch.setitem(models.MODELS, "mine", Thin)
    args = ["model.name=mine", "model.args={data_std: 0.5}"]
    line = error("train", "-c", "configs/digits.yaml", *TINY_RUN, *args, "-e", tmp_path / "run")
    assert f"model.name=mine: {WRONG[0][1]}" in line


class Random(Plain):
    """A network with dropout, a batch norm and noise of its own."""

    def __init__(self, image_shape):
        super().__init__(image_shape)
        self.norm, self.dropout = nn.BatchNorm2d(image_shape[0]), nn.Dropout(0.5).eval()

    def forward(self, x, t, y=None):
        return self.dropout(self.norm(self.layer(x))) + torch.randn_like(x)


def test_the_trial_call_leaves_no_trace():
    """Weights, statistics, modes and the random state are as before."""
    net = Random((1, 8, 8))
    set_defaults(net)
    before, state = {key: value.clone() for key, value in net.state_dict().items()}, torch.get_rng_state()
    check_forward("mine", net, (1, 8, 8), Accelerator(cpu=True))
    after = net.state_dict()
    assert all(after[key].equal(before[key]) for key in before) and torch.get_rng_state().equal(state)
    assert net.training and net.norm.training and not net.dropout.training
