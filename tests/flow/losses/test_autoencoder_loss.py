"""The loss of autoencoders."""

import torch

from flow.losses import Batch
from flow.losses.autoencoder import AutoencoderLoss, kl_divergence


def test_the_terms_of_the_loss():
    x, recon = torch.zeros(2, 1, 2, 2), torch.tensor([0.5, -2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    batch = Batch(x, None, None, None, 0, slice(0, 2), range(2), [0, 1], {"posterior": torch.zeros(2, 2, 1, 1)})
    for distance, expected in {"l1": [0.5, 2], "mse": [0.25, 4]}.items():
        losses = AutoencoderLoss((2, 1, 1), distance, kl_weight=0.5)(lambda x, e: (recon, e + 1, e + 1), None, batch)
        assert losses.terms[distance].tolist() == expected and losses.terms["kl"].tolist() == [1, 1]
        assert losses.per_sample.tolist() == [value + 0.5 for value in expected]
    mean, std = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, std), expected)
