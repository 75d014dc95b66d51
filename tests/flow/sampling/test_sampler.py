"""Sampler, the Python interface of a trained flow: what it refuses."""

import numpy as np
import pytest
import torch

from flow.sampling import Sampler

IMAGES = torch.zeros(4, 1, 8, 8)
WRONG = [
    ("sample", [0], {}, "n=0: must be a whole number of at least 1"),
    ("sample", [2.5], {}, "n=2.5: must be a whole number"),
    ("trajectory", [0], {}, "n=0: must be a whole number of at least 1"),
    ("sample", [2], {"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
    ("sample", [2], {"steps": 0}, "steps=0: must be a whole number of at least 1"),
    ("sample", [2], {"steps": 2.5}, "steps=2.5: must be a whole number"),
    ("sample", [2], {"labels": []}, "labels: must have at least one, or be left out"),
    ("sample", [2], {"labels": [1.5]}, r"labels=\[1.5\]: must be whole numbers or names of classes"),
    ("sample", [2], {"labels": ["ten"]}, "labels='ten': unknown class; the classes are 0, 1, 2"),
    ("sample", [2], {"labels": "12"}, "labels='12': must be a list of whole numbers or names of classes"),
    ("sample", [2], {"labels": [10]}, "labels=10: is out of range; this network has 0 to 9"),
    ("sample", [2], {"prompts": "a text"}, "prompts='a text': must be a list of prompts"),
    ("sample", [2], {"guidance_scale": float("nan")}, "guidance_scale=nan: must be a finite number of 0 or more"),
    ("sample", [2], {"rtol": 1e-3}, "euler has no option 'rtol'; it takes none"),
    ("sample", [2], {"callback": print}, "euler has no option 'callback'"),
    ("sample", [2], {"method": "euler_maruyama", "noise": IMAGES}, "noise: is drawn from the seed and the index of an image"),
    ("transfer", [IMAGES.byte()], {}, "x0 of uint8: this flow starts at Gaussian noise"),
    ("transfer", [IMAGES.long()], {}, "x0 of int64: this flow starts at Gaussian noise"),
    ("velocity", [IMAGES, 1], {}, r"t=1: must be a number in \[0, 1\)"),
    ("velocity", [IMAGES, -0.1], {}, r"t=-0.1: must be a number in \[0, 1\)"),
    ("velocity", [IMAGES, torch.tensor([0.1, 0.2, 0.3, 0.4])], {}, r"t=tensor\(.*: must be a number in \[0, 1\)"),
    ("velocity", [IMAGES.byte(), 0.5], {}, r"x of torch.uint8 and shape \(4, 1, 8, 8\): must be floats \[b, \*\(1, 8, 8\)\]"),
    ("velocity", [torch.zeros(2, 1, 8, 7), 0.5], {}, r"shape \(2, 1, 8, 7\): must be floats"),
    ("velocity", [IMAGES, 0.5], {"labels": [1, 2, 3]}, "labels: 3 for 4 samples; give one for all, or one for each"),
    ("velocity", [IMAGES, 0.5], {"t_next": 0.7}, "t_next=0.7: is for flow maps; this network has one time"),
    ("encode", [torch.zeros(2, 1, 8, 7)], {}, r"x1 of shape \(2, 1, 8, 7\): the flow works on \(1, 8, 8\)"),
    ("encode", [IMAGES], {}, "labels=None: this network has 10 classes; give one label for all x1"),
    ("encode", [IMAGES], {"labels": [3, 4]}, "labels: 2 for 4 samples; give one for all, or one"),
    ("encode", [IMAGES.long()], {"labels": [3]}, "x1 of torch.int64: must be uint8 images, or floats as the network"),
    ("encode", [IMAGES + 255], {"labels": [3]}, r"x1 has values of up to 255: images are uint8, or floats in \[-1, 1\]"),
    ("encode", [IMAGES], {"labels": [3], "steps": 0}, "steps=0: must be a whole number of at least 1"),
    ("log_likelihood", [IMAGES], {}, "labels=None: this network has 10 classes"),
    ("log_likelihood", [IMAGES], {"labels": [3], "hutchinson_samples": 0}, "hutchinson_samples=0: must be a whole number"),
    ("log_likelihood", [IMAGES.byte()], {"labels": [3]}, r"x1 of torch\.uint8 .* flow\.likelihood\.dequantize makes them"),
    ("log_likelihood", [torch.zeros(2, 1, 8, 7)], {"labels": [3]}, r"x1 of torch\.float32 and shape \(2, 1, 8, 7\): must be"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sampler(tiny_run) -> Sampler:
    return Sampler.load(tiny_run, device="cpu")


@pytest.mark.parametrize(("method", "arguments", "options", "message"), WRONG)
def test_wrong_arguments_are_named(sampler, method, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(sampler, method)(*arguments, **options)


def test_time_of_any_kind(sampler):
    assert torch.equal(*(sampler.velocity(IMAGES, t, labels=[1]) for t in (0.5, np.float32(0.5))))


def test_classes_by_name(sampler):
    assert sampler.class_names == tuple("0123456789")
    assert torch.equal(sampler.sample(3, labels=["3", "1"], steps=1), sampler.sample(3, labels=[3, 1], steps=1))


def test_results_are_ordinary_tensors(sampler):
    """They can be written to, and gradients can start at them."""
    images = sampler.sample(2, steps=1)
    images[0] = 0
    _, states = sampler.trajectory(2, steps=1)
    x0 = sampler.encode(states[-1], labels=[3], steps=1).requires_grad_()
    sampler.velocity(x0, 0.5, labels=[3]).square().sum().backward()
    assert x0.grad.abs().sum() > 0
    sampler.transfer(x0.detach(), labels=[3], steps=1)[0] = 0


@pytest.mark.parametrize("labels", [np.array([3, 1]), torch.tensor([3, 1]), (3, 1)])
def test_labels_of_any_kind(sampler, labels):
    assert torch.equal(sampler.sample(2, labels=labels, steps=2), sampler.sample(2, labels=[3, 1], steps=2))
