"""The race of recipes: equal minutes, one table, one figure, and a second call that trains nothing again."""

import json
import shlex

import pytest
from conftest import REPOSITORY, TINY, run_here
from PIL import Image

from configs.errors import UserError
from flow.evaluation import results
from flow.runtime import step_names
from flow.training import checkpoint
from scripts.benchmark import quality

RECIPE = ["configs/digits.yaml", *TINY, "train.batch_size=32", "preview.n_samples=4", "preview.sampling_steps=1"]
FLAGS = ["--minutes", "0.005", "--curve", "2", "--trial_rounds", "1", "--feature_extractor", "digits", "--n_samples", "80"]
FLAGS += ["--sampling_steps", "1", "--guidance_scale", "1", "1.3333333", "--metrics", "fid", "accuracy"]
ROW = {"weights": "w", "n": 8, "identity": {}, "metrics": {}, "seconds": 1.0, "requested": []}


@pytest.fixture
def race(monkeypatch, here, tmp_path):
    """race(*recipes, flags): what the race prints, its commands run in this process."""

    def run_command(arguments):
        commands.append(arguments[0])
        run_here(arguments[0].removesuffix(".py"), *arguments[1:])

    commands = []
    monkeypatch.setattr(quality, "run_command", run_command)

    def run(*recipes, flags=()):
        commands.clear()
        printed = here("benchmark", "quality", "--configs", *recipes, *FLAGS, *flags, "--out", tmp_path / "race")
        return printed, list(commands)

    return run


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_call_adds_a_seed(race, tmp_path, number, monkeypatch):
    """And trains nothing again. The trial of a race of one is not run."""
    if number == 1:
        monkeypatch.setattr(quality, "training_laps", lambda *_: [0.1] * 20)
    averages = [*RECIPE, "ema.half_life_images=[500, 50]", "evaluate.every_steps=1"]  # which a race does not do
    configs = [shlex.join(averages), shlex.join([*averages, "optimizer.lr=2e-3"])][:number]
    race(*configs, flags=["--seeds", "1"])
    out = tmp_path / "race"
    recipes = json.loads((out / "race.json").read_text())["recipes"]
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    printed, commands = race(*configs, flags=["--seeds", "2"])
    assert json.loads((out / "race.json").read_text())["recipes"] == recipes
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert commands.count("train.py") == 2 * number

    for recipe in recipes:
        assert recipe["steps"] == max(1, round(0.3 / recipe["seconds_per_step"]))
        for seed in range(2):
            run = out / recipe["name"] / f"seed_{seed}"
            assert step_names.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1]) == recipe["steps"]
            assert f"seed: {seed}" in (run / "config.yaml").read_text()
            assert [row["guidance_scale"] for row in results.read(run / "evaluation") if row["method"]] == [1, 1.3333333]
            on_the_way = [f"seed_{seed}@{recipe['steps'] // 2}"] * (recipe["steps"] > 1)  # of the first average
            assert [row["weights"] for row in results.read(run / "curve")] == on_the_way
    text = (out / "race.md").read_text()
    race(*configs, flags=["--seeds", "1", "--methods", "euler", "midpoint", "--metrics", "fid"])  # rows of other metrics
    assert [line.count("|") for line in (out / "race.md").read_text().split("\n\n")[0].splitlines()] == [10] * (2 + 4 * number)
    record = json.loads((out / "race.json").read_text())
    record["recipes"][0]["content"] = "other"  # as if the YAML had been edited
    (out / "race.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="from before it changed; name another folder"):
        race(*configs, flags=["--seeds", "2"])
    assert text in printed + "\n" and "2 seed(s)" in text and "real (half against half), n = " in text
    rows = [line for line in text.splitlines() if line.startswith(tuple(f"| {recipe['name']} |" for recipe in recipes))]
    assert len(rows) == 2 * number and all(" to " in row and " ± " in row for row in rows)
    assert Image.open(out / "race.png").width > 400


def test_floor_of_fewer_real_images(race, tmp_path, monkeypatch):
    """Digits have no other split, so one half of them is compared with the other one."""
    monkeypatch.setattr(quality, "training_laps", lambda *_: [0.1] * 20)
    race(shlex.join(RECIPE), flags=["--seeds", "1", "--curve", "1", "--n_samples", "900", "--guidance_scale", "1"])
    (floor,) = [row for row in results.read(next(tmp_path.glob("race/*/seed_0/evaluation"))) if not row["method"]]
    sentence = f"real (half against half), n = 898: FD-digits {floor['metrics']['FD-digits']:.2f}."
    assert sentence in (tmp_path / "race/race.md").read_text()


@pytest.mark.slow
def test_equal_images_side_by_side(here, tmp_path):
    """Two runs at the same time, of as many steps as the batches ask for; a second call trains nothing again. The second
    network has no labels, and so no class accuracy."""
    larger = shlex.join([*RECIPE, "train.batch_size=64", "model.args.num_classes=null", "preview.guidance_scale=1"])
    flags = ["--images", "256", "--jobs", "2", "--seeds", "1", "--curve", "3", *FLAGS[6:], "--guidance_scale", "1"]
    flags += ["--out", tmp_path / "race"]
    command = ["benchmark", "quality", "--configs", shlex.join(RECIPE), larger, *flags]
    here(*command)
    recipes = json.loads((tmp_path / "race" / "race.json").read_text())["recipes"]
    assert [recipe["steps"] for recipe in recipes] == [8, 4]
    text = (tmp_path / "race" / "race.md").read_text()
    assert "256 images a run, 1 seed(s)" in text
    logs = {path: path.read_text().count("$ ") for path in tmp_path.glob("race/*/seed_0.log")}
    assert list(logs.values()) == [4, 4]
    curves = [{row["images"] for row in results.read(path)} for path in sorted(tmp_path.glob("race/*/seed_0/curve"))]
    assert curves == [{64, 128}, {64, 128}]  # of 8 and 4 steps: the checkpoints before the last one
    here(*command)
    assert (tmp_path / "race" / "race.md").read_text() == text


def test_mistakes(error, tmp_path):
    def refused(*words):
        return error("benchmark", "quality", *FLAGS, "--out", tmp_path / "race", "--configs", *words)

    assert "comes twice" in refused("configs/digits.yaml", "configs/digits.yaml")
    assert "train.steps is set by the race" in refused("configs/digits.yaml train.steps=3")
    assert "unknown key 'optimizer.rl'" in refused("configs/digits.yaml optimizer.rl=3")
    line = refused("configs/digits.yaml", "configs/digits.yaml flow.time_sampler=edm")
    assert "the recipe digits_flow.time_sampler=edm: flow.time_sampler: unknown time sampler 'edm'" in line
    line = refused(f"configs/digits.yaml train.init_from={tmp_path / 'none'}")
    assert f"train.init_from={tmp_path / 'none'}: " in line
    narrow = "configs/digits.yaml optimizer.name=muon model.args.width=8 model.args.head_channels=16"
    assert ": optimizer: name=muon: the network has no hidden layer with 32 inputs" in refused(narrow)
    assert "so only with --images" in refused("configs/digits.yaml", "--jobs", "2")
    assert "'0': must be a finite number above 0" in refused("configs/digits.yaml", "--minutes", "0")
    assert "--configs '\"': No closing quotation" in refused('"')
    assert "--configs '': must be a YAML" in refused("")
    missing, other = ["--feature_weights", tmp_path / "none"], ["--reference", "digits:test"]
    assert f"--feature_weights {tmp_path / 'none'}: there is no such file" in refused("configs/digits.yaml", *missing)
    assert "--reference: digits:test: must be NAME" in refused("configs/digits.yaml", *other)
    npz = ["--reference", tmp_path / "none.npz"]
    assert f"--reference {tmp_path / 'none.npz'}: not an npz file" in refused("configs/digits.yaml", *npz)
    assert not (tmp_path / "race").exists()
    (tmp_path / "race").mkdir()
    record = {"budget": "3 minutes of steps", "curve": 2, "evaluation": {"feature_extractor": "mnist"}, "recipes": []}
    (tmp_path / "race" / "race.json").write_text(json.dumps(record))
    assert "holds a race of 3 minutes of steps, not 0.005 minutes of steps" in refused("configs/digits.yaml")
    (tmp_path / "race" / "race.json").write_text(json.dumps({**record, "budget": "0.005 minutes of steps"}))
    results.append(tmp_path / "race/digits/seed_0/evaluation", ROW)
    assert "--feature_extractor digits: the rows in " in refused("configs/digits.yaml")
    line = refused("configs/digits.yaml", "--curve", "3")
    assert f"--curve 3: the runs in {tmp_path / 'race'} have 2 points" in line
    assert "--metrics kid: needs fid" in refused("configs/digits.yaml", "--metrics", "kid")


def test_recipes_of_files_of_one_name(tmp_path):
    """Their folders tell them apart; one file is one recipe, whatever its path."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mnist.yaml").write_text("seed: 0")
    one, other = (str(tmp_path / name / "mnist.yaml") for name in "ab")
    names = [recipe.name for recipe in quality.read_recipes([one, f"{one} optimizer.lr=1e-3", other], [])]
    assert names == ["mnist", "mnist_optimizer.lr=1e-3", "b_mnist"]
    with pytest.raises(UserError, match="comes twice"):
        quality.read_recipes([one, other, str(tmp_path / "b/../a/mnist.yaml")], [])
    (tmp_path / "b/b").mkdir()
    (tmp_path / "b/b/mnist.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match="another recipe is called b_mnist too; copy the YAML to another name"):
        quality.read_recipes([one, other, str(tmp_path / "b/b/mnist.yaml")], [])


def test_flags_may_change_until_there_are_rows(monkeypatch, tmp_path):
    """A first evaluation that fails leaves none; the flags of the next call are then those of the race."""
    monkeypatch.chdir(REPOSITORY)

    def fitted(*flags: str) -> dict:
        words = ["--images", "64", "--configs", "configs/digits.yaml", "--out", str(tmp_path), *flags]
        args = quality.parse_args(words)
        quality.fitted(args, quality.read_recipes(args.configs, args.overrides))
        return json.loads((tmp_path / "race.json").read_text())["evaluation"]

    assert fitted("--feature_weights", "missing")["feature_weights"] == "missing"
    changed = fitted("--feature_extractor", "digits")
    assert (changed["feature_extractor"], changed["feature_weights"]) == ("digits", None)
    results.append(tmp_path / "digits/seed_0/curve", ROW)
    with pytest.raises(UserError, match=r"--feature_extractor mnist: the rows in .* were measured with digits"):
        fitted("--feature_extractor", "mnist")
    assert fitted("--feature_extractor", "digits") == changed


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("flow.coupling=ot", ["--methods", "ancestral"], "--methods ancestral: adds noise, which the recipe"),
        (
            "model.args.num_classes=null preview.guidance_scale=1",
            ["--guidance_scale", 1, 1.5],
            "--guidance_scale 1.5: the recipe",
        ),
    ],
)
def test_rows_that_evaluate_would_refuse(error, tmp_path, recipe, flags, message):
    """Before a training, not after it."""
    command = ["benchmark", "quality", *FLAGS, "--out", tmp_path / "race", "--configs", f"configs/digits.yaml {recipe}"]
    assert message in error(*command, *flags) and not (tmp_path / "race/race.json").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "budget", "curve", "evaluation", "recipes", "no flags"])
def test_damaged_race_file_is_named(error, tmp_path, damage):
    """Text that is no JSON object, or a key that is not there."""
    record = {"budget": "0.005 minutes of steps", "curve": 2, "evaluation": {}, "recipes": []}
    text = json.dumps({key: value for key, value in record.items() if key != damage}) if damage in record else damage
    if damage == "no flags":
        text = json.dumps({**record, "evaluation": []})
    (tmp_path / "race.json").write_text(text)
    line = error("benchmark", "quality", *FLAGS, "--out", tmp_path, "--configs", "configs/digits.yaml")
    assert f"{tmp_path / 'race.json'}: is damaged; name another folder with --out" in line
    assert damage not in record or f"it has no {damage}" in line
    assert (tmp_path / "race.json").read_text() == text
