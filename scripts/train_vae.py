"""Train or fine-tune an autoencoder for latent flows: `python -m scripts.train_vae -c configs/mnist_vae.yaml`.

The loss of an image x with the posterior N(mean, std^2) is |x - decode(mean + std e)| (l1, or its square), mean over
pixels, + kl_weight KL(N(mean, std^2) | N(0, I)), summed over the latent, + lpips_weight LPIPS (Rombach et al. 2022,
arXiv:2112.10752, appendix G, without its discriminator). The run folder is that of train.py; autoencoder/ in it holds the
averaged weights in the format of diffusers, for scripts.cache_latents and everyone else who reads AutoencoderKL.
"""

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

import datasets
from configs import schema
from configs.schema import UserError
from configs.vae import VaeConfig
from flow.evaluation.metrics import psnr
from flow.noise import gaussian_noise, generator
from flow.runtime import cli, distributed, files, subprocesses
from flow.runtime.errors import cli_main, error_context
from flow.runtime.shutdown import StopSignal
from flow.sampling import images, snapshot
from flow.sampling.generate import shard
from flow.sampling.images import to_float, to_uint8
from flow.training import checkpoint
from flow.training.data_loader import TrainingLoader
from flow.training.ema import Ema
from flow.training.logging import Logger, LossStatistics, Throughput
from flow.training.optimizer import GuardedOptimizer, build_optimizer, lr_at, set_options
from flow.training.run_dir import checkpoint_to_resume, locked_run, resume_command, write_run_files
from models import autoencoder
from models.autoencoder import VAE

EXAMPLES = """\
  python -m scripts.train_vae -c configs/mnist_vae.yaml
  python -m scripts.train_vae -c configs/mnist_vae.yaml -r latest
  accelerate-launch --multi_gpu --num_processes 8 -m scripts.train_vae -e runs/celebahq_vae data.name=folder \\
      data.args='{path: data/celebahq, size: 256}' train.init_from=stabilityai/sd-vae-ft-mse optimizer.lr=1e-5 -mp bf16"""
PREVIEW_BATCH = 16


def parse_args():
    return cli.parse_training(cli.add_resume_flag(cli.Parser(__doc__, EXAMPLES, kind=VaeConfig, keys="configs/vae.py")))


def main() -> None:
    args = parse_args()
    with locked_run(args, VaeConfig) as (run_dir, cfg, accelerator):
        train(args, run_dir, cfg, accelerator)


