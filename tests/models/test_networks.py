"""Networks: shapes, where attention sits, what depends on what, errors that name the argument."""

import pytest
import torch
from small_networks import SMALL, attention_heights
from torch import nn

import models
from configs import loading
from models.conditioning import sinusoidal_embedding
from models.dit import angles, features, rotate
from models.layers import Attention

UNET = SMALL["unet"]


def perturbed(net: nn.Module) -> nn.Module:
    """The network after one small change of all weights: at initialisation it gives zero whatever comes in."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize(
    ("shape", "args"),
    [
        ((1, 8, 8), {}),
        ((3, 8, 16), {"num_classes": 3}),
        ((3, 16, 16), {"channel_mult": [1, 2, 2], "attention_resolutions": [16, 4], "blocks_per_level": 2}),
        ((1, 28, 28), {"patch": 2, "attention_resolutions": [7]}),
        ((4, 12, 12), {"channel_mult": [2], "attention_resolutions": [], "dropout": 0.5}),
        ((2, 8, 8), {"width": 20, "head_channels": 20}),  # no power of two
        ((1, 16, 16), {"channel_mult": [1, 2, 2], "middle_attention": True}),
        ((1, 8, 8), {"scale_shift_norm": False, "num_classes": 3}),
        ((3, 8, 16), {"resblock_updown": False}),
    ],
)
def test_initial_output_is_zero(shape, args):
    """The output has the shape of the input and is zero at first."""
    net = models.build("unet", shape, UNET | args)
    x, t = torch.randn(3, *shape), torch.tensor([0.0, 0.4, 1.0])
    y = torch.tensor([0, 1, 2]) if net.num_classes else None
    out = net(x, t, y)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert not out.any()  # the first prediction is the mean of the target, zero
    assert perturbed(net)(x, t, y).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("asked", "heights"),
    [([], []), ([16], [16] * 3), ([8], [8] * 3), ([4], [4] * 4), ([16, 4], [16, 4, 4, 4, 4, 16, 16])],
)
def test_attention_sits_at_its_resolutions(asked, heights):
    """One block a level on the way down and two on the way up; the lowest level also has the middle."""
    args = UNET | {"channel_mult": [1, 2, 2], "attention_resolutions": asked}
    net = models.build("unet", (1, 16, 16), args)
    assert sorted(attention_heights(net, (1, 16, 16))) == sorted(heights)
    for module in net.modules():
        if isinstance(module, Attention):
            assert module.qkv.in_channels == 16 * module.heads


def test_attention_resolutions_count_patches():
    net = models.build("unet", (1, 16, 16), UNET | {"patch": 2, "attention_resolutions": [8]})
    assert set(attention_heights(net, (1, 16, 16))) == {8}


def test_attention_mixes_pixels_and_heads_stay_apart():
    """Against softmax(q k^T / sqrt(d)) v written out for each head."""
    torch.manual_seed(0)
    layer = Attention(16, heads=2)
    nn.init.normal_(layer.proj.weight)
    x = torch.randn(2, 16, 2, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # each [2, 16, 6]
    heads = []
    for rows in (slice(0, 8), slice(8, 16)):
        weights = (q[:, rows].transpose(1, 2) @ k[:, rows] / 8**0.5).softmax(-1)  # [2, 6, 6]
        heads.append((weights @ v[:, rows].transpose(1, 2)).transpose(1, 2))
    expected = x + layer.proj(torch.cat(heads, dim=1).view(2, 16, 2, 3))
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"attention_resolutions": [5]}, r"attention_resolutions=\[5\]: no level has 5 pixels; .* 8x8 images have 8, 4"),
        ({"attention_resolutions": [4, 2]}, r"no level has 2 pixels"),
        ({"channel_mult": [1, 1, 1, 1, 1]}, r"channel_mult=.*divisible by 16, the images are 8x8"),
        ({"patch": 3}, r"patch=3.*divisible by 6"),
        ({"head_channels": 12}, r"head_channels=12: must divide"),
        ({"head_channels": 64}, r"head_channels=64: must divide the 32 channels of the level with attention at 4 pixels"),
        ({"width": 18}, r"width=18: must be a multiple of 4"),
        ({"width": 0}, r"width=0"),
        ({"width": 16.0}, r"width=16.0: must be a whole number"),
        ({"channel_mult": []}, r"channel_mult=\[\]"),
        ({"channel_mult": [1, 0]}, r"channel_mult=\[1, 0\]"),
        ({"channel_mult": 2}, r"unet cannot be built"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"num_classes": 0}, r"num_classes=0"),
        ({"middle_attention": True, "attention_resolutions": [], "head_channels": 12}, r"head_channels=12: must divide the 32"),
        ({"scale_shift_norm": "off"}, r"scale_shift_norm='off': must be true or false"),
        ({"time_frequency": 1.0, "min_time_frequency": 1.0}, r"time_frequency=1.0: must be a number above 1, in radians"),
        ({"min_time_frequency": 0}, r"min_time_frequency=0: must be a finite number above 0"),
        ({"widht": 16}, r"unet has no argument 'widht'; it takes width, "),
        ({"image_shape": [1, 8, 8]}, r"unet has no argument 'image_shape'"),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        models.build("unet", (1, 8, 8), UNET | args)


def test_a_width_beyond_every_memory():
    with pytest.raises(ValueError, match=r"mlp cannot be built from \{'width': 10000000000\}"):
        models.build("mlp", (2,), {"width": 10**10})


def test_unknown_network():
    with pytest.raises(ValueError, match=r"unknown network 'resnet'; choose from unet"):
        models.build("resnet", (1, 8, 8), {})


def test_labels_change_output():
    """Labels change the output, and so does the null label."""
    net = perturbed(models.build("unet", (1, 8, 8), UNET | {"num_classes": 3}))
    assert net.num_classes == 3
    x, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 0.5)
    out = net(x, t, torch.arange(4))  # label 3 is the null label
    assert len({tuple(row.flatten().tolist()) for row in out}) == 4
    with pytest.raises(IndexError):
        net(x, t, torch.full((4,), 4))
    with pytest.raises(ValueError, match="needs labels"):
        net(x, t)


def test_time_changes_the_output():
    net = perturbed(models.build("unet", (1, 8, 8), UNET))
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    early, same, late = net(x, torch.tensor([0.3, 0.3, 0.31]))
    assert torch.allclose(early, same, atol=1e-6) and not torch.allclose(early, late, atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other():
    net = perturbed(models.build("unet", (1, 8, 8), UNET | {"num_classes": 2}))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert torch.allclose(net(x, t, y), alone, atol=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        {"num_classes": 2},
        {"patch": 2, "channel_mult": [1, 2, 2], "attention_resolutions": [2, 8]},
        {"middle_attention": True, "scale_shift_norm": False, "resblock_updown": False},
    ],
)
def test_the_gradient_reaches_every_parameter(args):
    net = perturbed(models.build("unet", (1, 16, 16), UNET | {"attention_resolutions": [8]} | args))
    y = torch.tensor([0, 1, 2]) if net.num_classes else None
    net(torch.randn(3, 1, 16, 16), torch.rand(3), y).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    if net.conditioning.label_embedding is not None:
        assert net.conditioning.label_embedding.weight.grad.any(dim=1).all()


def test_dropout_acts_in_training_only():
    net = perturbed(models.build("unet", (1, 8, 8), UNET | {"dropout": 0.5}))
    x, t = torch.randn(1, 1, 8, 8), torch.zeros(1)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.allclose(net(x, t), net(x, t))


def test_time_embedding():
    emb = sinusoidal_embedding(torch.tensor([0.0, 0.001, 1.0]), 8, 1000.0, 0.1)
    assert emb.shape == (3, 8)
    assert emb[0].tolist() == [1.0] * 4 + [0.0] * 4
    angles = torch.tensor([1.0, 10**-1, 10**-2, 10**-3])  # 1000 t x 10_000^(-k / 4)
    assert torch.allclose(emb[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-6)
    assert torch.allclose(emb[2], torch.cat([(1000 * angles).cos(), (1000 * angles).sin()]), atol=1e-3)


def test_time_embedding_of_a_narrow_range():
    """Frequencies 1 to 1e-4, t as it is: the features of torchcfm's U-Net."""
    emb = sinusoidal_embedding(torch.tensor([0.5]), 8, 1.0, 1e-4)
    angles = 0.5 * torch.tensor([1.0, 0.1, 0.01, 0.001])
    assert torch.allclose(emb[0], torch.cat([angles.cos(), angles.sin()]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "args"), [("unet", UNET), ("mini_unet", {"width": 16}), ("dit", {"width": 32, "depth": 1, "heads": 2})]
)
def test_a_lower_time_frequency_is_smoother_in_time(name, args):
    t = torch.linspace(0.5, 0.51, 11)
    x = torch.randn(1, 1, 8, 8).expand(11, -1, -1, -1)
    roughness = []
    for frequency in (1000.0, 30.0):
        torch.manual_seed(0)
        net = models.build(name, (1, 8, 8), {**args, "time_frequency": frequency})
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        v = net(x, t).detach()
        roughness.append((v.diff(dim=0).diff(dim=0).square().mean() / v.square().mean()).item())
    assert roughness[1] < roughness[0] / 100
    with pytest.raises(ValueError, match="time_frequency=0"):
        models.build(name, (1, 8, 8), {**args, "time_frequency": 0})


