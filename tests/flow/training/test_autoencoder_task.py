"""Autoencoders: data that are refused, and an export that fails."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

import datasets
from configs.errors import UserError
from configs.schema import DataConfig
from configs.vae import VaeConfig
from datasets.images import Images
from flow.training.autoencoder_task import AutoencoderTask, ExportAutoencoder
from models.autoencoder import VAE


def test_images_that_are_not_uint8_are_refused(monkeypatch):
    """Those of pairs are float16, in [-1, 1] already."""
    images = torch.zeros(4, 1, 8, 8, dtype=torch.float16)
    monkeypatch.setitem(datasets.DATASETS, "pairs", lambda root: Images(images, None, ()))
    with pytest.raises(UserError, match=r"data\.name=pairs: holds images as float16, .*; use the data set that they were made"):
        AutoencoderTask(VaeConfig(data=DataConfig(name="pairs")), Accelerator(cpu=True))


def test_an_export_that_fails_names_its_folder(tmp_path):
    """safetensors has an error of its own for a full disk."""

    class Unwritable(VAE):
        def __init__(self):
            nn.Module.__init__(self)

        def save(self, folder):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    @contextmanager
    def average_parameters():
        yield Unwritable()

    (tmp_path / "autoencoder").mkdir()  # of the checkpoint before
    ema, main = SimpleNamespace(average_parameters=average_parameters), SimpleNamespace(is_main_process=True)
    trainer = SimpleNamespace(accelerator=main, folder=tmp_path, ema=ema)
    with pytest.raises(OSError, match=f"{tmp_path / 'autoencoder'}: .*No space left on device"):
        ExportAutoencoder().on_checkpoint(trainer, tmp_path)
    assert (tmp_path / "autoencoder").is_dir()
