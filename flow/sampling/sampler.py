"""A trained flow in Python: sampling, velocities, trajectories, likelihood and inversion without a launcher."""

import operator
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.images import to_float
from flow import likelihood
from flow.guidance import GuidedVelocity
from flow.model import FlowModel
from flow.noise import gaussian_noise
from flow.runtime import distributed
from flow.runtime.messages import first_names
from flow.sampling import grid_store, guide, snapshot
from flow.sampling.generate import SampleBatch, build_velocity, index_batches, sample_batch, to_solver_dtype
from flow.sampling.settings import ALL_TIMES, SamplerSettings, build_time_grid, guidance_note, validate
from flow.sampling.snapshot import Snapshot
from flow.source import GAUSSIAN

MAX_PIXEL = 8.0  # of images as floats: the end of a flow may lie outside [-1, 1], numbers up to 255 are another scale


class Sampler:
    """Samples a trained flow on one device; the images are those of sample.py with the same settings and batch size.

    Example:
        >>> sampler = Sampler.load("runs/mnist")
        >>> images = sampler.sample(16, labels=[3], method="heun", steps=10, guidance_scale=2)  # uint8 [16, 1, 28, 28]
    """

    def __init__(
        self, model: FlowModel, device: torch.device | None = None,
        dtype: torch.dtype = torch.float32, snapshot: Snapshot | None = None, guide_name: str | None = None,
    ):  # fmt: skip
        """model: its networks go to the device. device: default is that of `distributed.default_device`.
        dtype: of autocast; float32 turns autocast off. snapshot: where the model comes from, for optimized time grids.
        guide_name: of autoguidance."""
        self.model = model
        self.device = device or distributed.default_device()
        self.dtype = dtype
        self.snapshot, self.guide_name = snapshot, guide_name
        for net in model.networks:
            distributed.place(net, self.device, dtype == torch.float32)
        model.eval()

    @classmethod
    def load(
        cls,
        weights: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        overrides: Sequence[str] = (),
        guide_weights: str | Path | None = None,
    ) -> "Sampler":
        """The flow behind a run folder, a checkpoint folder, a .safetensors file or hf:owner/name. In a process group every
        process calls it, unless `weights` is a file.

        device: default is that of `distributed.default_device`. dtype: of autocast. overrides: `key=value` changes
        of the stored configuration. guide_weights: a weaker model; guidance_scale is then that of autoguidance.

        Raises:
            UserError: where there is no snapshot, it is damaged, or its weights do not fit.
        """
        snap = snapshot.load(weights, None, list(overrides))
        model = snap.model()
        guide_name = guide.attach(model, snap, guide_weights)
        target_device = None if device is None else torch.device(device)
        return cls(model, target_device, dtype, replace(snap, weights={}), guide_name)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the training, by label; () where they have no names or the model comes from no snapshot."""
        return self.snapshot.class_names if self.snapshot else ()

    def sample(
        self,
        n: int,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        method: str = "euler",
        steps: int = 100,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = ALL_TIMES,
        seed: int = 8888,
        time_grid: str = "uniform",
        batch_size: int = 100,
        **options: Any,
    ) -> Tensor:
        """n images uint8 [n, C, H, W] on the CPU, or points float32 [n, 2].

        Image k has label or prompt k mod their number; a label is a number or the name of a class. guidance_interval: the times
        t of the guidance. options: those of the method, such as rtol or noise_scale.

        Raises:
            ValueError: for settings that the method or the network does not take.
        """
        settings = self._settings(
            labels, prompts, options, method=method, steps=steps, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, seed=seed, time_grid=time_grid,
        )  # fmt: skip
        _check_count("n", n)
        with torch.no_grad():
            return torch.cat([self._batch(batch, settings).images for batch in index_batches(range(n), batch_size)])

    def velocity(
        self,
        x: Tensor,
        t: float,
        *,
        t_next: float | None = None,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """dx/dt [b, ...] at x [b, ...] and time t in [0, 1) on the linear path; differentiable with respect to x.

        t_next: for flow maps, the time from t to 1 that the mean velocity leads to. labels, prompts: one for all, or one for
        each.

        Raises:
            ValueError: for other times, for x of another shape or kind, for t_next where the network has one time, and for a
                condition that it does not take.
        """
        if not isinstance(t, Real) or not 0 <= t < 1:
            raise ValueError(f"t={t}: must be a number in [0, 1); at the data, t = 1, the velocity is not defined")
        if not x.is_floating_point() or tuple(x.shape[1:]) != self.model.shape:
            raise ValueError(f"x of {x.dtype} and shape {tuple(x.shape)}: must be floats [b, *{self.model.shape}]")
        if t_next is not None and not self.model.net.two_times:
            raise ValueError(f"t_next={t_next}: is for flow maps; this network has one time")
        if t_next is not None and not t <= t_next <= 1:
            raise ValueError(f"t_next={t_next}: must be from t={t} to 1")
        with self._autocast():
            return self._velocity(len(x), labels, prompts, guidance_scale)(x.to(self.device), t, t_next)

    def trajectory(
        self,
        n: int,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        method: str = "euler",
        steps: int = 100,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = ALL_TIMES,
        seed: int = 8888,
        time_grid: str = "uniform",
        requires_grad: bool = False,
        **options: Any,
    ) -> tuple[list[float], Tensor]:
        """(times [T + 1], states [T + 1, n, ...]): the flow from noise (t = 0) to data (t = 1), solved as one batch.

        requires_grad: keep the graph, so that the states can be differentiated with respect to the weights.
        """
        settings = self._settings(
            labels, prompts, options, method=method, steps=steps, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, seed=seed, time_grid=time_grid,
        )  # fmt: skip
        _check_count("n", n)
        x0 = to_solver_dtype(self.model.draw_x0("sample", seed, range(n)), self.device)
        states = [x0]
        with nullcontext() if requires_grad else torch.no_grad():
            self._batch(range(n), settings, x0, states.append)
        return build_time_grid(settings, self.model.path), torch.stack(states)

    def log_likelihood(
        self,
        x1: Tensor,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        method: str = "dopri5",
        hutchinson_samples: int | None = None,
        seed: int = 8888,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> Tensor:
        """log p(x1) in nats [b], float64, of data x1 [b, ...] as the network sees them: images in [-1, 1], latents, points.

        labels, prompts: one for all, or one for each. hutchinson_samples: random directions of the divergence estimate; None is
        exact, at the price of a backward pass for each element of x1.

        Raises:
            ValueError: where the source is not Gaussian noise, whose density is known, for data of another kind, and for
                another number of labels or prompts.
        """
        likelihood.check_density_known(self.model.source)
        if not x1.is_floating_point() or tuple(x1.shape[1:]) != self.model.shape:
            raise ValueError(
                f"x1 of {x1.dtype} and shape {tuple(x1.shape)}: must be floats as the network sees them, "
                f"[b, *{self.model.shape}]; flow.likelihood.dequantize makes them of pixels"
            )
        x = to_solver_dtype(x1, self.device)
        eps = None
        if hutchinson_samples is not None:
            _check_count("hutchinson_samples", hutchinson_samples)
            eps = likelihood.random_directions(seed, range(len(x)), self.model.shape, hutchinson_samples).to(x)
        velocity = self._velocity_of_data(len(x), labels, prompts)
        with self._autocast():
            return likelihood.log_likelihood(velocity, x, method, eps=eps, rtol=rtol, atol=atol)[0]

    def encode(
        self,
        x1: Tensor,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        method: str = "heun",
        steps: int = 50,
        seed: int = 8888,
    ) -> Tensor:
        """The x0 [b, ...], float64, that the flow would turn into x1: the ODE solved backwards, without guidance.

        x1: uint8 images or floats as the network sees them, [b, ...]; for a flow on latents also images, uint8 or in [-1, 1].
        labels, prompts: one for all, or one for each. Raises ValueError for data of another shape, for another number of labels
        or prompts, and for less than one step.
        """
        _check_count("steps", steps)
        x = self._as_network_sees(x1)
        noise = None
        if self.model.source.name == GAUSSIAN:
            noise = to_solver_dtype(gaussian_noise("inversion", seed, range(len(x)), self.model.shape), self.device)
        with torch.no_grad(), self._autocast():
            return likelihood.invert(self._velocity_of_data(len(x), labels, prompts), x, noise, steps, method)

    def transfer(
        self,
        x0: Tensor,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        method: str = "heun",
        steps: int = 20,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = ALL_TIMES,
        time_grid: str = "uniform",
        batch_size: int = 100,
        **options: Any,
    ) -> Tensor:
        """Where the flow leads from x0: uint8 images [n, C, H, W] on the CPU, or points float32 [n, 2], a row for each of x0.

        x0: samples of the source [n, ...]: what `encode` returns, noise, or, for a flow that starts at data, uint8 images or
        floats as the network sees them.

        Raises:
            ValueError: for settings that the method or the network does not take, for samples of another shape or that are not
                finite, and for images where the flow starts at Gaussian noise.
        """
        if self.model.source.name == GAUSSIAN and not x0.is_floating_point():
            name = str(x0.dtype).removeprefix("torch.")
            raise ValueError(f"x0 of {name}: this flow starts at Gaussian noise, that of `encode` for example, not at images")
        if not len(x0) or not torch.isfinite(x0).all():
            raise ValueError(f"x0 of shape {tuple(x0.shape)}: must have samples, all of them finite")
        settings = self._settings(
            labels, prompts, options, method=method, steps=steps, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, time_grid=time_grid,
        )  # fmt: skip
        if tuple(x0.shape[1:]) != self.model.shape:
            raise ValueError(f"x0: has samples of {tuple(x0.shape[1:])}, the flow works on {self.model.shape}")
        start = x0 if x0.is_floating_point() else to_float(x0)
        with torch.no_grad():
            return torch.cat([
                self._batch(batch, settings, start[batch.start : batch.stop]).images
                for batch in index_batches(range(len(x0)), batch_size)
            ])  # fmt: skip

    def _settings(self, labels, prompts, options: dict | None = None, **settings: Any) -> SamplerSettings:
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: must be a list of prompts")
        if isinstance(labels, str):  # whose letters may be names of classes
            raise ValueError(f"labels={labels!r}: must be a list of whole numbers or names of classes")
        try:
            labels = None if labels is None else tuple(map(self._label, labels))
        except TypeError:
            raise ValueError(f"labels={labels!r}: must be whole numbers or names of classes") from None
        prompts = None if prompts is None else tuple(prompts)
        given = {"labels": labels, "prompts": prompts, "options": tuple((options or {}).items()), **settings}
        sampler = SamplerSettings(**given, guide=self.guide_name if settings["guidance_scale"] != 1 else None)
        if sampler.time_grid == "optimized":
            if self.snapshot is None:
                raise ValueError("time_grid=optimized: needs a sampler from Sampler.load")
            sampler = replace(sampler, times=grid_store.load(self.snapshot, sampler.method, sampler.steps))
            if note := grid_store.fit_note(self.snapshot, sampler):
                warnings.warn(note, stacklevel=3)
        validate(sampler, self.model)
        if note := guidance_note(sampler, self.model):
            warnings.warn(note, stacklevel=3)
        return sampler

    def _label(self, label: int | str) -> int:
        """Raises ValueError for a name that no class has, TypeError for what is neither a name nor a whole number."""
        if not isinstance(label, str):
            return operator.index(label)
        if label not in self.class_names:
            classes = f"the classes are {first_names(self.class_names)}" if self.class_names else "the classes have no names"
            raise ValueError(f"labels={label!r}: unknown class; {classes}")
        return self.class_names.index(label)

    def _as_network_sees(self, x1: Tensor) -> Tensor:
        """Data or images [b, ...] in the solver's precision, on the device. Raises ValueError for those of another shape, kind
        or range."""
        if x1.dtype != torch.uint8 and not x1.is_floating_point():
            raise ValueError(f"x1 of {x1.dtype}: must be uint8 images, or floats as the network sees them")
        x = to_float(x1)
        are_pixels = x.dim() == 4 and (self.model.decode is None or tuple(x.shape[1:]) != self.model.shape)
        if are_pixels and x.numel() and (peak := x.abs().max().item()) > MAX_PIXEL:
            raise ValueError(f"x1 has values of up to {peak:g}: images are uint8, or floats in [-1, 1]")
        if x.dim() == 4 and self.model.encode and tuple(x.shape[1:]) != self.model.shape:
            with torch.no_grad(), self._autocast():
                x = self.model.encode(x.to(self.device))
        if tuple(x.shape[1:]) != self.model.shape:
            raise ValueError(f"x1 of shape {tuple(x1.shape)}: the flow works on {self.model.shape}")
        return to_solver_dtype(x, self.device)

    def _batch(self, indices: range, settings: SamplerSettings, x0: Tensor | None = None, callback=None) -> SampleBatch:
        return sample_batch(self.model, indices, settings, self.device, self._autocast, x0, callback)

    def _velocity(self, n: int, labels, prompts, guidance_scale: float) -> GuidedVelocity:
        settings = self._settings(labels, prompts, guidance_scale=guidance_scale)
        for name, values in {"labels": labels, "prompts": prompts}.items():
            if values is not None and len(values) not in (1, n):
                raise ValueError(f"{name}: {len(values)} for {n} samples; give one for all, or one for each")
        return build_velocity(self.model, range(n), settings, self.device)

    def _velocity_of_data(self, n: int, labels, prompts) -> GuidedVelocity:
        """Without guidance, of n given samples: labels do not take turns over what has a label of its own."""
        velocity = self._velocity(n, labels, prompts, 1.0)
        num_classes = self.model.net.num_classes
        if num_classes is not None and labels is None:
            raise ValueError(f"labels=None: this network has {num_classes} classes; give one label for all x1, or one for each")
        return velocity

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def _check_count(name: str, value: int) -> None:
    """Raises ValueError for anything but a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
