"""Configurations: what is resolved and what is stored, and arguments that belong to a name."""

import pytest
import torch
from conftest import TINY_RUN
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs import keys, loading, schema
from configs.errors import UserError
from datasets.places import default_root
from flow import path
from flow.sampling import locate
from flow.sampling.images import write_png

MLP = [*TINY_RUN, "model.name=mlp", "model.args={width: 8, depth: 1}", "train.steps=2"]


def header_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {key: value for key, value in file.metadata().items() if key != "digest"}


def test_text_from_the_environment_is_stored_as_typed(here, error, monkeypatch, tmp_path):
    """Own numbers and references are stored as values; config.yaml and snapshots do not tell what a variable held."""
    monkeypatch.setenv("PLACE", str(tmp_path / "hunter2"))
    monkeypatch.setenv("STEPS", "2")
    run = tmp_path / "run"
    typed = ["data.root=${oc.env:PLACE}/data", "train.steps=${oc.env:STEPS}", "preview.seed=${train.batch_size}"]
    here("train", *MLP, *typed, "-e", run)
    for text in ((run / "config.yaml").read_text(), header_of(locate.find(run))["config"]):
        assert "root: ${oc.env:PLACE}/data" in text and "hunter2" not in text
        assert "steps: 2\n" in text and "seed: 32\n" in text
    line = error("train", "-e", run, "-r", "latest")
    assert "config.yaml: data.root=${oc.env:PLACE}/data: a stored configuration resolves nothing; give data.root=..." in line
    assert "finished step 2" in here("train", "-e", run, "-r", "latest", "data.root=${oc.env:PLACE}")
    assert "hunter2" not in (run / "config.yaml").read_text()
    here("sample", "--weights", run, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", tmp_path / "out")
    assert "data.root=${oc.env:PLACE}/data: a stored" in error("evaluate", "--weights", run, "--n_samples", "4")


@pytest.mark.parametrize("key", ["model.args.width", "flow.path"])
def test_a_header_resolves_nothing(error, here, monkeypatch, tiny_run, tmp_path, key):
    """An interpolation that sampling needs is refused, and may be given on the command line."""
    monkeypatch.setenv("SECRET", "hunter2")
    header, path = header_of(locate.find(tiny_run)), tmp_path / "s.safetensors"
    value = {"model.args.width": "width: 16", "flow.path": "path: linear"}[key]
    name, right = value.split(": ")
    header["config"] = header["config"].replace(value, f"{name}: ${{oc.env:SECRET}}", 1)
    save_file(load_file(locate.find(tiny_run)), path, metadata=header)
    ask = ["--weights", path, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", tmp_path / "out"]
    line = error("sample", *ask)
    assert f"{key}=${{oc.env:SECRET}}: a stored configuration resolves nothing" in line and "hunter2" not in line
    here("sample", *ask, f"{key}={right}")


def test_aliases_in_a_stored_configuration_are_refused():
    """Ten lines of them are a thousand million values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 11)]
    with pytest.raises(UserError, match="holds YAML aliases"):
        loading.parse("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "args", "before", "after"),
    [
        ("model.name=mlp", "model.args", "model.args.width=8", {"width": 8}),
        ("data.name=toys", "data.args", "data.args.name=moons", {"name": "moons"}),
        ("flow.time_sampler=logit_normal", "flow.time_sampler_args", "flow.time_sampler_args.mean=1", {"mean": 1}),
        ("loss.name=distillation", "loss.args", "loss.args.x=1", {"x": 1}),
        ("flow.coupling=ot", "flow.coupling_args", "flow.coupling_args.x=1", {"x": 1}),
    ],
)
def test_another_name_has_arguments_of_its_own(tmp_path, name, args, before, after):
    """Those of the YAML were for another one; those of the command line count, wherever they stand."""
    section, key = args.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}: {{{key}: {{from_yaml: 1}}}}")
    for overrides in ([name, before], [before, name]):
        assert keys.get(loading.load(tmp_path / "c.yaml", overrides), args) == after
    same = f"{name.split('=')[0]}={keys.get(loading.load(), name.split('=')[0])}"
    assert keys.get(loading.load(tmp_path / "c.yaml", [same, before]), args) == {"from_yaml": 1, **after}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntrain:\n  steps: 3\n  steps: 5\n", "found duplicate key steps, line 4"),
        ("seed: 1\nseed: 1\n", "seed, line 2"),
    ],
)
def test_duplicate_keys_are_named(error, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert message in error("train", "-c", tmp_path / "c.yaml", "-e", tmp_path / "run")


@pytest.mark.parametrize("override", ['data.root="a\\0b"', 'data.args={path: "\\0"}', 'train.init_from="\\0"'])
def test_text_that_no_file_name_can_have(error, tmp_path, override):
    assert "holds a character that no file name" in error("train", *MLP, override, "-e", tmp_path / "run")


@pytest.mark.parametrize("override", ["model.args.time_frequency=.nan", "loss.args={weight_power: .nan}", "train.steps=.nan"])
def test_numbers_that_are_none(error, tmp_path, override):
    (line,) = error("train", *MLP, override, "-e", tmp_path / "run").splitlines()
    assert "nan" in line and override.split("=")[0] in line and "start this command again" not in line


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: {root: ~/data, args: {path: ~/photos}}")
    config = loading.load(tmp_path / "c.yaml", ["train.init_from=~/runs/a"])
    assert (config.data.root, config.data.args["path"]) == (f"{tmp_path}/data", f"{tmp_path}/photos")
    assert config.train.init_from == f"{tmp_path}/runs/a"
    monkeypatch.setenv("FLOW_DATA", "~/sets")
    assert default_root() == tmp_path / "sets"


@pytest.mark.parametrize("override", ["train.log_with=[[1]]", "optimizer.betas=[{a: 1}, 0.9]"])
def test_elements_of_lists_of_another_kind(error, tmp_path, override):
    assert override.split("=")[0] in error("train", *MLP, override, "-e", tmp_path / "run")


def test_divergence_in_last_step_saves_nothing(error, tmp_path):
    """A training that diverges in its last step saves nothing."""
    line = error("train", *MLP, "train.steps=1", "optimizer.lr=1e38", "optimizer.eps=1e-38", "-e", tmp_path / "run")
    assert "is not finite after step 1; there is no checkpoint yet" in line
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_yaml_with_environment_is_resumed(here, monkeypatch, tmp_path):
    """A run whose YAML reads the environment is resumed with its YAML."""
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: {name: toys, args: {name: image, path: '${oc.env:PLACE}/p.png'}}")
    write_png(tmp_path / "p.png", torch.zeros(1, 4, 4, dtype=torch.uint8))
    run = ["-c", tmp_path / "c.yaml", *MLP, "-e", tmp_path / "run"]
    here("train", *run)
    assert "finished step 3" in here("train", *run, "-r", "latest", "train.steps=3")


def test_variable_that_is_not_set(monkeypatch, tmp_path):
    """The error names key and variable; an override of the key does without it."""
    monkeypatch.delenv("PLACE", raising=False)
    (tmp_path / "c.yaml").write_text("data: {root: '${oc.env:PLACE}/data'}")
    with pytest.raises(UserError, match=r"^data.root=\$\{oc.env:PLACE\}/data: .*'PLACE' not found"):
        loading.load(tmp_path / "c.yaml")
    assert loading.load(tmp_path / "c.yaml", ["data.root=here"]).data.root == "here"


def test_predictions_are_those_of_the_method():
    """configs/ imports nothing of flow/, so the choices stand in both."""
    assert schema.PREDICTIONS == path.PREDICTIONS


def test_conditional_mnist_config_differs_once():
    """The conditional MNIST configuration differs in one switch."""
    plain, conditional = (loading.load(f"configs/{name}.yaml") for name in ("mnist_mini", "mnist_mini_cond"))
    assert (plain.model.args.pop("num_classes"), conditional.model.args.pop("num_classes")) == (None, 10)
    assert plain == conditional


def test_digest_is_of_the_values(tmp_path):
    """However they are written; of defaults nothing counts."""
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 2e-3}\n")
    (tmp_path / "b.yaml").write_text("seed: 0\noptimizer: {lr: 0.002}\n")
    a, b, c = (
        loading.digest(loading.load(*given))
        for given in ((tmp_path / "a.yaml", []), (tmp_path / "b.yaml", []), (tmp_path / "a.yaml", ["model.args={width: 8}"]))
    )
    assert a == b != c
