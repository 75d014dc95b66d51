"""Flows between two data sets: source samples by position, transfer and back, reflow, and what such a flow does not give."""

import json
import re

import pytest
import torch
from conftest import TINY, TINY_RUN, run_here, stranger
from PIL import Image

import datasets
from flow.couplings import PairedCoupling
from flow.evaluation import results
from flow.evaluation.metrics_2d import sliced_wasserstein
from flow.model import FlowModel
from flow.path import LinearPath
from flow.sampling import Sampler, sources

MODEL = ["model.name=mlp", "model.args={width: 16, depth: 2, time_frequency: 6.0}"]
MOONS = ["data.name=toys", "data.args={name: moons, n: 500}", *MODEL]
RING = ["flow.source.name=toys", "flow.source.args={name: eight_gaussians, n: 300}"]
TRAIN = [*TINY_RUN, "train.steps=40", "optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def transfer_run(tmp_path_factory):
    """Eight Gaussians to moons."""
    run = tmp_path_factory.mktemp("transfer") / "run"
    run_here("train", "-e", run, *MOONS, *RING, *TRAIN)
    return run


def ring(**args) -> torch.Tensor:
    return datasets.build("toys", None, {"name": "eight_gaussians", "n": 300, **args}).images


def test_a_sample_is_a_function_of_its_position():
    ours = sources.build("toys", None, {"name": "eight_gaussians", "n": 300})
    both, last = ours.draw("train", 7, [5, 3], (2,)), ours.draw("train", 7, [3], (2,))
    assert torch.equal(both[1], last[0]) and not torch.equal(both, ours.draw("train", 8, [5, 3], (2,)))
    points = ring().tolist()
    assert all(x in points for x in ours.draw("train", 7, range(50), (2,)).tolist())
    new = ring(seed=1)  # held-out points, in their order, again after the last
    assert torch.equal(ours.draw("sample", 7, [0, 1, 299, 300], (2,)), new[[0, 1, 299, 0]])


def test_gaussian_noise_takes_no_arguments():
    with pytest.raises(ValueError, match=r"args=\{'n': 3\}: gaussian takes none"):
        sources.build("gaussian", None, {"n": 3})


def test_transfer_and_back(transfer_run):
    """Sampling starts at the held-out points; the ODE solved backwards returns there."""
    sampler = Sampler.load(transfer_run, device="cpu")
    x0 = ring(seed=1)[:20]
    moved = sampler.transfer(x0, method="heun", steps=100)
    assert torch.equal(moved, sampler.sample(20, method="heun", steps=100)) and (moved - x0).norm(dim=1).min() > 0.01
    assert torch.allclose(sampler.encode(moved, steps=100).float(), x0, atol=5e-3)


def test_an_image_becomes_noise_and_an_image(tiny_run):
    """With its own label it returns, with another one it changes."""
    sampler = Sampler.load(tiny_run, device="cpu")
    images = sampler.sample(4, labels=[3], method="heun", steps=20)
    noise = sampler.encode(images, labels=[3] * 4, steps=20)
    back, edited = (sampler.transfer(noise, labels=[label], method="heun", steps=20) for label in (3, 7))
    assert (back.float() - images.float()).abs().mean() < 5 and not torch.equal(edited, back)


def test_no_preconditioning_from_another_source(error, tmp_path):
    """Its scales are those of a start at Gaussian noise."""
    line = error("train", *MOONS, *RING, *TRAIN, "model.args.data_std=0.5", "-e", tmp_path / "run")
    assert "model.args.data_std=0.5: scales inputs for a start at Gaussian noise; leave it out" in line


def test_what_transfer_refuses(transfer_run):
    """In one sentence that names the argument."""
    transfer = Sampler.load(transfer_run, device="cpu").transfer
    for x0, message in (
        (torch.full((3, 2), torch.nan), r"x0 of shape \(3, 2\): must have samples, all of them finite"),
        (torch.zeros(0, 2), r"x0 of shape \(0, 2\): must have samples"),
        (torch.zeros(3, 3), r"has samples of \(3,\), the flow works on \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(x0)


def test_flows_side_by_side_from_another_source(here, error, transfer_run, tmp_path):
    """compare starts where sample.py does, with --source and without."""
    command = ["compare", "--weights", transfer_run, "--sampling_steps", 4, "--n_samples", 300, "--frames", 2]
    own, other = (here(*command, *flags, "--out", tmp_path / "out") for flags in ([], ["--source", "toys:rings"]))
    assert "after the first 300 images" not in own and own.count("SW2") == other.count("SW2") == 1
    distances = [float(re.search(r"euler +\| +4 \| +4 \| +([\d.]+)", text).group(1)) for text in (own, other)]
    sampler, real = Sampler.load(transfer_run, device="cpu"), datasets.build("toys", None, {"name": "moons", "n": 500}).images
    starts = (ring(seed=1), datasets.build("toys", None, {"name": "rings", "n": 300}).images)
    expected = [sliced_wasserstein(sampler.transfer(x0, method="euler", steps=4), real) for x0 in starts]
    assert distances == pytest.approx(expected, abs=1e-4) and distances[0] != distances[1]
    line = error(*command, "--source", "toys", "--out", tmp_path / "b")
    assert "--source: toys: must be toys:SHAPE, SHAPE one of checkerboard, " in line


def test_pairs_start_where_reflow_expects_it(transfer_run, tmp_path):
    command = [
        "make_pairs",
        "--weights",
        transfer_run,
        "--n_pairs",
        40,
        "--sampling_steps",
        3,
        "--save_dir",
        tmp_path / "pairs",
    ]
    run_here(*command)
    pairs = datasets.build("pairs", None, {"path": str(tmp_path / "pairs")})
    sampler = Sampler.load(transfer_run, device="cpu")
    coupling = PairedCoupling(sampler.model.source, (2,), pairs)
    x0 = coupling.sample_x0(range(40), range(40), pairs.images, None)
    assert torch.allclose(sampler.transfer(x0, method="heun", steps=3), pairs.images.float(), atol=2e-3)
    assert all(x in ring().tolist() for x in x0.tolist())


def test_reflow_starts_at_the_same_source(transfer_run, tmp_path, error):
    run_here("make_pairs", "--weights", transfer_run, "--n_pairs", 64, "--sampling_steps", 2, "--save_dir", tmp_path / "pairs")
    reflow = [*MODEL, "data.name=pairs", f"data.args.path={tmp_path / 'pairs'}", "flow.coupling=paired", *TINY_RUN]
    run_here("train", "-e", tmp_path / "reflow", *reflow, *RING)
    assert "flow.source={'name': 'gaussian', 'args': {}}: must be that of the pairs" in error(
        "train", "-e", tmp_path / "other", *reflow
    )


def test_pairs_of_a_source_that_has_changed(transfer_run, tmp_path, error):
    """Which of its samples a pair starts from depends on all of them."""
    make = ["make_pairs", "--weights", transfer_run, "--n_pairs", 64, "--sampling_steps", 2, "--save_dir", tmp_path / "pairs"]
    run_here(*make)
    manifest = tmp_path / "pairs/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "source_fingerprint": "0123"}))
    reflow = [*MODEL, "data.name=pairs", f"data.args.path={tmp_path / 'pairs'}", "flow.coupling=paired", *TINY_RUN, *RING]
    line = error("train", "-e", tmp_path / "reflow", *reflow)
    assert "its samples are not those that the pairs start from; regenerate the pairs" in line
    assert "source_fingerprint" in error(*make)


def test_what_such_a_flow_does_not_give(transfer_run, tmp_path, error):
    sample = ["sample", "--weights", transfer_run, "--n_samples", 4, "--save_dir", tmp_path / "samples"]
    assert "does not start at Gaussian noise); use an ODE solver" in error(*sample, "--sampling_method", "euler_maruyama")
    with pytest.raises(ValueError, match=r"flow\.source\.name=toys: its density is not known"):
        Sampler.load(transfer_run, device="cpu").log_likelihood(torch.zeros(2, 2))
    assert "its density is not known" in error("likelihood", "--weights", transfer_run)
    animate = ["animate", "--weights", transfer_run, "--out", tmp_path / "figures", "--figures", "likelihood"]
    assert "--figures likelihood: the density of flow.source.name=toys is not known; choose flow or density" in error(*animate)
    assert not (tmp_path / "figures").exists()
    out = tmp_path / "evaluation"
    run_here(
        "evaluate", "--weights", transfer_run, "--n_samples", 20, "--methods", "euler", "--sampling_steps", 1, "--out", out
    )
    assert not any("held_out_log_p" in row["metrics"] for row in results.read(out))
    vp = ["train", "-e", tmp_path / "run", *MOONS, *RING, *TINY_RUN, "flow.path=vp", "flow.prediction=noise"]
    assert "flow.source.name=toys: needs flow.path=linear and flow.prediction=velocity" in error(*vp)
    shape = ["train", "-e", tmp_path / "run", *MOONS, *TINY_RUN, "flow.source.name=digits"]
    assert "digits: has samples of (1, 8, 8), the flow works on (2,)" in error(*shape)


@pytest.mark.parametrize("coupling", ["ot", "aligned", "paired"])
def test_a_coupling_leaves_no_score(tiny_run, coupling):
    sampler = Sampler.load(tiny_run, device="cpu")
    sampler.model.coupling = coupling
    with pytest.raises(ValueError, match=f"flow.coupling={coupling}: the noise depends on the data"):
        sampler.sample(2, method="euler_maruyama", steps=2)
    assert FlowModel(sampler.model.net, LinearPath(), (2,)).score_error is None


def test_images_from_a_folder_keep_their_order(tmp_path, here, error):
    """--source takes the place of the held-out samples; what it was belongs to the settings of the folder."""
    split = ["-c", "configs/digits.yaml", *TINY, *TINY_RUN, "model.args.num_classes=null", "data.args.split=train"]
    here("train", "-e", tmp_path / "run", *split, "flow.source.name=digits", "flow.source.args.split=train")
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = datasets.build("digits", None, {"split": "test"}).images[[9, 4, 7]]
    for k, image in enumerate(pixels):
        Image.fromarray(image[0].numpy()).save(folder / f"{k}.png")
    command = ["sample", "--weights", tmp_path / "run", "--n_samples", 3, "--sampling_method", "heun", "--sampling_steps", 2]
    assert "after the first" not in here(*command, "--save_dir", tmp_path / "a", "--source", folder)
    assert (tmp_path / "a/starts.csv").read_text().splitlines() == ["image,start", *(f"00000{k}.png,{k}.png" for k in range(3))]
    all_of_them = ["sample", "--weights", tmp_path / "run", "--sampling_steps", 1, "--save_dir", tmp_path / "all"]
    assert "3 images in" in here(*all_of_them, "--source", folder)
    here(*all_of_them, "--source", folder, "--n_samples", 1)  # which leaves the other two
    assert len((tmp_path / "all/starts.csv").read_text().splitlines()) == 4
    four = here(*command, "--n_samples", 4, "--save_dir", tmp_path / "four", "--source", folder)
    assert "has 3 samples, so after the first 3 images they come again" in four
    expected = Sampler.load(tmp_path / "run", device="cpu").transfer(pixels, method="heun", steps=2)
    for k in range(3):
        image = torch.frombuffer(bytearray(Image.open(tmp_path / "a" / "images" / f"{k:06d}.png").tobytes()), dtype=torch.uint8)
        assert torch.equal(image, expected[k].flatten())
    assert json.loads((tmp_path / "a" / "sampling.json").read_text())["source"] == str(folder)
    assert "source" in error(*command, "--save_dir", tmp_path / "a")
    assert "nowhere: there is no such folder of images, and no such data set" in error(
        *command, "--save_dir", tmp_path / "b", "--source", "nowhere"
    )
    Image.new("L", (8, 8)).save(folder / "0a.png")  # which moves the others back by one
    assert "source_fingerprint" in error(*command, "--save_dir", tmp_path / "a", "--source", folder)


def test_a_flow_from_noise_takes_no_source(tiny_run, tmp_path, error):
    command = ["sample", "--weights", tiny_run, "--n_samples", 3, "--save_dir", tmp_path / "a", "--source", "digits"]
    assert "--source: digits: this flow starts at Gaussian noise" in error(*command)
    line = error("sample", "--weights", tiny_run, "--save_dir", tmp_path / "a")
    assert line.endswith("--n_samples: how many images? This flow starts at noise")


def test_the_place_of_a_source_in_a_strangers_file(transfer_run, tmp_path, error):
    config = (transfer_run / "config.yaml").read_text().replace("'n': 300", "'n': 300\n      path: /etc/source.png")
    weights = stranger(transfer_run, tmp_path / "file.safetensors", config=config)
    command = ["sample", "--weights", weights, "--n_samples", 4, "--save_dir", tmp_path / "samples"]
    assert "add flow.source.args.path=/etc/source.png" in error(*command)