@pytest.mark.parametrize(
    ("shape", "args"),
    [((1, 28, 28), {}), ((3, 8, 12), {"patch": 1, "num_classes": 3}), ((1, 16, 16), {"patch": 4, "blocks_per_level": 2})],
)
def test_mini_unet_shape_and_labels(shape, args):
    """The output has the shape of the input and depends on labels."""
    net = models.build("mini_unet", shape, {"width": 16, "head_channels": 16} | args)
    x, t = torch.randn(1, *shape).expand(3, -1, -1, -1), torch.full((3,), 0.3)
    y = torch.tensor([0, 1, 3]) if net.num_classes else None  # 3: the null label
    out = net(x, t, y)
    assert out.shape == x.shape and not out.any()
    out = perturbed(net)(x, t, y)
    assert not torch.allclose(net(x, t + 0.3, y), out, atol=1e-4)
    if net.num_classes:
        assert net.null == 3 and not torch.allclose(out[0], out[1], atol=1e-4) and not torch.allclose(out[0], out[2], atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_classes": 3, "max_prompt_bytes": 5}, "num_classes=3, max_prompt_bytes=5: labels or prompts, not both"),
        ({"max_prompt_bytes": 0}, "max_prompt_bytes=0: must be a whole number of at least 1, or null"),
        ({"width": 18}, "width=18: must be a multiple of 4"),
        ({"head_channels": 24}, "head_channels=24: must divide 2 width = 32"),
        ({"patch": 3}, "patch=3: needs an image side divisible by 6, the images are 8x8"),
        ({"depth": 3}, "mini_unet has no argument 'depth'; it takes width"),
    ],
)
def test_mini_unet_names_the_argument_that_is_wrong(args, message):
    with pytest.raises(ValueError, match=message):
        models.build("mini_unet", (1, 8, 8), {"width": 16, "head_channels": 16} | args)