def train(args, run_dir: Path, cfg: VaeConfig, accelerator: Accelerator) -> None:
    """Train to the last step, or until a signal."""
    if accelerator.is_fsdp2:
        raise UserError("train_vae: an autoencoder is not sharded; start it with one of the other configs/accelerate")
    device = accelerator.device
    with error_context("data"):
        data = distributed.main_process_first(accelerator, lambda: datasets.build(cfg.data.name, cfg.data.root, cfg.data.args))
        if data.codec or len(data.image_shape) != 3:
            raise ValueError(f"data.name={cfg.data.name}: holds no images")
    torch.manual_seed(cfg.seed)  # of the initial weights
    vae = build_autoencoder(accelerator, cfg, data.image_shape)
    with error_context("data"):
        latent_shape = vae.latent_shape(data.image_shape)
    perceptual = lpips(device) if cfg.autoencoder.lpips_weight else None
    loader = TrainingLoader.of(accelerator, cfg, data)
    checkpoints = run_dir / "checkpoints"
    found = checkpoint_to_resume(accelerator, args.resume, run_dir, cfg) if args.resume else None
    distributed.prepare_model(vae, accelerator, cfg.train.compile)
    optimizer = build_optimizer(vae, cfg.optimizer, device)
    model, optimizer = accelerator.prepare(vae, optimizer)
    ema = Ema(vae, schema.half_lives(cfg)[:1], cfg.ema.warmup_ratio)
    meter = LossStatistics(device, cfg.train.nonfinite_grad)
    skips = GuardedOptimizer(accelerator, cfg.train.nonfinite_grad)

    step, updates = 0, 0  # updates: steps less those that were skipped, see flow/training/optimizer.py
    newest = "there is no checkpoint yet"
    if found:
        with checkpoint.reading(found):
            state = checkpoint.load(accelerator, found)
            step, updates = state["step"], state["updates"]
            meter.load_state(accelerator, state["meter"])
            ema.load_state_dict(0, load_file(found / snapshot.EMA_FILE))
        if step > cfg.train.steps:
            raise UserError(f"train.steps={cfg.train.steps}: the run is at step {step} already")
        set_options(optimizer, cfg.optimizer)
        newest = f"the newest checkpoint is {found}"
    if accelerator.is_main_process:
        write_run_files(run_dir, cfg, accelerator)
    accelerator.wait_for_everyone()
    tracker = Logger(accelerator, run_dir, cfg, first_step=step)
    size = f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M"
    tracker.say("autoencoder: {}, images of {}x{}x{} to latents of {}x{}x{}".format(size, *data.image_shape, *latent_shape))
    for note in getattr(data, "notes", []):
        tracker.say(f"note: {note}")
    tracker.say(f"data: {cfg.data.name}, {len(data):,} images; batch {cfg.train.batch_size}, {cfg.train.steps:,} steps")

    def save_checkpoint() -> str:
        meter.check(accelerator, newest)
        state = {"updates": updates, "meter": meter.state(accelerator)}

        def write_average(folder: Path) -> None:
            average = {name: value.contiguous() for name, value in ema.state_dict(0).items()}
            save_file(average, folder / snapshot.EMA_FILE, metadata={"config": schema.dump(cfg)})

        saved = checkpoint.save(accelerator, checkpoints, step, state, write_average)
        if accelerator.is_main_process:
            checkpoint.prune(checkpoints, cfg.train.keep_checkpoints)
            with ema.applied():
                publish(vae, run_dir / "autoencoder")
        return f"the newest checkpoint is {saved}"

    done = step == cfg.train.steps
    model.train()
    parts = torch.zeros(4, device=device, dtype=meter.sums.dtype)  # sums of distance, KL, LPIPS; number of images
    throughput = Throughput(cfg.train.batch_size, step)
    with StopSignal() as stop, distributed.progress(accelerator, cfg.train.steps, "training", initial=step) as bar:
        for micro_batches in loader.steps(step, cfg.train.steps):
            torch.manual_seed(int(generator("dropout", cfg.seed, step, accelerator.process_index).integers(2**63)))
            for group in optimizer.param_groups:
                group["lr"] = lr_at(cfg.optimizer, updates, cfg.train.steps)
            for number, batch in enumerate(micro_batches, start=1):
                noise = gaussian_noise("posterior", cfg.seed, batch.positions, latent_shape).to(device, non_blocking=True)
                with accelerator.no_sync(model) if number < cfg.train.gradient_accumulation_steps else nullcontext():
                    made, mean, std = model(batch.x1, noise)
                    distance, kl = distances(cfg.autoencoder.distance, batch.x1, made), divergence(mean, std)  # [b]
                    feeling = perceptual(batch.x1, made) if perceptual else torch.zeros_like(kl)
                    losses = distance + cfg.autoencoder.kl_weight * kl + cfg.autoencoder.lpips_weight * feeling
                    accelerator.backward(losses.mean() / cfg.train.gradient_accumulation_steps)
                meter.add(step + 1, losses, torch.zeros_like(losses))
                terms = (distance, kl, feeling, torch.ones_like(kl))
                parts += torch.stack([value.detach().sum() for value in terms]).to(parts.dtype)
            step += 1
            if skips.update(model, optimizer, cfg.optimizer.clip_grad_norm, meter, step):
                updates += 1
                ema.update(cfg.train.batch_size, step * cfg.train.batch_size)
            bar.update()

            done = step == cfg.train.steps
            if step % cfg.train.log_every_steps == 0 or done:
                meter.check(accelerator, newest)
                skips.check(step, newest)
                read = meter.read(accelerator)
                *sums, n = accelerator.reduce(parts, "sum").tolist()
                parts.zero_()
                metrics = {
                    "loss": read["loss"],
                    "grad_norm": read["grad_norm"],
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "skipped_steps": step - updates,
                }
                metrics |= dict(zip((cfg.autoencoder.distance, "kl", "lpips"), (s / n for s in sums), strict=True))
                metrics["images"] = step * cfg.train.batch_size
                metrics["images_per_second"] = throughput.read(step)
                tracker.log(step, metrics)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} images/s", refresh=False)
            stopping = distributed.any_process(accelerator, stop.received is not None)
            with throughput.paused():
                if done or stopping or (cfg.train.checkpoint_every_steps and step % cfg.train.checkpoint_every_steps == 0):
                    newest = save_checkpoint()
                if done or (cfg.train.sample_every_steps and step % cfg.train.sample_every_steps == 0):
                    with ema.applied():
                        decibels = preview(
                            accelerator, vae, data, cfg.preview_images, run_dir / "samples" / f"step_{step:08d}.png"
                        )
                    if decibels is not None:
                        tracker.say(f"step {step}: PSNR {decibels:.2f} dB of {cfg.preview_images} training images")
                    model.train()
            if stopping:
                break
    accelerator.end_training()
    if not done:
        stop.leave(tracker.say, f"{newest}; go on with: {resume_command(run_dir, '-m scripts.train_vae', cfg)}")
    save_dir = files.free_folder(run_dir.with_name(f"{run_dir.name}_latents"))
    encode = ["-m", "scripts.cache_latents", "--vae", run_dir / "autoencoder", "--save_dir", save_dir]
    tracker.say(
        f"finished step {step}; encode images with: {subprocesses.command(*encode, *subprocesses.data_overrides(cfg.data))}"
    )


