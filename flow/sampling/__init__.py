"""From weights to images: snapshots, sampling over processes, and `Sampler`, the Python API."""

from flow.sampling.sampler import Sampler

__all__ = ["Sampler"]
