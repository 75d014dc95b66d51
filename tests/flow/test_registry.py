"""Functions by name with their arguments."""

import pytest

from flow import registry

REGISTRY = {"ramp": lambda u, power=1.0, flip=False, name="x": (u, power, flip)}


def test_arguments_are_of_the_kind_of_their_default():
    """A default that is a bool takes true and false, a number takes numbers, a text is no argument."""
    assert registry.pick("sampler", REGISTRY, "ramp", {"power": 2, "flip": True})(0.5) == (0.5, 2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"flip": 1}, "flip=1: must be true or false"),
        ({"power": True}, "power=True: must be a finite number"),
        ({"name": "y"}, "ramp has no argument 'name'; it takes power, flip"),
    ],
)
def test_argument_of_another_kind_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        registry.pick("sampler", REGISTRY, "ramp", args)
