"""Networks: net(x [B, C, H, W], t [B] in [0, 1], y, t_next [B] or None) -> [B, C, H, W]; `mlp` also for points [B, 2].

y is labels [B] where `net.num_classes` is not None, tokens [B, net.max_prompt_bytes] of prompts where that is not None (then
`net.encode(prompts)` makes them), else None. `net.null` is the value of y that stands for no condition.
`build_codec(description)` is what stands between images and the latents that a network may be trained on.

Every network takes the argument `data_std` as well: the standard deviation of the data, for `Preconditioned`.
"""

import inspect
from typing import Any

from torch import nn

from flow import registry
from models.autoencoder import build_codec
from models.dit import DiT
from models.mini_unet import MiniUNet
from models.mlp import MLP
from models.preconditioning import Preconditioned
from models.unet import UNet

__all__ = ["MODELS", "build", "build_codec"]
MODELS: dict[str, type[nn.Module]] = {"unet": UNet, "mini_unet": MiniUNet, "dit": DiT, "mlp": MLP}


def build(name: str, image_shape: tuple[int, ...], args: dict[str, Any]) -> nn.Module:
    """The network `name` for images of shape (C, H, W) or points of shape (2,); `args` are the arguments of its
    constructor.

    Raises ValueError for an unknown name or argument (naming what exists) and for values that do not fit each other.
    """
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}; choose from {', '.join(MODELS)}")
    allowed = {key: p for key, p in inspect.signature(MODELS[name]).parameters.items() if key != "image_shape"}
    allowed["data_std"] = inspect.signature(Preconditioned).parameters["data_std"]  # which checks its value itself
    args = dict(args)
    data_std = args.pop("data_std", None)
    if "num_classes" not in allowed and "num_classes" in args and args.pop("num_classes") is not None:
        raise ValueError(f"{name} takes no labels; model.args.num_classes=null trains it without them")
    registry.check_arguments(name, args, allowed, registry.bool_where_declared)
    if len(image_shape) != 3 and name != "mlp":
        raise ValueError(f"{name} is a network for images; for points use mlp")
    try:
        net = MODELS[name](image_shape, **args)
    except TypeError as error:  # e.g. a word where a number belongs
        raise ValueError(f"{name} cannot be built from {args}: {error}") from error
    except RuntimeError as error:  # a size beyond all memory, or beyond what torch can count
        if "DefaultCPUAllocator" not in str(error) and "overflow" not in str(error):
            raise
        raise ValueError(f"{name} cannot be built from {args}: {error}") from error
    return net if data_std is None else Preconditioned(net, data_std)
