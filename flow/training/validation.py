"""The validation loss: unweighted flow matching on held-out data, with the same noise and times at every step."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from datasets import DataSet, DataSpec, reading
from datasets.images import to_float
from flow import couplings
from flow.losses.distances import mse
from flow.model import FlowModel, Network
from flow.noise import generator
from flow.runtime import distributed
from flow.runtime.errors import error_context, items_in_context
from flow.sampling.generate import shard
from flow.training.flow_task import FlowTask, encode_captions
from flow.training.statistics import TIME_BINS
from flow.training.trainer import Callback, Trainer

KEY = "evaluate.loss_every_steps"


class ValidationLoss(Callback):
    """Logs the validation loss of the averaged weights, and its mean in each time bin, every evaluate.loss_every_steps."""

    def __init__(self, task: FlowTask):
        """Raises UserError where the data set has no held-out part."""
        self.task = task
        self.data = load_held_out(task.config, task.accelerator)
        if task.model.trained_guidance != 1:
            task.notes.append(
                f"{KEY}: the validation loss compares with the velocity without guidance, which a network with "
                f"loss.args.guidance_scale={task.model.trained_guidance:g} does not learn; it may rise as the training succeeds"
            )

    def on_step(self, trainer: Trainer) -> None:
        if not (trainer.finished or trainer.is_due(self.task.config.evaluate.loss_every_steps)):
            return
        with trainer.throughput.paused(), trainer.ema.average_parameters() as averaged:
            model = self.task.model_with(averaged)
            config = self.task.config
            losses = validation_losses(
                self.task.accelerator, model, self.data, config.evaluate.loss_samples, config.seed, config.evaluate.batch_size
            )
        if losses is not None:
            metrics = {"validation_loss": losses.mean().item()}
            metrics |= {f"validation_loss_t_{i / TIME_BINS:.1f}": part.mean().item() for i, part in enumerate(by_time(losses))}
            trainer.logger.log(trainer.step, {**metrics, "images": trainer.step * config.train.batch_size})
            trainer.logger.info(f"step {trainer.step}: validation loss {metrics['validation_loss']:.4f}")


def load_held_out(config: Config, accelerator: Accelerator) -> DataSet:
    """The data of the kind of `config.data` that training does not see.

    Raises:
        UserError: where there are none, or none that are matched with their starts.
    """
    data = config.data
    coupling = config.flow.coupling
    if couplings.find(coupling).one_start:
        raise UserError(
            f"{KEY}={config.evaluate.loss_every_steps}: must be 0 with flow.coupling={coupling}, as held-out images are not "
            "matched with their starts"
        )
    held_out = DataSpec.of(data).held_out()
    if held_out is None:
        args = f" with data.args={data.args}" if data.args else ""
        ways = {
            "digits": ", or train on data.args.split=train",
            "packed": ", or name such images as data.args.held_out",
            "folder": ", or pack these and held-out images by scripts.pack_images, train with data.name=packed, and name the "
            "held-out ones as data.args.held_out (docs/data.md)",
        }
        raise UserError(
            f"{KEY}={config.evaluate.loss_every_steps}: data.name={data.name}{args} has no held-out part; set it to 0"
            f"{ways.get(data.name, '')}"
        )
    with error_context(KEY):
        return distributed.main_process_first(accelerator, held_out.spec.build)


@torch.inference_mode()
def validation_losses(
    accelerator: Accelerator, model: FlowModel, data: DataSet, n: int, seed: int, batch_size: int
) -> Tensor | None:
    """Squared errors float64 [n] of the network's prediction, rising in time, on the main process; None on the others.

    The loss of conditional flow matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9), the mean over elements, of the
    velocity of the path or of what else the network predicts; of a flow map u(x, t, t). Sample k has time (k + u_k) / n with
    uniform u_k, an image in random order, independent noise and its own label or caption: functions of (seed, k). Batches are
    cut by k, so that the losses are the same for any number of processes.
    """
    model.net.eval()
    order = generator("validation data", seed).permutation(len(data))
    times = torch.from_numpy((np.arange(n) + generator("validation time", seed).random(n)) / n)
    batches = shard(accelerator, range(n), batch_size)
    index_lists = [[int(order[k % len(data)]) for k in batch] for batch in batches]
    images = items_in_context("data", reading.read_batches(data, index_lists))
    parts = []
    for batch, (indices, pixels) in zip(batches, images, strict=True):
        x1 = to_float(pixels.to(accelerator.device))
        x0 = model.draw_x0("validation", seed, batch).to(accelerator.device)
        t = model.path.clip(times[batch.start : batch.stop].float().to(accelerator.device))
        y = _condition(model.net, data, list(indices), batch, seed)
        with accelerator.autocast():
            prediction = model.net(model.path.interpolate(x0, x1, t), t, None if y is None else y.to(accelerator.device))
        target = model.path.target(x0, x1, t, model.prediction)
        parts.append((batch.start, mse(prediction.float(), target).cpu().double()))
    gathered = distributed.gather_in_order(accelerator, parts)
    return None if gathered is None else torch.cat(gathered)


def by_time(losses: Tensor) -> Iterator[Tensor]:
    """The `validation_losses` [n] of each of the time bins."""
    n = len(losses)
    for i in range(TIME_BINS):
        yield losses[-(-i * n // TIME_BINS) : -(-(i + 1) * n // TIME_BINS)]


def _condition(net: Network, data: DataSet, indices: list[int], samples: range, seed: int) -> Tensor | None:
    """Labels [b] or tokens [b, L] of the images with these indices; None for a network without either."""
    if data.labels is None or net.null is None:
        return None
    if not net.max_prompt_bytes:
        return data.labels[indices]
    return encode_captions(net, data, indices, samples, "validation caption", seed)
