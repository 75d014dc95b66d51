"""Samplers as one graph: the images of a file are those of the sampler, for each kind of network."""

import io
import json
from pathlib import Path

import pytest
import torch

import models
from configs import loading
from configs.errors import UserError
from flow.noise import gaussian_noise
from flow.sampling import Sampler, digest, graph, snapshot
from flow.sampling.images import to_uint8
from flow.sampling.settings import SamplerSettings

UNET = "model.args={width: 8, blocks_per_level: 1, attention_resolutions: [4], head_channels: 8, num_classes: 3}"
DIT = "model.args={width: 16, depth: 1, heads: 2, patch: 2, num_classes: 3}"
NETWORKS = {
    "unet": (["model.name=unet", UNET], (1, 8, 8), "heun"),
    "no_labels": (["model.name=mini_unet", "model.args={width: 8, head_channels: 8}"], (3, 8, 8), "ab2"),
    "flow_map": (["model.name=mini_unet", "model.args={width: 8, head_channels: 8, num_classes: 3, two_times: true}"],
                 (1, 8, 8), "euler"),
    "ddpm": (["model.name=dit", DIT, "flow.path=vp", "flow.prediction=noise"], (1, 8, 8), "ddim"),
    "points": (["model.name=mlp", "model.args={width: 8}"], (2,), "rk4"),
}  # fmt: skip


def snapshot_of(path: Path, keys: list[str], shape: tuple[int, ...]) -> Path:
    """A network with random weights, none of them zero."""
    config = loading.load(None, keys)
    torch.manual_seed(0)
    net = models.build(config.model.name, shape, config.model.args)
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in net.state_dict().items()}
    names = ("a", "b", "c") if "num_classes" in config.model.args else ()
    snapshot.save(path, weights, config, shape, 3, 500, class_names=names)
    return path


def inputs_of(shape: tuple[int, ...], labels: list[int] | None, scale: float) -> list[torch.Tensor]:
    noise = gaussian_noise("sample", 8888, range(5), shape)
    return [noise] if labels is None else [noise, torch.tensor(labels), torch.tensor(scale)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "flow_map" else pytest.mark.slow) for n in NETWORKS])
def test_torch_export_is_the_sampler(here, tmp_path, name):
    """With another batch size, other labels and another scale than those of the check before it is written."""
    keys, shape, method = NETWORKS[name]
    weights, file = snapshot_of(tmp_path / "s.safetensors", keys, shape), tmp_path / "g.pt2"
    flags = ["--sampling_steps", "2", "--sampling_method", method]
    assert "gray levels from the sampler" in here("export", "--weights", weights, "--torch_export", file, *flags)
    metadata = {"metadata.json": ""}
    module = torch.export.load(io.BytesIO(file.read_bytes()), extra_files=metadata).module()
    labels = [2, 0, 0, 1, 2] if "num_classes" in keys[1] else None
    output = module(*inputs_of(shape, labels, 3.0))
    guided = {"labels": labels, "guidance_scale": 3.0} if labels else {}
    expected = Sampler.load(weights, "cpu").sample(5, method=method, steps=2, **guided)
    assert output.dtype == torch.float32 and expected.float().std() > 0.1
    if name == "points":
        assert torch.allclose(output, expected, atol=1e-4)
    else:
        assert output.abs().max() <= 1 and (to_uint8(output).int() - expected.int()).abs().max() <= 1
    stored = json.loads(metadata["metadata.json"])
    assert stored["sampling_method"] == method and stored["sampling_steps"] == 2 and stored["image_shape"] == json.dumps(shape)
    assert stored["weights_digest"] == digest.stored_and_actual(weights)[0]
    assert json.loads(stored["class_names"]) == (["a", "b", "c"] if labels else [])


@pytest.mark.slow
def test_onnx_is_the_sampler(here, tmp_path):
    for package in graph.ONNX_PACKAGES:
        pytest.importorskip(package)
    import onnxruntime

    keys, shape, _ = NETWORKS["flow_map"]
    weights, file = snapshot_of(tmp_path / "s.safetensors", keys, shape), tmp_path / "g.onnx"
    here("export", "--weights", weights, "--onnx", file, "--sampling_steps", "2")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    labels = [2, 0, 0, 1, 2]
    values = [value.numpy() for value in inputs_of(shape, labels, 3.0)]
    [output] = session.run(["images"], dict(zip(["noise", "labels", "guidance_scale"], values, strict=True)))
    expected = Sampler.load(weights, "cpu").sample(5, steps=2, labels=labels, guidance_scale=3.0)
    assert (to_uint8(torch.from_numpy(output)).int() - expected.int()).abs().max() <= 1
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["class_names"]) == ["a", "b", "c"] and stored["sampling_steps"] == "2"
    assert stored["weights_digest"] == digest.stored_and_actual(weights)[0]


def test_a_graph_of_nan_is_not_written(tmp_path):
    """A difference that is NaN is neither small nor large."""
    keys, shape, _ = NETWORKS["points"]
    snap, settings = snapshot.load(snapshot_of(tmp_path / "s.safetensors", keys, shape)), SamplerSettings("euler", 1)
    _, program = graph.build(snap, settings)
    for value in program.state_dict.values():
        value.detach().fill_(torch.nan)
    with pytest.raises(UserError, match="differ from those of the sampler by nan gray levels; not written"):
        graph.write_torch(tmp_path / "g.pt2", snap, settings, snap.model(), program)
    assert not (tmp_path / "g.pt2").exists()


def test_mistakes_write_no_file(error, tmp_path, monkeypatch):
    keys, shape, _ = NETWORKS["points"]
    weights, file = snapshot_of(tmp_path / "s.safetensors", keys, shape), tmp_path / "g.pt2"
    flags = ["--weights", weights, "--torch_export", file]
    assert "--sampling_steps: --onnx and --torch_export need it" in error("export", *flags)
    message = error("export", "--weights", weights, "--out", file, "--sampling_steps", "2")
    assert "--sampling_steps: goes with --onnx and --torch_export" in message
    assert "--license: goes with --to and --push" in error("export", *flags, "--sampling_steps", "2", "--license", "mit")
    prompts = "model.args={width: 8, head_channels: 8, max_prompt_bytes: 4}"
    text = snapshot_of(tmp_path / "t.safetensors", ["model.name=mini_unet", prompts], (1, 8, 8))
    assert "reads prompts has no graph" in error("export", "--weights", text, "--torch_export", file, "--sampling_steps", "2")
    monkeypatch.setattr(graph, "MAX_DIFFERENCE", -1.0)
    assert "its images differ from those of the sampler by 0." in error("export", *flags, "--sampling_steps", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.safetensors", "t.safetensors"]
    file.touch()
    assert "exists already" in error("export", *flags, "--sampling_steps", "2")
