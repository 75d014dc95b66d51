"""The keys of scripts/train_vae.py: data, optimizer, averages and training are those of configs/schema.py."""

from dataclasses import dataclass, field

from configs.keys import limited
from configs.schema import DataConfig, EmaConfig, OptimizerConfig, TrainConfig, TrainerConfig


@dataclass
class AutoencoderConfig:
    channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])  # by level; unused with train.init_from
    latent_channels: int = 4  # of a latent; unused with train.init_from
    blocks: int = 2  # residual blocks of each resolution; unused with train.init_from
    distance: str = limited("l1", choices=("l1", "mse"))  # l1 | mse, between images in [-1, 1], mean over pixels
    kl_weight: float = limited(1e-6, min=0)  # of KL(posterior | N(0, I)), summed over a latent
    lpips_weight: float = limited(0.0, min=0)  # of the perceptual distance; needs the package lpips


@dataclass
class VaeConfig(TrainerConfig):
    seed: int = limited(0, min=0)  # of all that is random in training
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)  # init_from: folder or hub id to fine-tune
    preview_images: int = limited(32, min=2)  # of the grid of originals and reconstructions, and of the PSNR