DIT = {"width": 32, "depth": 2, "heads": 2, "patch": 2}


@pytest.mark.parametrize(
    ("shape", "args"),
    [
        ((1, 8, 8), {}),
        ((1, 8, 8), {"positions": "sine"}),
        ((3, 8, 12), {"num_classes": 3}),
        ((4, 4, 4), {"num_classes": 3, "cross_attention": True, "patch": 1}),
        ((1, 8, 8), {"qk_norm": True, "num_classes": 3}),
    ],
)
def test_dit_shape_and_conditions(shape, args):
    """The output has the shape of the input and depends on time, place and label."""
    net = models.build("dit", shape, DIT | args)
    x, t = torch.randn(1, *shape).expand(3, -1, -1, -1), torch.full((3,), 0.3)
    y = torch.tensor([0, 1, 3]) if net.num_classes else None  # 3: the null label
    out = net(x, t, y)
    assert out.shape == x.shape and not out.any()
    out = perturbed(net)(x, t, y)
    assert not torch.allclose(net(x, t + 0.3, y), out, atol=1e-4)
    shifted = net(x.roll(net.patch, -1), t, y).roll(-net.patch, -1)
    assert not torch.allclose(shifted, out, atol=1e-4)  # a patch knows its place among the others
    if net.num_classes:
        assert not torch.allclose(out[0], out[1], atol=1e-4) and not torch.allclose(out[0], out[2], atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_ignores_length(qk_norm):
    """With qk-norm the length of queries and keys does not matter."""
    net = perturbed(models.build("dit", (1, 8, 8), DIT | {"qk_norm": qk_norm}))
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.3)
    before = net(x, t)
    with torch.no_grad():
        for block in net.blocks:
            for part in (block.qkv.weight, block.qkv.bias):
                part[: 2 * 32] *= 30
    assert torch.allclose(net(x, t), before, atol=1e-3) == qk_norm
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, t).isfinite().all()


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_dit_sizes_are_those_of_the_paper(size, millions):
    """Of DiT-*/2 on latents 4x32x32 with 1000 classes (Peebles & Xie 2023, table 4)."""
    with torch.device("meta"):
        net = models.build("dit", (4, 32, 32), {"size": size, "num_classes": 1000})
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_parameter_count_of_celebahq_dit():
    """The DiT of the CelebA-HQ config has 38.88 million parameters."""
    cfg = loading.load("configs/celebahq_dit.yaml")
    with torch.device("meta"):
        net = models.build(cfg.model.name, (4, 32, 32), cfg.model.args)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(38.88e6, rel=1e-3)


