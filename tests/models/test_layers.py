"""The shortcuts of CPUs: the same numbers as the kernels of torch that they replace."""

import pytest
import torch
import torch.nn.functional as F

from models.conditioning import Conditioning
from models.layers import attention, resample


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = (torch.arange(7) < torch.tensor([[4], [7]]))[:, None, None] if masked else None
    torch.testing.assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling(layout):
    x = torch.randn(2, 4, 3, 5).to(memory_format=layout)
    assert torch.equal(resample(x, "up"), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("args", [{"size": 33}, {"size": 32, "features": 7}])
def test_features_of_the_time_are_even(args):
    """A feature is a cosine and a sine."""
    with pytest.raises(ValueError, match="features of the time: must be even"):
        Conditioning(**args)
