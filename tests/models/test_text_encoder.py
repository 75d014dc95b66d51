"""Prompts: bytes, the limit, the empty prompt, captions by templates, a network that reads."""

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_RUN

import models
from datasets import captions
from flow.evaluation import results
from flow.guidance import GuidedVelocity, drop_labels
from models import text_encoder
from models.mini_unet import MiniUNet
from models.preconditioning import Preconditioned

NAMES = tuple("0123456789")
MNIST_NAMES = ("0 - zero", "7 - seven")
NET = {"width": 16, "head_channels": 16, "patch": 1, "max_prompt_bytes": 48}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = models.build("mini_unet", (1, 8, 8), NET).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def test_tokens_are_bytes():
    tokens = text_encoder.encode(["ab", "数字7", ""], 10)
    assert tokens[0].tolist() == [ord("a") + 1, ord("b") + 1] + [0] * 8
    assert (tokens[1] > 0).sum() == 7 and tokens[2].sum() == 0
    with pytest.raises(ValueError, match="has 11 bytes, this network reads at most 10"):
        text_encoder.encode(["hello world"], 10)


def test_network_reads_its_prompt(net):
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.4)
    x = x[:1].expand(3, -1, -1, -1)
    a, b, _ = net(x, t, net.encode(["a seven", "a three", ""]))
    assert not torch.allclose(a, b, atol=1e-3)
    empty = net(x[:1], t[:1], torch.full((1, 48), net.null))
    assert empty.isfinite().all() and not torch.allclose(empty[0], a, atol=1e-3)
    # the same words in another place are other words: positions are seen
    assert not torch.allclose(net(x[:1], t[:1], net.encode(["seven a"]))[0], a, atol=1e-4)
    with pytest.raises(ValueError, match="this network reads prompts: it needs tokens"):
        net(x, t)


def test_padding_changes_nothing():
    """What lies behind the prompt is read by no token and by no pixel."""
    torch.manual_seed(0)
    net = models.build("mini_unet", (1, 8, 8), NET).eval()
    torch.nn.init.normal_(net.conv_out.weight)
    torch.nn.init.normal_(net.text_attention.proj.weight)
    x, t, tokens = torch.randn(1, 1, 8, 8), torch.tensor([0.4]), net.encode(["a seven"])
    before = net(x, t, tokens)
    with torch.no_grad():
        net.text_encoder.positions[len("a seven") :] += 1
    torch.testing.assert_close(net(x, t, tokens), before)
    with torch.no_grad():
        net.text_encoder.positions[: len("a seven")] += torch.randn(7, 32)
    assert not torch.allclose(net(x, t, tokens), before, atol=1e-3)


def test_layers_start_with_weights_of_their_own():
    first, second = text_encoder.TextEncoder(8, 16).layers.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_every_parameter_gets_a_gradient(net):
    out = net(torch.randn(2, 1, 8, 8), torch.rand(2), net.encode(["a seven", "数字3"]))
    out.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_dropping_makes_the_empty_prompt(net):
    tokens = net.encode(["a seven"] * 8)
    dropped = drop_labels(tokens, slice(0, 8), 0, 1, 8, 0.5, net.null)
    empty = (dropped == 0).all(1)
    assert 0 < empty.sum() < 8 and torch.equal(dropped[~empty], tokens[~empty])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("data_std", [None, 0.5])
def test_sampling_encodes_prompts_once(net, scale, data_std):
    """The velocity with prompts encoded once is that of tokens."""
    encoded = []
    handle = net.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    flow = net if data_std is None else Preconditioned(net, data_std)
    x, tokens = torch.randn(2, 1, 8, 8), net.encode(["a seven", "a three"])
    velocity = GuidedVelocity(flow, tokens, net.null, scale)
    with torch.no_grad():
        once = [velocity(x, t) for t in (0.1, 0.4)]
    assert len(encoded) == 1
    each = [velocity(x, t) for t in (0.1, 0.4)]
    assert len(encoded) == 3 and all(v.requires_grad for v in each)  # each has a graph of its own
    handle.remove()
    torch.testing.assert_close(once, each)


def test_only_digits_are_read_as_digits():
    assert captions.plain("7 - seven") == captions.plain("7") == "a handwritten seven"
    assert captions.plain("7 series") == "a picture of 7 series"


@pytest.mark.parametrize("names", [NAMES, MNIST_NAMES, ("ship", "frog")])
def test_captions_name_their_class(names):
    """Captions name their class and never use a held-out wording."""
    generator = np.random.default_rng(0)
    held_out = {wording for name in names for wording in captions.held_out(name)}
    limit = captions.longest(names)
    drawn = {name: {captions.draw(name, generator) for _ in range(2000)} for name in names}
    for name, wordings in drawn.items():
        digit = name.split(" ")[0]
        chinese = "零一二三四五六七八九"
        words = (digit, captions.plain(name).split()[-1], chinese[int(digit)]) if digit.isdigit() else (name,)
        assert all(any(word in wording for word in words) for wording in wordings)
        assert not wordings & held_out
        assert max(len(w.encode()) for w in wordings | held_out) <= limit
        assert len(wordings) > 300
    assert len({len(captions.held_out(name)) for name in names}) == 1


def test_training_and_prompting(tmp_path, here, error, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "samples"
    config = tmp_path / "text.yaml"
    config.write_text(yaml.safe_dump({"data": {"name": "digits"}, "model": {"name": "mini_unet", "args": NET}}))
    arguments = ["-c", config, *TINY_RUN]
    here("train", *arguments, "-e", run)
    sample = ["--weights", run, "--n_samples", "6", "--save_dir", out, "--sampling_steps", "2"]
    guided = ["--guidance_scale", "2", "--grid_by_class", "-mp", "bf16"]
    here("sample", *sample, "--prompts", "a handwritten three", "数字7", *guided)
    assert len(list((out / "images").iterdir())) == 6
    assert "reads prompts (of at most 48 bytes): give some with --prompts" in error("sample", *sample)
    assert "has 60 bytes, this network reads at most 48" in error("sample", *sample, "--prompts", "x" * 60)
    read, encode = [], MiniUNet.encode
    monkeypatch.setattr(MiniUNet, "encode", lambda net, prompts: read.extend(prompts) or encode(net, prompts))
    evaluate = ["--weights", run, "--sampling_steps", "1", "--n_samples", "60", "--metrics", "accuracy", "fid", "--no_control"]
    told = here("evaluate", *evaluate, "--feature_extractor", "digits", "--captions", "held_out", "--out", tmp_path / "table")
    assert set(read) == {wording for name in NAMES for wording in captions.held_out(name)}
    assert "| captions |" in told and "held_out" in told
    (row,) = results.read(tmp_path / "table")
    assert row["captions"] == "held_out" and 0 <= row["metrics"]["accuracy"] < 0.5  # the network knows nothing yet
    line = error("train", *arguments, "model.args.max_prompt_bytes=10", "-e", tmp_path / "short")
    assert "model.args.max_prompt_bytes=10: captions have up to" in line
