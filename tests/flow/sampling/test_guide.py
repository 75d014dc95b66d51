"""Autoguidance and the interval of guidance: the same images from every entry, and guides that do not fit."""

import json

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

import models
from configs import loading
from configs.errors import UserError
from flow.model import FlowModel
from flow.path import LinearPath
from flow.sampling import guide, snapshot
from flow.sampling.generate import sample_batch
from flow.sampling.images import read_png
from flow.sampling.sampler import Sampler
from flow.sampling.settings import SamplerSettings

SHAPE = (1, 8, 8)


def network(seed: int, shape: tuple[int, ...] = SHAPE, **args) -> nn.Module:
    torch.manual_seed(seed)
    config = loading.load(None, TINY)
    net = models.build(config.model.name, shape, {**config.model.args, **args})
    for p in net.parameters():  # the last layer begins at 0
        nn.init.normal_(p, std=0.1)
    return net.eval()


def save(path, net: nn.Module, shape: tuple[int, ...] = SHAPE, names=(), *overrides: str):
    config = loading.load(None, [*TINY, "data.name=digits", "train.batch_size=32", *overrides])
    snapshot.save(path, net.state_dict(), config, shape, 7, 1000, class_names=names)
    return path


class Unconditional(nn.Module):
    """A network that sees no label."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.null_label = net, net.null

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None
        return self.net(x, t, torch.full((len(x),), self.null_label))


def test_guide_of_a_network_without_labels(recwarn):
    """Sampler takes a model that was given its guide in Python, and warns of nothing."""
    net, guide = (Unconditional(network(seed)) for seed in (0, 1))
    model = FlowModel(net, LinearPath(), SHAPE, guide=FlowModel(guide, LinearPath(), SHAPE), null_is_trained=False)
    sampler = Sampler(model, torch.device("cpu"))
    plain, guided = (sampler.trajectory(2, steps=2, guidance_scale=scale)[1] for scale in (1.0, 2.0))
    assert not torch.equal(plain, guided) and not recwarn.list


@pytest.mark.parametrize("method", ["heun", "ab2", "euler_maruyama"])
def test_unconditional_guide(method):
    net = network(0)
    plain = FlowModel(net, LinearPath(), SHAPE)
    guided = FlowModel(net, LinearPath(), SHAPE, guide=FlowModel(Unconditional(net), LinearPath(), SHAPE))
    settings = SamplerSettings(method, 4, 3.0)
    with torch.inference_mode():
        a, b = (sample_batch(model, range(6), settings, torch.device("cpu")) for model in (plain, guided))
        off = sample_batch(plain, range(6), SamplerSettings(method, 4), torch.device("cpu"))
    assert (a.x - b.x).abs().max() < 1e-4 < (a.x - off.x).abs().max()
    assert a.forwards == b.forwards == 2 * a.nfe


def test_same_images_from_command_and_sampler(tmp_path, here):
    names = tuple("0123456789")
    strong, weak = (save(tmp_path / f"{seed}.safetensors", network(seed), SHAPE, names) for seed in (0, 1))
    flags = ["--sampling_steps", "4", "--guidance_scale", "2", "--guidance_interval", "0.2", "0.8"]
    out = here(
        "sample", "--weights", strong, "--guide_weights", weak, "--n_samples", "5", "--save_dir", tmp_path / "out", *flags
    )
    # of four steps those at 0.25, 0.5 and 0.75 are guided; the hint repeats what the images were made with
    assert "NFE 4 (7 network calls)" in out
    assert f"--guidance_scale 2 --guidance_interval 0.2 0.8 --guide_weights {weak}" in out
    written = torch.stack([torch.from_numpy(read_png(tmp_path / "out" / "images" / f"{k:06d}.png")) for k in range(5)])
    sampler = Sampler.load(strong, "cpu", guide_weights=weak)
    images = sampler.sample(5, steps=4, guidance_scale=2, guidance_interval=(0.2, 0.8))
    assert torch.equal(images.permute(0, 2, 3, 1), written)
    assert not torch.equal(images, sampler.sample(5, steps=4, guidance_scale=2))
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["guide"].startswith("1@7 (")


def test_rows_of_guidance(tmp_path, here):
    strong, weak = (save(tmp_path / f"{seed}.safetensors", network(seed)) for seed in (0, 1))
    evaluate = ["evaluate", "--weights", strong, "--n_samples", "20", "--sampling_steps", "2", "--feature_extractor", "digits"]
    evaluate += ["--no_control", "--metrics", "accuracy", "--out", tmp_path / "table", "data.name=digits"]
    here(*evaluate, "--guidance_scale", "1", "2", "--guidance_interval", "0.5", "1")
    table = here(*evaluate, "--guidance_scale", "1", "2", "--guide_weights", weak)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| 0@7")]
    header = next(line for line in table.splitlines() if line.startswith("| weights"))
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    found = {(row["guidance_scale"], row["guidance_interval"], row["guide"].split(" ")[0], row["forwards"]) for row in rows}
    assert found == {("1.0", "", "", "2"), ("2.0", "0.5 to 1", "", "3"), ("2.0", "", "1@7", "4")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guide_weights", "OTHER"], "guide_weights: needs a guidance_scale other than 1"),
        (["--guidance_interval", "0.2", "0.8"], "guidance_interval: needs a guidance_scale other than 1"),
        (
            ["--guidance_scale", "2", "--guidance_interval", "0.8", "0.2"],
            "--guidance_interval 0.8 0.2: must be two times from 0",
        ),
        (["--guidance_scale", "2", "--guide_weights", "SIZE"], "is a model of images of (1, 16, 16), --weights of (1, 8, 8)"),
        (["--guidance_scale", "2", "--guide_weights", "CLASSES"], "was trained with other classes or prompts than --weights"),
        (["--guidance_scale", "2", "--guide_weights", "SOURCE"], "starts at digits, --weights at gaussian"),
        (["--guidance_scale", "2", "--guide_weights", "MAP"], "is a flow map, --weights a flow; give one of the same kind"),
    ],
)
def test_guides_that_do_not_fit(flags, message, error, tmp_path):
    large, attention = (1, 16, 16), "model.args.attention_resolutions=[8]"
    strong = save(tmp_path / "strong.safetensors", network(0))
    guides = {
        "OTHER": lambda path: save(path, network(1)),
        "SIZE": lambda path: save(path, network(1, large, attention_resolutions=[8]), large, (), attention),
        "CLASSES": lambda path: save(path, network(1, num_classes=3), SHAPE, (), "model.args.num_classes=3"),
        "SOURCE": lambda path: save(path, network(1), SHAPE, (), "flow.source.name=digits"),
        "MAP": lambda path: save(path, network(1, two_times=True), SHAPE, (), "model.args.two_times=true"),
    }
    flags = [guides[flag](tmp_path / "guide.safetensors") if flag in guides else flag for flag in flags]
    line = error("sample", "--weights", strong, "--n_samples", "2", "--save_dir", tmp_path / "out", *flags)
    assert message in line


def test_guide_from_another_part_of_the_source(tmp_path):
    source = "flow.source.name=digits"
    parts = [
        save(tmp_path / f"{split}.safetensors", network(0), SHAPE, (), source, f"flow.source.args.split={split}")
        for split in ("train", "test")
    ]
    snap = snapshot.load(parts[0])
    model = snap.model()
    assert guide.attach(model, snap, parts[0]) and model.guide
    with pytest.raises(UserError, match=r"starts at digits \{'split': 'test'\}, --weights at digits \{'split': 'train'\}"):
        guide.attach(model, snap, parts[1])