def test_rotary_scores_depend_on_distance():
    """Rotary scores depend on the difference of places."""
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turn = features(angles(4, 5, 8)).double()
    scores = rotate(q.expand(1, 1, 20, 8), turn)[0, 0] @ rotate(k.expand(1, 1, 20, 8), turn)[0, 0].T
    at = lambda r, c: r * 5 + c  # noqa: E731
    assert torch.allclose(scores[at(0, 0), at(1, 2)], scores[at(2, 1), at(3, 3)])
    assert not torch.allclose(scores[at(0, 0), at(1, 2)], scores[at(0, 0), at(2, 1)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"width": 36}, "width=36: must be divisible by 4 heads = 8"),
        ({"patch": 3}, "patch=3: must divide the image side, the images are 8x8"),
        ({"cross_attention": True}, "cross_attention=True: needs labels to attend to"),
        ({"positions": "learned"}, "positions='learned': must be rope or sine"),
        ({"depth": 0}, "depth=0: must be a whole number of at least 1"),
        ({"size": "M"}, "size='M': must be one of S, B, L, XL"),
    ],
)
def test_dit_names_the_argument_that_is_wrong(args, message):
    with pytest.raises(ValueError, match=message):
        models.build("dit", (1, 8, 8), DIT | args)


def test_mlp():
    net = models.build("mlp", (2,), {"width": 16, "depth": 2, "num_classes": 3})
    x, t, y = torch.randn(5, 2), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
    assert net(x, t, y).shape == x.shape and not net(x, t, y).any()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not torch.allclose(net(x, t, y), net(x, t, y.roll(1))) and not torch.allclose(net(x, t, y), net(x, t / 2, y))
    assert (net.num_classes, net.null, net.max_prompt_bytes) == (3, 3, None)
    with pytest.raises(ValueError, match="unet is a network for images"):
        models.build("unet", (2,), {})
    with pytest.raises(ValueError, match="depth=0: must be a whole number"):
        models.build("mlp", (2,), {"depth": 0})
