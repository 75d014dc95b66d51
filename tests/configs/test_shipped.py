"""The files of configs/: the network, loss, times, coupling and preview of each fit together; those of accelerate load."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config import config_args
from conftest import REPOSITORY

import datasets
import models
from configs import loading, schema
from configs.vae import VaeConfig
from flow import couplings
from flow.sampling.conditions import preview_settings
from flow.sampling.settings import validate
from flow.sampling.snapshot import flow_model
from flow.source import GaussianSource
from flow.training.checks import check_conditioning, check_loss
from flow.training.flow_task import build_loss
from models import autoencoder

SHAPES = {  # of samples by the first words of a file name; those of pairs, latents and folders lie in files
    "mnist_latent": (4, 16, 16), "celebahq": (4, 32, 32), "photos64": (3, 64, 64), "toy": (2,),
    **{name: datasets.SHAPES[name] for name in ("digits", "mnist", "cifar10")},
}  # fmt: skip
TRAININGS = [path.stem for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "\nmodel:" in path.read_text("utf-8")]
NAMES = tuple("0123456789")


def test_there_are_trainings():
    assert len(TRAININGS) >= 30


@pytest.mark.parametrize("name", TRAININGS)
def test_training_fits_together(name):
    config = loading.load(REPOSITORY / f"configs/{name}.yaml")
    shape = next(shape for words, shape in SHAPES.items() if name.startswith(words))
    assert datasets.expected_shape(config.data.name, config.data.args) in (None, shape)
    schema.set_auto_classes(config, NAMES)
    with torch.device("meta"):
        net = models.build(config.model.name, shape, config.model.args)
    model = flow_model(net, shape, config)
    labels = None if shape == (2,) else torch.arange(len(NAMES))
    check_conditioning(SimpleNamespace(labels=labels, class_names=NAMES), net)
    check_loss(config, build_loss(config), net, SimpleNamespace(state_times=(0.0, 0.5, 1.0)))
    validate(preview_settings(config, net, NAMES), model)
    gaussian = {"name": "gaussian", "args": {}}
    pairs = SimpleNamespace(source=gaussian, source_fingerprint=None, seed=0, generated=0, noise=None)
    couplings.build(
        config.flow.coupling, GaussianSource(), config.seed, shape, config.train.batch_size, config.flow.coupling_args, pairs
    )


def test_autoencoder_is_built():
    pytest.importorskip("diffusers")
    config = loading.load(REPOSITORY / "configs/mnist_vae.yaml", kind=VaeConfig).autoencoder
    with torch.device("meta"):
        vae = autoencoder.build_vae(1, config.channels, config.latent_channels, config.blocks)
    assert vae.latent_shape((1, 64, 64)) == SHAPES["mnist_latent"]


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [
        ("one_cpu", 1, 1),
        ("one_gpu", 1, 1),
        ("two_cpu_processes", 2, 1),
        ("eight_gpus", 8, 1),
        ("fsdp", 8, 1),
        ("two_machines", 16, 2),
    ],
)
def test_launcher_leaves_the_training_to_us(name, processes, machines):
    """Processes are the launcher's; precision, compilation and micro-batches (a key that it refuses) are ours."""
    config = config_args.load_config_from_file(str(REPOSITORY / f"configs/accelerate/{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision is None and not config.dynamo_config
