"""Train or fine-tune an autoencoder for latent flows: `python -m scripts.train_vae -c configs/mnist_vae.yaml`.

The loss is that of flow/losses/autoencoder.py. The run directory is that of train.py; autoencoder/ in it holds the averaged
weights in the format of diffusers, for scripts.cache_latents and everything else that reads AutoencoderKL.
"""

from configs.vae import VaeConfig
from flow.runtime import cli, flags
from flow.runtime.errors import cli_main
from flow.training.autoencoder_task import AutoencoderTask, ExportAutoencoder
from flow.training.run_dir import checkpoint_to_resume, locked_run
from flow.training.trainer import Trainer

EXAMPLES = """\
  python -m scripts.train_vae -c configs/mnist_vae.yaml
  python -m scripts.train_vae -c configs/mnist_vae.yaml -r latest
  accelerate-launch --multi_gpu --num_processes 8 -m scripts.train_vae -e runs/celebahq_vae data.name=folder \\
      data.args='{path: data/celebahq, size: 256}' train.init_from=stabilityai/sd-vae-ft-mse optimizer.lr=1e-5 -mp auto"""


def parse_args():
    return flags.parse_training(flags.add_resume_flag(cli.Parser(__doc__, EXAMPLES, kind=VaeConfig, keys="configs/vae.py")))


def main() -> None:
    args = parse_args()
    with locked_run(args, VaeConfig) as (folder, config, accelerator):
        task = AutoencoderTask(config, accelerator)
        resume_path = checkpoint_to_resume(args.resume, folder, config) if args.resume else None
        Trainer(task, config, folder, accelerator, resume_path, callbacks=[ExportAutoencoder()]).fit()
        accelerator.end_training()


if __name__ == "__main__":
    cli_main(main)
