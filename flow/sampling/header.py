"""The header of a snapshot, read as untrusted input: types, sizes, places."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from configs.errors import first_line
from configs.schema import MAX_EMA_WIDTH, Config
from configs.stored import unwritable

KEYS = {"config", "image_shape", "step", "images", "half_life_images"}
MAX_NUMBERS = 2**26  # of an image: 3 x 4,700 x 4,700


class PowerAverage(NamedTuple):
    """Which power-function average the weights of a snapshot are, see flow/power_ema.py."""

    width: float  # sigma_rel
    updates: int  # optimizer updates of the training, the time of its profile
    inputs: str = ""  # of one that was reconstructed: a digest of the stored averages that it was made of


def read(metadata: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[int, int, int], dict[str, Any] | None, tuple[str, ...]]:
    """(image_shape, (step, images, half_life_images), description of the codec, class names). Raises ValueError that names the
    entry."""
    image_shape = _shape("image_shape", _json("image_shape", metadata["image_shape"]), (1, 3))
    counts = [_count(name, metadata[name]) for name in ("step", "images", "half_life_images")]
    codec = _codec(_json("codec", metadata["codec"]), image_shape) if "codec" in metadata else None
    class_names = _json("class_names", metadata.get("class_names", "[]"))
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError("class_names: must be a list of names")
    if next(unwritable({("class_names",): class_names}), None):
        raise ValueError("class_names: hold a character that no text can have")
    return image_shape, (counts[0], counts[1], counts[2]), codec, tuple(class_names)


def power_average(metadata: Mapping[str, str]) -> PowerAverage | None:
    """The entry of a power-function average, None for other averages. Raises ValueError."""
    if "power_average" not in metadata:
        return None
    entry = _json("power_average", metadata["power_average"])
    if isinstance(entry, dict) and entry.keys() == set(PowerAverage._fields):
        average = PowerAverage(**entry)
        whole = type(average.updates) is int and 0 <= average.updates < 10**18 and isinstance(average.inputs, str)
        if whole and type(average.width) is float and 0 < average.width < MAX_EMA_WIDTH:
            return average
    rule = f"must have a width between 0 and {MAX_EMA_WIDTH:.4f}, a number of updates and the text inputs"
    raise ValueError(f"power_average: {rule}")


def take_places(config: Config, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Remove all places from a stored configuration; returns those that are not `typed` on the command line: {key: place}.

    A place is data.root, data.autoencoder, and of data.args and flow.source.args what is called a path or has a slash in it.
    """
    data = config.data
    places: dict[str, Any] = {}
    for name in ("root", "autoencoder"):
        value = getattr(data, name)
        if value is not None:
            setattr(data, name, None)
            places[f"data.{name}"] = value
    for key, args in (("data.args", data.args), ("flow.source.args", config.flow.source.args)):
        for name, value in list(args.items()):
            if name == "path" or any(slash in str(value) for slash in "/\\"):
                places[f"{key}.{name}"] = args.pop(name)
    return {key: value for key, value in places.items() if key not in typed}


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({first_line(error)})") from None


def _shape(name: str, value: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    whole = isinstance(value, list) and len(value) in lengths and all(type(side) is int and side >= 1 for side in value)
    if not whole or math.prod(value) > MAX_NUMBERS:
        count = " or ".join(map(str, lengths))
        raise ValueError(f"{name}={str(value)[:60]}: must be {count} whole numbers above 0, with a product of at most 2^26")
    return tuple(value)


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(f"{name}={text[:60]!r}: must be a whole number below 10^18")
    return int(text)


def _codec(value: Any, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """A description as models/autoencoder.py has it."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("name", "source", "digest")):
        raise ValueError("codec: must have the texts name, source and digest")
    for key in ("shift", "scale"):
        numbers = value.get(key)
        if not isinstance(numbers, list) or not all(type(n) in (int, float) and abs(n) < 1e30 for n in numbers):
            raise ValueError(f"codec: {key} must be a list of finite numbers")
        if len(latent_shape) != 3 or len(numbers) != latent_shape[0]:
            raise ValueError(f"codec: {key} has {len(numbers)} numbers for latents of shape {latent_shape}; one a channel")
    return {**value, "image_shape": list(_shape("codec: image_shape", value.get("image_shape"), (3,)))}
