"""The space of a flow: pixels, latents or points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flow.sampling import images


@dataclass(frozen=True)
class Space:
    """What a network sees, what people see of it, and how that is drawn.

    Example:
        >>> Space((1, 28, 28)).kind
        'images'
    """

    shape: tuple[int, ...]  # of what the network sees: (C, H, W), or (2,) for points
    codec: Mapping[str, Any] | None = None  # of latents: what decodes them

    @property
    def is_points(self) -> bool:
        return len(self.shape) == 1

    @property
    def is_pixels(self) -> bool:
        return not self.is_points and self.codec is None

    @property
    def kind(self) -> str:
        return "points" if self.is_points else "latents" if self.codec else "images"

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of the images that come out in the end, or of points."""
        return tuple(self.codec["image_shape"]) if self.codec else self.shape

    @property
    def channels_note(self) -> str | None:
        """Which channels pictures show, where these are not all."""
        channels = 1 if self.is_points else self.decoded_shape[0]
        shown = images.shown_channels(channels)
        return None if channels == shown else f"pictures show the first {shown} of {channels} channels"

    @property
    def preview_batch_size(self) -> int:
        """Samples of a preview that a process takes at once; few images, so that several processes share a grid."""
        return 1000 if self.is_points else 16

    def to_visible(self, decoded: Tensor) -> Tensor:
        """Decoded samples [b, ...] as people see them, on the CPU: images uint8 [b, C, H, W], points float32 [b, 2]."""
        return decoded.float().cpu() if self.is_points else images.to_uint8(decoded).cpu()

    def picture(self, samples: Tensor, columns: int, names: Sequence[str] = ()) -> Tensor:
        """One uint8 [C, H, W] of visible samples: a grid with named columns, or a scatter plot of points."""
        return images.scatter_image(samples) if self.is_points else images.labelled_grid(samples, columns, names)

    def __str__(self) -> str:
        return "points" if self.is_points else f"{self.kind} of {'x'.join(map(str, self.shape))}"
