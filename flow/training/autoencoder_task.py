"""Training of an autoencoder for latent flows."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import loading
from configs.errors import UserError
from configs.vae import VaeConfig
from datasets import DataSpec, reading
from datasets.images import to_float
from flow.losses import Batch
from flow.losses.autoencoder import AutoencoderLoss
from flow.runtime import commands, distributed, files
from flow.runtime.errors import error_context
from flow.sampling import images
from flow.sampling.generate import shard
from flow.sampling.header import PowerAverage
from flow.sampling.images import psnr, to_uint8
from flow.training.checks import check_encodable, check_same_data
from flow.training.data_loader import TrainingLoader, loss_noise, packing_notes
from flow.training.trainer import Callback, Trainer
from models import autoencoder
from models.autoencoder import VAE

PREVIEW_BATCH = 16
LPIPS_SIDE = 16  # pixels; its network halves the sides four times


class AutoencoderTask:
    """Trains or fine-tunes an AutoencoderKL; implements `flow.training.task.Task`."""

    unit = "images"
    script = "-m scripts.train_vae"

    def __init__(self, config: VaeConfig, accelerator: Accelerator):
        """Raises UserError for whatever in the configuration, the data and the network does not fit together."""
        self.config, self.accelerator = config, accelerator
        if accelerator.is_fsdp2:
            raise UserError("train_vae: an autoencoder is not sharded; start it with one of the other configs/accelerate")
        if config.data.autoencoder:
            raise UserError(f"data.autoencoder={config.data.autoencoder}: is for flows; train.init_from names one to fine-tune")
        with error_context("data"):
            self.data = distributed.main_process_first(accelerator, DataSpec.of(config.data).build)
        self.sample_digest = check_same_data(accelerator, config.data.name, self.data)
        check_encodable(config.data.name, self.data)
        torch.manual_seed(config.seed)  # of the initial weights
        self.net = self.build_network()
        with error_context("data"):
            self.latent_shape = self.net.latent_shape(self.data.image_shape)
        loss = config.autoencoder
        lpips = None
        if loss.lpips_weight:  # whose weights may be downloaded
            if (side := min(self.data.image_shape[1:])) < LPIPS_SIDE:
                raise UserError(
                    f"autoencoder.lpips_weight={loss.lpips_weight}: LPIPS takes images of at least {LPIPS_SIDE} pixels a side, "
                    f"these have {side}"
                )
            lpips = distributed.main_process_first(accelerator, lambda: load_lpips(accelerator.device))
        self.loss = AutoencoderLoss(self.latent_shape, loss.distance, loss.kl_weight, loss.lpips_weight, lpips)
        self.loader = TrainingLoader.of(accelerator, config, self.data)

    def build_network(self) -> VAE:
        """An untrained autoencoder, or the one to fine-tune."""
        config = self.config.autoencoder
        if not self.config.train.init_from:
            with error_context("autoencoder"):
                return autoencoder.build_vae(self.data.image_shape[0], config.channels, config.latent_channels, config.blocks)
        with error_context("train.init_from"):
            source = self.config.train.init_from
            vae = distributed.main_process_first(self.accelerator, lambda: autoencoder.load(source))
            return vae.requires_grad_(True)

    def batches(self, first_step: int) -> Iterator[list[Batch]]:
        seed, device = self.config.seed, self.accelerator.device
        for micro_batches in self.loader.steps(first_step, self.config.train.steps):
            for i, batch in enumerate(micro_batches):
                micro_batches[i] = replace(batch, y=None, noise=loss_noise(self.loss.draws, seed, batch, device))
            yield micro_batches

    def write_snapshot(
        self, path: Path, weights: dict[str, Tensor], step: int, half_life_images: int,
        power_average: PowerAverage | None = None,
    ) -> None:  # fmt: skip
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        save_file(contiguous, path, metadata={"config": loading.dump(self.config)})

    def read_snapshot(self, path: Path) -> dict[str, Tensor]:
        return load_file(path)

    def preview(self, net: nn.Module, step: int) -> tuple[Tensor | None, dict[str, float]]:
        """Originals above their reconstructions, and the mean PSNR in dB."""
        assert isinstance(net, VAE)
        net.eval()
        n = min(self.config.preview_images, len(self.data))
        parts = []
        for batch in shard(self.accelerator, range(n), PREVIEW_BATCH):
            with error_context("data"):
                real = reading.read(self.data, [k * len(self.data) // n for k in batch])
            with self.accelerator.autocast():
                mean, _ = net.encode(to_float(real.to(self.accelerator.device)))
                parts.append((batch.start, torch.stack([real, to_uint8(net.decode(mean)).cpu()])))
        gathered = distributed.gather_in_order(self.accelerator, parts)
        if gathered is None:
            return None, {}
        real, recon = torch.cat(gathered, dim=1)
        return images.side_by_side_grid(real, recon), {"PSNR (dB)": psnr(real, recon).mean().item()}

    def summary(self) -> list[str]:
        size = sum(p.numel() for p in self.net.parameters()) / 1e6
        shapes = ("x".join(map(str, shape)) for shape in (self.data.image_shape, self.latent_shape))
        return [
            "autoencoder: {:.2f} M parameters, images of {} to latents of {}".format(size, *shapes),
            *(f"note: {note}" for note in [*self.data.notes, *packing_notes(self.data)]),
            f"data: {self.config.data.name}, {len(self.data):,} images",
        ]

    def next_command(self, folder: Path) -> str:
        save_dir = files.free_folder(folder.with_name(f"{folder.name}_latents"))
        encode: list[str | Path] = ["-m", "scripts.cache_latents", "--vae", folder / "autoencoder", "--save_dir", save_dir]
        return f"encode images with: {commands.command(*encode, *commands.data_overrides(self.config.data))}"


class ExportAutoencoder(Callback):
    """Writes autoencoder/ in the format of diffusers, with the averaged weights, after each checkpoint."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if not trainer.accelerator.is_main_process:
            return
        folder = trainer.folder / "autoencoder"
        temporary = folder.with_name(f"{files.TEMPORARY}{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        with files.naming(folder):
            with trainer.ema.average_parameters() as vae:
                assert isinstance(vae, VAE)
                vae.save(temporary)
            files.replace_dir(temporary, folder)


def load_lpips(device: torch.device):
    """The perceptual distance [b] of images in [-1, 1] (Zhang et al. 2018, arXiv:1801.03924). Raises UserError."""
    try:
        import lpips

        net = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except ImportError:
        raise UserError("autoencoder.lpips_weight: needs the package lpips: pip install lpips") from None
    except Exception as error:  # it downloads its weights
        raise UserError(f"autoencoder.lpips_weight: the weights of lpips could not be loaded ({error})") from None
    return lambda x, recon: net(x.expand(-1, 3, -1, -1), recon.expand(-1, 3, -1, -1)).flatten()
