"""Train a flow matching model: `accelerate-launch train.py -c configs/mnist.yaml`."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

import datasets
import models
from configs import schema
from configs.schema import Config, UserError
from datasets import captions
from flow import couplings, time_samplers
from flow.guidance import drop_labels
from flow.losses import distances, objective
from flow.noise import generator
from flow.runtime import cli, distributed, files, subprocesses
from flow.runtime.errors import cli_main, error_context
from flow.runtime.shutdown import StopSignal
from flow.sampling import snapshot
from flow.sampling.settings import SamplerSettings, validate
from flow.training import checkpoint
from flow.training.data_loader import MicroBatch, TrainingLoader, prefetch
from flow.training.ema import Ema
from flow.training.logging import Logger, LossStatistics, Throughput
from flow.training.optimizer import GuardedOptimizer, build_optimizer, lr_at, set_options
from flow.training.preview import write_preview
from flow.training.run_dir import checkpoint_to_resume, locked_run, resume_command, write_run_files

EXAMPLES = """\
  accelerate-launch train.py -c configs/mnist.yaml
  accelerate-launch train.py -c configs/mnist.yaml -e runs/wide model.args.width=96 train.steps=20_000
  accelerate-launch train.py -c configs/mnist.yaml -r latest
  accelerate-launch --multi_gpu --num_processes 8 train.py -c configs/cifar10.yaml -mp bf16"""

NAMED_CLASSES = 10  # in the log


def parse_args():
    return cli.parse_training(cli.add_resume_flag(cli.Parser(__doc__, EXAMPLES)))


def main() -> None:
    args = parse_args()
    with locked_run(args, Config) as (run_dir, cfg, accelerator):
        train(args, run_dir, cfg, accelerator)


def train(args, run_dir: Path, cfg: Config, accelerator: Accelerator) -> None:
    """Train to the last step, or until a signal."""
    device = accelerator.device

    # Data, network and optimizer: whatever is wrong with the configuration comes out here, before a folder is made.
    with error_context("data"):
        data = distributed.main_process_first(accelerator, lambda: datasets.build(cfg.data.name, cfg.data.root, cfg.data.args))
    class_names = data.class_names if data.labels is not None else ()
    if not args.resume:
        schema.set_auto_classes(cfg, class_names)
    torch.manual_seed(cfg.seed)  # of the initial weights
    with error_context("model"):
        net = models.build(cfg.model.name, data.image_shape, cfg.model.args)
    check_conditions(cfg, data, net)
    with error_context("flow.time_sampler"):
        time_law = time_samplers.build(cfg.flow.time_sampler, **cfg.flow.time_sampler_args)
    with error_context("flow.distance"):
        distance = distances.distance(cfg.flow.distance, **cfg.flow.distance_args)
    with error_context("flow.objective"):
        training = objective(cfg.flow.objective, distance, cfg.flow.prediction, **cfg.flow.objective_args)
    flow_model = snapshot.flow_model(net, cfg, data.codec, models.codec)
    path = flow_model.path
    with error_context("preview"):
        preview_settings = SamplerSettings(
            cfg.preview.sampling_method, cfg.preview.sampling_steps, cfg.preview.guidance_scale, cfg.preview.seed,
            prompts=tuple(captions.plain(name) for name in data.class_names) if net.max_prompt_bytes else None,
        )  # fmt: skip
        validate(preview_settings, net)
    loader = TrainingLoader.of(accelerator, cfg, data)
    pairing = pairing_of(cfg, data, loader.micro)
    checkpoints = run_dir / "checkpoints"
    trained_names = class_names if net.null is not None else ()  # which the snapshots carry
    found = checkpoint_to_resume(accelerator, args.resume, run_dir, cfg) if args.resume else None
    if cfg.train.init_from and not found:
        with error_context("train.init_from"):
            before = snapshot.load(cfg.train.init_from)
            snapshot.check_codec(f"train.init_from={cfg.train.init_from}", before, data.codec)
            before.load_into(net)
    distributed.prepare_model(net, accelerator, cfg.train.compile)
    optimizer = build_optimizer(net, cfg.optimizer, device)
    model, optimizer = accelerator.prepare(net, optimizer)
    half_lives = schema.half_lives(cfg)
    ema = Ema(net, half_lives, cfg.ema.warmup_ratio, lambda: models.build(cfg.model.name, data.image_shape, cfg.model.args))
    meter = LossStatistics(device, cfg.train.nonfinite_grad)
    skips = GuardedOptimizer(accelerator, cfg.train.nonfinite_grad)

    # Where to begin: at step 0 in a new folder, or where a checkpoint left off.
    step, updates = 0, 0  # updates: steps less those that were skipped, see flow/training/optimizer.py
    newest = "there is no checkpoint yet"
    if found:
        with checkpoint.reading(found):
            state = checkpoint.load(accelerator, found)
            step, updates = state["step"], state["updates"]
            meter.load_state(accelerator, state["meter"])
        if step > cfg.train.steps:
            raise UserError(f"train.steps={cfg.train.steps}: the run is at step {step} already")
        set_options(optimizer, cfg.optimizer)
        for i, name in enumerate(checkpoint.ema_files(half_lives)):
            average = snapshot.load(found / name)
            snapshot.check_codec(f"data.args={cfg.data.args}", average, data.codec)
            ema.load_state_dict(i, average.weights)
        newest = f"the newest checkpoint is {found}"
    if accelerator.is_main_process:
        write_run_files(run_dir, cfg, accelerator)
        if found:  # a kill may have come between the checkpoint and its snapshot
            checkpoint.link_ema_snapshots(found, run_dir / "snapshots", step, half_lives, cfg.train.keep_snapshots)
    accelerator.wait_for_everyone()
    tracker = Logger(accelerator, run_dir, cfg, first_step=step)
    introduce(tracker, accelerator, cfg, data, net, step)

    conditional = net.null is not None  # else nothing is lost by coupling noise with images across classes

    def inputs(first: int) -> Iterator[list[tuple[torch.Tensor, ...]]]:
        """What the network is trained on in each step from `first`: (x0, x1, t, y) of each micro-batch."""
        for step, micro_batches in enumerate(loader.steps(first, cfg.train.steps), start=first):
            t_global = time_samplers.sample(time_law, cfg.seed, step, cfg.train.batch_size)  # [B]
            made = []
            for batch in micro_batches:
                x0 = pairing.noise(batch.positions, batch.indices, batch.x1, batch.y if conditional else None)
                y = condition(net, data, batch, cfg.seed)
                if y is not None:
                    y = drop_labels(y, batch.rows, cfg.seed, step, cfg.train.batch_size, cfg.flow.label_dropout, net.null)
                made.append(
                    (distributed.to_device(x0, device), batch.x1, distributed.to_device(t_global[batch.rows], device), y)
                )
            yield made

    def save_checkpoint() -> str:
        meter.check(accelerator, newest)
        state = {"updates": updates, "meter": meter.state(accelerator)}
        averages = [ema.state_dict(i) for i in range(len(half_lives))]  # gathered by all processes where they are sharded
        if bad := next(filter(None, map(checkpoint.first_nonfinite, averages)), None):
            raise UserError(f"the average of {bad} is not finite after step {step}; {newest}. A smaller optimizer.lr may help")

        def write_averages(folder: Path) -> None:
            for i, name in enumerate(checkpoint.ema_files(half_lives)):
                snapshot.save(folder / name, averages[i], cfg, data.image_shape, step, half_lives[i], data.codec, trained_names)

        saved = checkpoint.save(accelerator, checkpoints, step, state, write_averages)
        if accelerator.is_main_process:
            checkpoint.link_ema_snapshots(saved, run_dir / "snapshots", step, half_lives, cfg.train.keep_snapshots)
            checkpoint.prune(checkpoints, cfg.train.keep_checkpoints)
        return f"the newest checkpoint is {saved}"

    done = step == cfg.train.steps
    model.train()
    throughput = Throughput(cfg.train.batch_size, step)
    with StopSignal() as stop, distributed.progress(accelerator, cfg.train.steps, "training", initial=step) as bar:
        # A GPU computes one step while the CPU draws the noise of the next; cores that compute have no time to spare.
        for micro_batches in prefetch(inputs(step), 0 if device.type == "cpu" else 1):
            torch.manual_seed(int(generator("dropout", cfg.seed, step, accelerator.process_index).integers(2**63)))
            for group in optimizer.param_groups:
                group["lr"] = lr_at(cfg.optimizer, updates, cfg.train.steps)
            for number, (x0, x1, t, y) in enumerate(micro_batches, start=1):
                with accelerator.no_sync(model) if number < cfg.train.gradient_accumulation_steps else nullcontext():
                    losses = training.loss(model, path, x0, x1, t, y)  # [b]
                    accelerator.backward(losses.mean() / cfg.train.gradient_accumulation_steps)
                meter.add(step + 1, losses, training.times(t))
            step += 1
            if skips.update(model, optimizer, cfg.optimizer.clip_grad_norm, meter, step):
                updates += 1
                ema.update(cfg.train.batch_size, step * cfg.train.batch_size)
            bar.update()

            done = step == cfg.train.steps
            if step % cfg.train.log_every_steps == 0 or done:
                meter.check(accelerator, newest)
                skips.check(step, newest)
                metrics = meter.read(accelerator) | {"skipped_steps": step - updates} | skips.metrics()
                metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
                metrics["images"] = step * cfg.train.batch_size
                metrics["images_per_second"] = throughput.read(step)
                tracker.log(step, metrics)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} images/s", refresh=False)
            stopping = distributed.any_process(accelerator, stop.received is not None)
            with throughput.paused():
                if done or stopping or (cfg.train.checkpoint_every_steps and step % cfg.train.checkpoint_every_steps == 0):
                    newest = save_checkpoint()
                if done or (cfg.train.sample_every_steps and step % cfg.train.sample_every_steps == 0):
                    with ema.applied() as averaged:
                        write_preview(
                            accelerator, replace(flow_model, net=averaged), data.image_shape, preview_settings,
                            cfg.preview.n_samples, run_dir / "samples" / f"step_{step:08d}.png", data.class_names,
                        )  # fmt: skip
                    model.train()
            if stopping:
                break
    accelerator.end_training()
    if not done:
        stop.leave(tracker.say, f"{newest}; go on with: {resume_command(run_dir, config=cfg)}")
    tracker.say(f"finished step {step}; sample with: {sample_command(run_dir, net, data)}")


def sample_command(run_dir: Path, net: torch.nn.Module, data) -> str:
    """What to type to sample from the run, into a folder that is free."""
    prompts = ["--prompts", captions.plain(data.class_names[0])] if net.max_prompt_bytes else []
    folder = files.free_folder(Path("samples") / run_dir.name)
    return subprocesses.command("sample.py", "--weights", run_dir, "--n_samples", "64", "--save_dir", folder, *prompts)


def condition(net: torch.nn.Module, data, batch: MicroBatch, seed: int) -> torch.Tensor | None:
    """What the network is told about the images of a batch: labels [b], tokens [b, L] of captions, or nothing.

    The caption of position p in the stream of training images is a function of (seed, p).
    """
    if net.max_prompt_bytes:
        labels = data.labels[batch.indices].tolist()  # from the CPU: those of the batch would have to be waited for
        drawn = zip(labels, batch.positions, strict=True)
        prompts = [captions.draw(data.class_names[label], generator("caption", seed, p)) for label, p in drawn]
        return net.encode(prompts).to(batch.x1.device, non_blocking=True)
    return batch.y if net.num_classes is not None else None


def pairing_of(cfg: Config, data, rows: int) -> couplings.Coupling:
    """The coupling of noise and images that flow.coupling names."""
    if (cfg.flow.coupling == "paired") != (cfg.data.name == "pairs"):
        raise UserError(f"flow.coupling={cfg.flow.coupling}: paired and data.name=pairs need each other")
    with error_context("flow.coupling_args"):
        if cfg.flow.coupling != "paired":
            return couplings.build(cfg.flow.coupling, cfg.seed, data.image_shape, rows, cfg.flow.coupling_args)
        if cfg.data.horizontal_flip:
            raise UserError(
                "data.horizontal_flip=true: a mirrored image is not what its noise was turned into; set it to false"
            )
        return couplings.PairedCoupling(data.seed, data.generated, data.noise, data.image_shape, **cfg.flow.coupling_args)


def check_conditions(cfg: Config, data, net: torch.nn.Module) -> None:
    """A network with labels or prompts needs a data set that has classes, and room for each class or caption."""
    if net.max_prompt_bytes:
        if not data.class_names or data.labels is None:
            raise UserError(
                f"model.args.max_prompt_bytes={net.max_prompt_bytes}: the data set has no classes to make captions of"
            )
        longest = captions.longest(data.class_names)
        if longest > net.max_prompt_bytes:
            raise UserError(
                f"model.args.max_prompt_bytes={net.max_prompt_bytes}: captions have up to {longest} bytes; use {longest}"
            )
    num_classes = net.num_classes
    if num_classes is None:
        return
    if data.labels is None:
        raise UserError(f"model.args.num_classes={num_classes}: the data set has no labels; use null")
    needed = int(data.labels.max()) + 1
    if num_classes < needed:
        raise UserError(f"model.args.num_classes={num_classes}: the data set has {needed} classes; use {needed}")


def introduce(tracker: Logger, accelerator: Accelerator, cfg: Config, data, net: torch.nn.Module, step: int) -> None:
    """Say what is about to be trained, with the numbers that are mistaken most often."""
    size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
    what = "points"
    if len(data.image_shape) == 3:
        what = ("latents" if data.codec else "images") + " of {}x{}x{}".format(*data.image_shape)
    processes, micro = accelerator.num_processes, cfg.train.gradient_accumulation_steps
    share = cfg.train.batch_size // (processes * micro)
    epochs = cfg.train.steps * cfg.train.batch_size / len(data)
    told = "no labels"
    if net.num_classes is not None:
        shown = data.class_names[:NAMED_CLASSES]
        told = f"{net.num_classes} classes ({', '.join(shown)}{', ...' * (len(data.class_names) > len(shown))})"
    elif data.labels is not None and "num_classes" not in cfg.model.args:
        told += f" (model.args.num_classes=auto would use the {len(data.class_names)} classes of the data set)"
    told = f"prompts of at most {net.max_prompt_bytes} bytes" if net.max_prompt_bytes else told
    for note in getattr(data, "notes", []):
        tracker.say(f"note: {note}")
    tracker.say(f"data: {cfg.data.name}, {len(data):,} {what}; model: {cfg.model.name}, {size}, {told}")
    tracker.say(
        f"batch: {cfg.train.batch_size} images = {processes} process(es) x {micro} micro-batch(es) x {share}; "
        f"{cfg.train.steps:,} steps = {cfg.train.steps * cfg.train.batch_size:,} images = {epochs:.3g} epochs"
    )
    tracker.say(
        f"device: {accelerator.device.type}, precision {accelerator.mixed_precision}, {torch.get_num_threads()} thread(s); "
        f"folder: {tracker.run_dir}" + (f"; going on from step {step}" if step else "")
    )


if __name__ == "__main__":
    cli_main(main)
