"""Snapshots on the Hugging Face hub, by the real client against a stand-in server on this machine (hub_server.py)."""

import pickle
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import TINY_TRAIN, run_here, stranger, succeed
from hub_server import HubServer, serve
from huggingface_hub import ModelCard, constants
from small_files import Payload

from configs.errors import UserError
from flow.sampling import Sampler, hub, snapshot

DEFAULT_ENDPOINT = constants.ENDPOINT  # from which the client made a template when it was imported
SAMPLE = ["--n_samples", "6", "--sampling_steps", "2", "--guidance_scale", "2"]


@pytest.fixture(scope="module")
def server():
    with serve() as server:
        yield server


@pytest.fixture(autouse=True)
def client(server: HubServer, monkeypatch, tmp_path) -> Path:
    """The real client, with the stand-in as its endpoint and an empty cache."""
    server.requests.clear()
    server.created.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(DEFAULT_ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def export(server: HubServer, tiny_run, tmp_path_factory) -> dict[str, bytes]:
    """The files of an exported fp32 folder, which lie in hf:me/tiny."""
    folder = tmp_path_factory.mktemp("export") / "tiny"
    run_here("export", "--weights", tiny_run, "--to", folder, "--dtype", "fp32", "--license", "cc0-1.0")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.repositories["me/tiny"] = dict(files)
    return files


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "images").iterdir())]


def test_pushed_and_sampled(here, error, server, tiny_run, tmp_path):
    """The folder goes up as one commit, with the token; its samples are those of the run."""
    printed = here("export", "--weights", tiny_run, "--push", "hf:me/new", "--dtype", "fp32", "--private", "--license", "mit")
    files = server.repositories["me/new"]
    assert files.keys() == set(hub.FILES) and f"uploaded to {server.url}/me/new" in printed
    assert server.created[0]["visibility"] == "private" and sum("/commit/" in line for line in server.requests) == 1
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and "flow-matching" in card.data.tags
    assert "--weights hf:me/new" in card.text and "128 (4 steps)" in card.text

    for name, weights in {"local": tiny_run, "hub": "hf:me/new", "commit": f"hf:me/new@{server.commit('me/new')}"}.items():
        here("sample", "--weights", weights, *SAMPLE, "--save_dir", tmp_path / name)
    assert images(tmp_path / "local") == images(tmp_path / "hub") == images(tmp_path / "commit")
    assert sum(line.startswith("GET") and line.endswith("/model.safetensors") for line in server.requests) == 1
    title = snapshot.load("hf:me/new").title("hf:me/new")
    assert title == "new@4"
    files["notes.txt"] = b"mine"
    assert "holds other files (notes.txt)" in error("export", "--weights", tiny_run, "--push", "hf:me/new")


def test_guide_and_first_weights_from_the_hub(here, server, export, tiny_run, tmp_path):
    """As from the run that was exported."""
    for name, guide in {"local": tiny_run, "hub": "hf:me/tiny"}.items():
        here("sample", "--weights", tiny_run, "--guide_weights", guide, *SAMPLE, "--save_dir", tmp_path / name)
    assert images(tmp_path / "local") == images(tmp_path / "hub")
    one_small_step = ["train.init_from=hf:me/tiny", "train.steps=1", "optimizer.lr=1e-9"]
    here("train", *TINY_TRAIN, *one_small_step, "-e", tmp_path / "run")
    torch.testing.assert_close(snapshot.load(tmp_path / "run").weights, snapshot.load(tiny_run).weights, rtol=0, atol=1e-7)


def test_nothing_that_runs_is_fetched(server, export, client, tmp_path, tiny_run):
    marks = [tmp_path / name for name in ("unpickled", "imported")]
    code = f"open({str(marks[1])!r}, 'w')"
    files = {"model.bin": pickle.dumps(Payload(marks[0])), "modeling.py": code.encode(), "pytorch_model.pt": b"x"}
    server.repositories["me/evil"] = {**export, **files, "nested/model.safetensors": b"x"}
    sampler = Sampler.load("hf:me/evil", "cpu")
    expected = Sampler.load(tiny_run, "cpu").sample(3, steps=1)
    assert torch.equal(sampler.sample(3, steps=1), expected)
    fetched = {line.rpartition("/")[2] for line in server.requests if "/resolve/" in line}
    assert fetched == set(hub.FETCHED) and not any("nested" in line for line in server.requests)
    cached = {path.name for path in client.rglob("*") if path.parent.parent.name == "snapshots"}
    assert cached == set(hub.FETCHED) and not any(mark.exists() for mark in marks)


def test_tampered_weights_are_refused(server, export):
    weights = bytearray(export[hub.WEIGHTS_FILE])
    weights[-1] ^= 1
    server.repositories["me/tampered"] = {**export, hub.WEIGHTS_FILE: bytes(weights)}
    with pytest.raises(UserError, match="has changed since it was written"):
        snapshot.load("hf:me/tampered")


def test_places_of_a_stranger(server, tiny_run, tmp_path):
    """The data.root of its configuration is used only where the command line repeats it, or names another one."""
    path = stranger(tiny_run, tmp_path / "s.safetensors", {"root: null": "root: /srv/secret"})
    server.repositories["me/places"] = {hub.WEIGHTS_FILE: path.read_bytes(), "config.yaml": b"{}"}
    with pytest.raises(UserError, match=r"the place data\.root=/srv/secret in it is used only where"):
        snapshot.load("hf:me/places").check_data()
    snap = snapshot.load("hf:me/places", overrides=["data.root=/mine"])
    snap.check_data()
    assert snap.config.data.root == "/mine"


