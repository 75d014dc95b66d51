"""What a training says at its start about its data and settings."""

import json
import re

import pytest
from conftest import TINY_TRAIN


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["flow.label_dropout=0", "preview.guidance_scale=2"], "note: preview.guidance_scale=2: the null label is not trained"),
        (["flow.coupling=ot", "flow.coupling_args.block=8"], "note: flow.coupling=ot: matches samples within blocks of 8 of "),
        (
            [
                "data.args.split=train", "evaluate.loss_every_steps=4", "evaluate.loss_samples=10", "loss.name=mean_flow",
                "loss.args.guidance_scale=1.5", "model.args.two_times=true",
            ],
            "note: evaluate.loss_every_steps: the validation loss compares with the velocity without guidance",
        ),
    ],
)  # fmt: skip
def test_notes_about_settings(here, tmp_path, overrides, note):
    printed = here("train", *TINY_TRAIN, "train.steps=1", *overrides, "-e", tmp_path / "run")
    assert printed.count(note) == 1


def test_time_sampler_without_effect_is_noted(here, tiny_run, tmp_path):
    """Pairs are distilled at no drawn times; the default sampler goes without a note."""
    here("make_pairs", "--weights", tiny_run, "--n_pairs", 32, "--sampling_steps", 1, "--save_dir", tmp_path / "pairs")
    pairs = ["data.name=pairs", f"data.args={{path: {tmp_path / 'pairs'}}}", "flow.coupling=paired", "loss.name=distillation"]
    for sampler, count in (("uniform", 0), ("logit_normal", 1)):
        given = [*TINY_TRAIN, *pairs, "train.steps=1", f"flow.time_sampler={sampler}", "-e", tmp_path / sampler]
        note = f"note: flow.time_sampler={sampler}: has no effect on loss.name=distillation"
        assert here("train", *given).count(note) == count


def test_classes_without_images_are_left_out(here, tmp_path):
    """By previews, by pairs and in the suggested command; nothing has trained them."""
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    printed = here("train", *TINY_TRAIN, "train.steps=1", "model.args.num_classes=12", "preview.n_samples=12", "-e", run)
    assert "note: model.args.num_classes=12: only 10 classes have images (0, 1, " in printed
    assert re.search(r"sample with: .* --labels 0 1 2 3 4 5 6 7 8 9$", printed, re.M)
    here("make_pairs", "--weights", run, "--n_pairs", 24, "--sampling_steps", 1, "--save_dir", pairs)
    assert json.loads((pairs / "manifest.json").read_text())["labels"] == list(range(10))
