"""Networks of others, which say nothing of labels and prompts, or too little."""

from conftest import TINY_RUN
from torch import nn

import models
from flow.model import FlowModel


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