def build_autoencoder(accelerator: Accelerator, cfg: VaeConfig, image_shape: tuple[int, int, int]) -> VAE:
    """An untrained autoencoder, or the one to fine-tune."""
    asked = cfg.autoencoder
    if not cfg.train.init_from:
        with error_context("autoencoder"):
            return autoencoder.build_vae(image_shape[0], asked.channels, asked.latent_channels, asked.blocks)
    with error_context("train.init_from"):
        return distributed.main_process_first(accelerator, lambda: autoencoder.load(cfg.train.init_from)).requires_grad_(True)


def distances(name: str, x: Tensor, made: Tensor) -> Tensor:
    """[b]: mean over the pixels of |x - made|, or of its square."""
    difference = (x - made).flatten(1)
    return (difference.abs() if name == "l1" else difference.square()).mean(1)


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(0, I)) [b], in nats, summed over the latent (Kingma & Welling 2014, arXiv:1312.6114, app. B)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)


def lpips(device: torch.device):
    """The perceptual distance of images in [-1, 1], [b] (Zhang et al. 2018, arXiv:1801.03924)."""
    try:
        import lpips as package

        net = package.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except ImportError:
        raise UserError("autoencoder.lpips_weight: needs the package lpips: pip install lpips") from None
    except Exception as error:  # it downloads its weights
        raise UserError(f"autoencoder.lpips_weight: the weights of lpips could not be loaded ({error})") from None
    return lambda x, made: net(x.expand(-1, 3, -1, -1), made.expand(-1, 3, -1, -1)).flatten()


def publish(vae: VAE, folder: Path) -> None:
    """Write the autoencoder as a folder that diffusers reads, in the place of the one before."""
    temporary = folder.with_name(f"{files.TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    vae.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    files.atomic_rename_dir(temporary, folder)


def preview(accelerator: Accelerator, vae: VAE, data, n: int, path: Path) -> float | None:
    """Originals above their reconstructions as one PNG; the mean PSNR in dB, on the main process."""
    vae.eval()
    n, mine = min(n, len(data)), []
    for batch in shard(accelerator, range(n), PREVIEW_BATCH):
        real = torch.stack([data[k * len(data) // n][0] for k in batch])
        with accelerator.autocast():
            made = to_uint8(vae.decode(vae.encode(to_float(real.to(accelerator.device)))[0])).cpu()
        mine.append((batch.start, real, made))
    parts = distributed.gather_to_main(accelerator, mine)
    if parts is None:
        return None
    ordered = sorted((item for part in parts for item in part), key=lambda item: item[0])
    real, made = (torch.cat([item[i] for item in ordered]) for i in (1, 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write_png(path, images.side_by_side_grid(real, made))
    return psnr(real, made).mean().item()


if __name__ == "__main__":
    cli_main(main)
