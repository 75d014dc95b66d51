"""The jobs of scripts/benchmark/, each in a process of its own: `python -m scripts.benchmark.jobs JSON`.

The Trainer, `generate` and a row of the evaluation, with a timer in their callbacks and around their networks; beside them
the plain loop, the cost of the network in FLOPs and the ceilings of the machine.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from configs import loading, schema
from datasets import DataSpec
from flow.model import set_defaults
from flow.runtime import distributed, files
from flow.runtime.errors import cli_main, error_context
from flow.sampling import snapshot
from flow.sampling.generate import generate, shard
from flow.sampling.images import ImageWriter
from flow.sampling.settings import SamplerSettings
from flow.training import cuda_graph
from flow.training.flow_task import FlowTask, build_loss
from flow.training.trainer import Callback, Trainer
from scripts.benchmark import baseline
from scripts.benchmark.timer import TimedNetwork, Timer
from scripts.benchmark.trial import name_of


class Enough(Exception):
    """Ends a training that has been measured."""


def main() -> None:
    """Do the job and write its result."""
    job = json.loads(sys.argv[1])
    kind = job["kind"] + "_" + job["variant"] if "variant" in job else job["kind"]
    result = {
        "cost": cost_job, "ceilings": ceilings_job, "train_project": train_job, "train_eager": plain_train_job,
        "sample_project": sample_job, "sample_eager": plain_sample_job, "evaluate_project": evaluate_job,
    }[kind](job)  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def measured(job: dict, timer: Timer, images_per_lap: int, forwards: int = 1) -> dict:
    """The result of a job of steps or batches."""
    return {
        "laps": timer.laps, "seconds": dict(timer.seconds), "images_per_lap": images_per_lap, "forwards": forwards,
        "peak_memory_gib": distributed.peak_bytes() / 2**30, "seconds_to_first_step": timer.first_lap - job["started"],
    }  # fmt: skip


def cost_job(job: dict) -> dict:
    """Parameters of the network, floating-point operations of one image (training: a forward and a backward pass), and the
    passes of its loss."""
    cfg, data = load_config_and_data(job)
    shape = data.image_shape
    with torch.device("meta"):
        net = models.build(cfg.model.name, shape, cfg.model.args)
        set_defaults(net)
        x, t, y = torch.empty(1, *shape), torch.empty(1), condition(net, 1)
        with FlopCounterMode(display=False) as forward:
            out = net(x, t, y)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    passes = forward.get_total_flops(), backward.get_total_flops()
    size, loss = sum(p.numel() for p in net.parameters()), build_loss(cfg)
    return {"parameters": size, "forward": passes[0], "training": sum(passes), "passes": loss.passes}


def ceilings_job(job: dict) -> dict:
    """FLOP/s of the fastest of several large matrix products and of several 3x3 convolutions, by precision."""
    distributed.set_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = 4 if device.type == "cuda" else 1
    result: dict = {"device": device.type}
    for precision in job["precisions"]:
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

        def best(work: float, function, dtype=dtype) -> float:
            rates = []
            for _ in range(8):
                start = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates.append(work / (time.perf_counter() - start))
            return max(rates)

        products, convolutions = [], []
        for n in (1024 * large, 2048 * large):
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            products.append(best(2 * n**3, lambda a=a, b=b: a @ b))
        for channels, side in ((128, 32), (256, 16), (512, 16)):
            x = torch.randn(16 * large, channels, side, side, device=device).to(dtype)
            w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                x, w = x.to(memory_format=layout), w.to(memory_format=layout)
                work = 2 * 9 * len(x) * channels**2 * side**2
                convolutions.append(best(work, lambda x=x, w=w: F.conv2d(x, w, padding=1)))
        result[name_of(precision)] = {"matmul": max(products), "convolution": max(convolutions)}
    return result


def load_config_and_data(job: dict):
    """The configuration and its data set."""
    cfg = loading.load(job["config"], job["overrides"])
    with error_context("data"):
        data = DataSpec.of(cfg.data).build()
    schema.set_auto_classes(cfg, data.class_names if data.labels is not None else ())
    return cfg, data


def condition(net, n: int):
    if net.max_prompt_bytes:
        return torch.ones(n, net.max_prompt_bytes, dtype=torch.long)
    return torch.zeros(n, dtype=torch.long) if net.num_classes is not None else None


def train_job(job: dict) -> dict:
    """The Trainer itself; data (with noise and labels), forward (network and loss), backward, optimizer (with clipping) and ema
    are sections, "other" is the rest of the loop. In a CUDA graph forward, backward and optimizer are one section."""
    timer = Timer()

    class Laps(Callback):
        def on_step(self, trainer: Trainer) -> None:
            timer.lap()
            if trainer.step == warmup:
                timer.restart()
            if trainer.step == warmup + job["steps"]:
                raise Enough

    config = loading.load(job["config"], [
        *job["overrides"], f"train.mixed_precision={job['precision']}", f"train.compile={job['compile']}", "train.log_with=[]",
        "train.sample_every_steps=0", "train.checkpoint_every_steps=0",
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        accelerator = distributed.build_training_accelerator(config.train, Path(scratch))
        task = FlowTask(config, accelerator)
        warmup = job["warmup"]
        if cuda_graph.obstacle(accelerator, config.train, task.loss) is None:
            warmup += cuda_graph.EAGER_STEPS + 1  # the capture is the step after them
        config.train.steps = warmup + job["steps"]
        run = Path(scratch) / "run"
        # the border of a section waits for the GPU, which costs speed
        timed = {"timed": timer.section} if job.get("sections", True) else {}
        trainer = Trainer(task, config, run, accelerator, callbacks=[Laps()], **timed)
        with contextlib.suppress(Enough):
            trainer.fit()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return measured(job, timer, config.train.batch_size)


def plain_train_job(job: dict) -> dict:
    cfg = loading.load(job["config"], job["overrides"])
    net, images, labels = baseline.load_network_and_data(cfg)
    timer = Timer()
    steps = baseline.train(net, images, labels, cfg.train.batch_size, cfg.optimizer.lr)
    for _ in timer.timed(steps, job["warmup"], job["steps"]):
        pass
    timer.seconds.clear()
    return measured(job, timer, cfg.train.batch_size)


def blank_snapshot(job: dict) -> Path:
    """Untrained weights of the configuration, as a file."""
    name = f"blank-{hashlib.sha256(repr(job['overrides']).encode()).hexdigest()[:16]}"
    path = Path(job["scratch"]) / name / "snapshots" / "step_00000000.safetensors"  # a run folder: its autoencoder is used
    if not path.is_file():
        cfg, data = load_config_and_data(job)
        net = models.build(cfg.model.name, data.image_shape, cfg.model.args)
        snapshot.save(path, net.state_dict(), cfg, data.image_shape, 0, 1, data.codec)
        files.write_text(path.parent.parent / "config.yaml", loading.dump(cfg))
    return path


def timed_flow(job: dict):
    """(timer, accelerator, snapshot, model, sampler settings) of untrained weights; the network is the section "network"."""
    timer = Timer()
    accelerator = distributed.build_accelerator(job["precision"])
    snap = snapshot.load(blank_snapshot(job))
    model = snap.model()
    distributed.prepare_model(model.net, accelerator, job["compile"])
    sampler = SamplerSettings(steps=job["sampling_steps"], prompts=("a",) if model.net.max_prompt_bytes else None)
    return timer, accelerator, snap, replace(model, net=TimedNetwork(model.net, timer, "network")), sampler


def sample_job(job: dict) -> dict:
    """What sample.py does: `generate`, then PNG files; "network" and, of latents, "decoder" are sections."""
    timer, accelerator, _, model, settings = timed_flow(job)
    if model.decode:
        model = replace(model, decode=timer.watch("decoder", model.decode))
    indices = range(job["sampling_batch"] * (job["warmup"] + job["sampling_batches"]))
    batches = generate(accelerator, model, shard(accelerator, indices, job["sampling_batch"]), settings)
    with tempfile.TemporaryDirectory() as scratch, ImageWriter(Path(scratch)) as writer:
        for batch in timer.timed(batches, job["warmup"], job["sampling_batches"]):
            writer.write(batch.indices, batch.images)
    return measured(job, timer, job["sampling_batch"], job["sampling_steps"])


def plain_sample_job(job: dict) -> dict:
    cfg = loading.load(job["config"], job["overrides"])
    net, pixels, _ = baseline.load_network_and_data(cfg)
    shape = tuple(pixels.shape[1:])
    timer = Timer()
    with tempfile.TemporaryDirectory() as scratch:
        batches = baseline.sample(net, shape, net.num_classes, job["sampling_batch"], job["sampling_steps"], Path(scratch))
        for _ in timer.timed(batches, job["warmup"], job["sampling_batches"]):
            pass
    timer.seconds.clear()
    return measured(job, timer, job["sampling_batch"], job["sampling_steps"])


def evaluate_job(job: dict) -> dict:
    """A row of evaluate.py, from noise to distance; "network" and "features" are sections."""
    # Here alone: a third of a second and 26 MiB, which would count in the first step and the memory of the other jobs
    from flow.evaluation.real_images import load_real_images
    from flow.evaluation.runner import Evaluation, EvaluationSettings

    timer, accelerator, snap, model, sampler = timed_flow(job)
    settings = EvaluationSettings(
        owner="benchmark", n_samples=job["n_samples"], batch_size=job["sampling_batch"],
        feature_extractor=job["feature_extractor"], metrics=("fid",),
    )  # fmt: skip
    real_images = load_real_images(None, accelerator, snap.decoded_shape, snap.config)
    evaluation = Evaluation.build(settings, accelerator, Path(job["scratch"]), snap.decoded_shape, real_images, [])
    evaluation.extractor = TimedNetwork(evaluation.extractor, timer, "features")
    batches = shard(accelerator, range(job["n_samples"]), job["sampling_batch"])
    images = ((b.indices, b.images) for b in generate(accelerator, model, batches, sampler))
    timer.first_lap = time.time()
    timer.restart()
    evaluation.measure(images, None)
    timer.lap()
    return measured(job, timer, job["n_samples"], job["sampling_steps"])


if __name__ == "__main__":
    cli_main(main)
