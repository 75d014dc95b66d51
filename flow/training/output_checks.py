"""Checks of what networks and losses return, which may be one's own: a wrong shape would train by broadcasting, or fail far
away."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, first_line
from flow.losses import Loss, Losses
from flow.registry import kind_of
from flow.runtime import distributed
from models.preconditioning import Preconditioned


def check_losses(loss: Loss, losses: Any, batch_size: int) -> None:
    """Raises UserError where a loss did not return `Losses` of so many samples, whose mean has a gradient."""
    name = f"loss {getattr(loss, 'name', type(loss).__name__)}"
    if not isinstance(losses, Losses):
        raise UserError(f"{name}: returns {kind_of(losses)}; must return Losses(per_sample, t, terms)")
    if not isinstance(losses.terms, dict):
        raise UserError(f"{name}: terms is {kind_of(losses.terms)}; must be a dict of tensors [{batch_size}] by name")
    parts = {"per_sample": losses.per_sample, **{f"terms[{key!r}]": value for key, value in losses.terms.items()}}
    for part, value in (parts if losses.t is None else parts | {"t": losses.t}).items():
        if not isinstance(value, Tensor):
            raise UserError(f"{name}: {part} is {kind_of(value)}; must be a tensor [{batch_size}], a number a sample")
        if value.shape != (batch_size,):
            raise UserError(f"{name}: {part} has shape {list(value.shape)}; must be [{batch_size}], a number a sample")
    if not losses.per_sample.requires_grad:
        raise UserError(f"{name}: per_sample has no gradient; compute it from the output of net, not of eager")


def check_forward(name: str, net: Any, shape: tuple[int, ...], accelerator: Accelerator) -> None:
    """Call the network once on a batch of two, one of them without a label, for an output of another shape would train by
    broadcasting, and a missing row of the null label would end a training at a random step.

    The main process calls it, without gradient and dropout; weights and random state stay as they are. It is called on the CPU,
    whose errors say more; where that fails, a network that only runs on the device of the training is called there.

    Raises:
        UserError: on every process, where the call fails, and where it does not return a tensor of the shape of x.
    """
    distributed.decided_by_main(lambda: _check_forward(f"model.name={name}", net, shape, accelerator))


def _check_forward(key: str, net: Any, shape: tuple[int, ...], accelerator: Accelerator) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    y = None
    try:
        y = _one_without_condition(net)
        with accelerator.autocast():
            output = _call(net, x, y, torch.device("cpu"))
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise
        output = _output_on_device(net, x, y, accelerator)
        if output is None:
            raise UserError(f"{key}: {_why_it_fails(net, x, y, error)}") from error
    expected = f"for x {list(x.shape)}; must return a tensor of the shape of x"
    if not isinstance(output, Tensor):
        raise UserError(f"{key}: returns {kind_of(output)} {expected}")
    if output.shape != x.shape:
        raise UserError(f"{key}: returns {list(output.shape)} {expected}")
    if not output.is_floating_point():
        raise UserError(f"{key}: returns {output.dtype} {expected}, of floating point")


def _one_without_condition(net: Any) -> Tensor | None:
    """Labels [2] or tokens [2, L], the second of them null; None for a network that takes neither."""
    if net.max_prompt_bytes:
        y = net.encode(["a", "a"])
    elif net.num_classes is not None:
        y = torch.full((2,), net.num_classes - 1)
    else:
        return None
    y[1] = net.null
    return y


def _call(net: Any, x: Tensor, y: Tensor | None, device: torch.device) -> Any:
    """What the network, which is on this device, returns as in sampling: without gradient and dropout."""
    t, t_next = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 0.75])
    inputs = (x, t, y, t_next) if net.two_times else (x, t, y)
    forward = net.net if isinstance(net, Preconditioned) else net  # its sum with x would hide a wrong shape
    training = [module for module in net.modules() if module.training]
    others = [] if device.type == "cpu" else [device]  # the random state of the CPU is restored in any case
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(others, device_type=device.type):
            return forward(*(value if value is None else value.to(device) for value in inputs))
    finally:
        for module in training:
            module.training = True


def _output_on_device(net: Any, x: Tensor, y: Tensor | None, accelerator: Accelerator) -> Any:
    """The output on the device of the training, to which the network moves and from which it returns; None where it fails there
    too, and where that is the CPU."""
    if accelerator.device.type == "cpu":
        return None
    try:
        net.to(accelerator.device)
        with accelerator.autocast():
            output = _call(net, x, y, accelerator.device)
        net.to("cpu")
    except Exception:  # the one from the CPU says more
        return None
    return output


def _why_it_fails(net: Any, x: Tensor, y: Tensor | None, error: Exception) -> str:
    """The error of a call, and whether it is the null label that it comes from."""
    reason = f"({type(error).__name__}: {first_line(error)})"
    if y is not None and y.dim() == 1:
        try:
            _call(net, x, y[:1].expand(2), torch.device("cpu"))
            rows = max(net.num_classes, net.null + 1)
            return f"fails on y = {net.null}, the null label {reason}; an embedding of labels needs {rows} rows"
        except Exception:  # it is not the label
            pass
    inputs = f"x {list(x.shape)}, t [2]"
    inputs += f", y {list(y.shape)}" if y is not None else ", y = None"
    inputs += ", t_next [2]" if net.two_times else ""
    return f"fails on {inputs} {reason}; FLOW_TRACEBACK=1 shows where"