def test_mistakes_are_one_line(error, server, export, tiny_run, tmp_path, monkeypatch):
    sample = [*SAMPLE, "--save_dir", tmp_path / "out", "--weights"]
    assert "hf:me/nobody: there is no such repository, or it is private" in error("sample", *sample, "hf:me/nobody")
    assert "hf:me/tiny@v2: the repository has no such revision" in error("sample", *sample, "hf:me/tiny@v2")
    assert "must be hf:owner/name or hf:owner/name@revision" in error("sample", *sample, "hf:tiny")
    server.repositories["me/empty"] = {"README.md": b"#", "weights.bin": b"x"}
    assert "hf:me/empty: the repository has no model.safetensors" in error("sample", *sample, "hf:me/empty")
    assert "leave out @v2" in error("export", "--weights", tiny_run, "--push", "hf:me/tiny@v2")
    server.repositories["me/other"] = {"README.md": b"# of another project", "model.safetensors": b"x"}
    assert "holds no export of this project" in error("export", "--weights", tiny_run, "--push", "hf:me/other")
    assert server.repositories["me/other"]["README.md"] == b"# of another project"
    files = ["--out", tmp_path / "w.safetensors", "--to", tmp_path / "folder"]
    for flags in (["--license", "My own"], ["--push", "hf:me/tiny@v2"]):
        error("export", "--weights", tiny_run, *files, *flags)
        assert not (tmp_path / "w.safetensors").exists() and not (tmp_path / "folder").exists()
    assert "copy them to a folder with" in error("optimize_grid", "--weights", "hf:me/tiny", "--methods", "ab2", "--steps", "4")
    monkeypatch.setenv("HF_TOKEN", "another")
    assert "log in with `hf auth login`" in error("export", "--weights", tiny_run, "--push", "hf:me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert "there is no token" in error("export", "--weights", tiny_run, "--push", "hf:me/tiny")
    assert not (tmp_path / "out").exists()


def test_study_of_the_hub_suggests_a_copy(here, export, monkeypatch, tmp_path):
    """Time grids lie beside the weights, so these come first."""
    monkeypatch.chdir(tmp_path)
    study = ["solver_study", "--weights", "hf:me/tiny", "--out", "study", "--n_images", "2", "--t_end", "0.1"]
    (command,) = re.findall(r"copy the weights with: (.+)$", here(*study, "--methods", "euler", "--sampling_steps", "2"), re.M)
    words = shlex.split(command)
    script, *arguments = words[words.index("-m") + 1 :]
    here(script.removeprefix("scripts."), *arguments)
    assert (tmp_path / "tiny" / hub.WEIGHTS_FILE).is_file()


def test_unreachable_hub(error, server, export, tiny_run, tmp_path, monkeypatch):
    """What the cache has is used; the rest is one line."""
    snapshot.load("hf:me/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert snapshot.load("hf:me/tiny").step == 4
    message = error("sample", *SAMPLE, "--save_dir", tmp_path / "out", "--weights", "hf:me/other")
    assert "hf:me/other: the hub (http://127.0.0.1:9) cannot be reached, and the cache does not have the files" in message
    assert "(http://127.0.0.1:9) cannot be reached" in error("export", "--weights", tiny_run, "--push", "hf:me/other")


def test_exported_folder(here, error, tiny_run, tmp_path):
    """Whole or absent, the same twice, and no other folder is touched."""
    folder, flags = tmp_path / "tiny", ["--weights", tiny_run, "--to", tmp_path / "tiny"]
    here("export", *flags, "--dtype", "bf16")
    assert {path.name for path in folder.iterdir()} == set(hub.FILES) and list(tmp_path.iterdir()) == [folder]
    assert snapshot.load(folder).weights["conv_in.weight"].dtype == torch.bfloat16
    assert "there already" in here("export", *flags, "--dtype", "bf16")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\nMy own words.\n")  # which stay
    assert "there already" in here("export", *flags, "--dtype", "bf16")
    assert "names another license" in error("export", *flags, "--dtype", "bf16", "--license", "mit")
    assert "My own words." in (folder / "README.md").read_text() and "PATH_OF_THIS_FOLDER" in card
    assert "holds something else than this export" in error("export", *flags)
    (folder / "README.md").unlink()
    assert "holds something else than this export" in error("export", *flags, "--dtype", "bf16")
    assert "must be an identifier" in error("export", "--weights", tiny_run, "--to", tmp_path / "b", "--license", "My own: 1")
    assert list(tmp_path.iterdir()) == [folder] and "give at least one of" in error("export", "--weights", tiny_run)


def test_export_has_samples_and_table_of_the_run(here, tmp_path):
    """The preview of the run is of its first moving average."""
    run = tmp_path / "run"
    here("train", *TINY_TRAIN, "ema.half_life_images=[100, 7]", "-e", run)
    (run / "samples" / "step_00000004.png").write_bytes(b"the preview")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.md").write_text("| weights | FD-digits |\n|---|---|\n| run@4 | 12.5 |\n")
    for name, of_first in (("step_00000004.safetensors", True), ("step_00000004.ema_7.safetensors", False)):
        here("export", "--weights", run / "snapshots" / name, "--to", tmp_path / name)
        assert ((tmp_path / name / "samples.png").read_bytes() == b"the preview") == of_first
        assert "## Measured\n\n| weights | FD-digits |\n" in (tmp_path / name / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_fetch_once(server, export, tmp_path):
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = ["sample.py", "--weights", "hf:me/tiny", *SAMPLE, "--bspp", "3"]
    succeed(*command, "--save_dir", tmp_path / "two", processes=2, **environment)
    assert sum(line.startswith("GET") and line.endswith("/model.safetensors") for line in server.requests) == 1
    assert sum("/revision/main" in line for line in server.requests) == 1
    succeed(*command, "--save_dir", tmp_path / "one", **environment)
    assert images(tmp_path / "one") == images(tmp_path / "two")
