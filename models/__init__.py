"""Networks: net(x [B, C, H, W], t [B] in [0, 1], y [B] or None) -> [B, C, H, W]. `net.num_classes` is None without labels."""

import inspect
from typing import Any

from torch import nn

from models.unet import UNet

MODELS: dict[str, type[nn.Module]] = {"unet": UNet}


def build(name: str, image_shape: tuple[int, int, int], args: dict[str, Any]) -> nn.Module:
    """The network `name` for images of shape (C, H, W); `args` are the keyword arguments of its constructor.

    Raises ValueError for an unknown name or argument (naming what exists) and for values that do not fit each other.
    """
    if name not in MODELS:
        raise ValueError(f"{name!r} is not a network; choose one of {', '.join(MODELS)}")
    known = [p for p in inspect.signature(MODELS[name]).parameters if p != "image_shape"]
    for key in args:
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}; it takes {', '.join(known)}")
    try:
        return MODELS[name](image_shape, **args)
    except TypeError as error:  # e.g. a word where a number belongs
        raise ValueError(f"{name} cannot be built from {args}: {error}") from error
