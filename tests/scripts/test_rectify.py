"""rectify: one command from 1-RF to the table, which goes on after a kill and ends with the same files."""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, run_here, succeed, wait_until
from PIL import Image
from safetensors.torch import load_file

from configs import loading
from configs.errors import UserError
from configs.rectify import PairsConfig, RectifyConfig, RouteConfig, StageConfig
from flow.evaluation import results
from flow.evaluation.checks import check_before_training
from flow.evaluation.runner import EvaluationSettings
from flow.runtime import distributed, subprocesses
from flow.sampling import locate, snapshot
from flow.training import checkpoint
from scripts.rectify import __main__ as rectify
from scripts.rectify import routes

STAGE = {
    "data": {"name": "digits"},
    "model": {"name": "mini_unet", "args": {"width": 16, "head_channels": 16, "patch": 1, "num_classes": 10}},
    "train": {
        "steps": 4, "batch_size": 16, "checkpoint_every_steps": 2, "sample_every_steps": 0, "log_every_steps": 2,
        "log_with": [],
    },
    "preview": {"n_samples": 4, "sampling_steps": 1},
}  # fmt: skip
ON_PAIRS = {"data": {"name": "pairs", "args": {"path": "filled in by rectify"}}}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A rectify YAML for seconds, without its folder."""
    folder = tmp_path_factory.mktemp("configs")
    on_pairs = STAGE | ON_PAIRS | {"flow": {"coupling": "paired", "label_dropout": 0.0}}
    flow_map = {"model": {**STAGE["model"], "args": {**STAGE["model"]["args"], "two_times": True}}}
    trainings = {
        "1-rf": STAGE | {"model": {**STAGE["model"], "args": {**STAGE["model"]["args"], "num_classes": "auto"}}},
        "2-rf": on_pairs,
        "distilled": on_pairs | {"loss": {"name": "distillation"}},
        "on_paths": on_pairs | flow_map | {"loss": {"name": "trajectory"}},
        "flow_map": STAGE | flow_map | {"loss": {"name": "alpha_flow"}},
    }
    for name, stage in trainings.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(stage))
    whole = {
        "stages": {name: {"config": str(folder / f"{name}.yaml")} for name in trainings}
        | {
            "pairs_1-rf": {"pairs": {"n_pairs": 40, "sampling_steps": 2, "guidance_scale": 1.5}},
            "pairs_2-rf": {"pairs": {"n_pairs": 40, "sampling_steps": 1}},
            "paths": {"pairs": {"n_pairs": 40, "sampling_steps": 3, "keep_states": 2}},
        },
        "routes": {
            "flow": {"stages": ["1-rf"], "guidance_scale": [1, 1.5]},
            "distilled": {"stages": ["1-rf", "pairs_1-rf", "2-rf", "pairs_2-rf", "distilled"]},
            "trajectory+alpha_flow": {"stages": ["1-rf", "paths", "on_paths", "flow_map"], "methods": ["euler", "consistency"]},
        },
        "nfe": [1, 2],
        "n_samples": 80,
    }
    whole |= {"feature_extractor": "digits", "straightness_images": 5, "straightness_steps": 4}
    (folder / "rectify.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder / "rectify.yaml"


def run_command_here(arguments: list[str], launcher: str | None = None) -> None:
    """`run_command` in this process."""
    script, *rest = [word for word in arguments if word != "-m"]
    run_here(script.removeprefix("scripts.").removesuffix(".py"), *rest)


@pytest.fixture(scope="module")
def rectified(tmp_path_factory, config) -> Path:
    """The whole chain, its commands run in this process, which saves the seconds of ten starts."""
    folder = tmp_path_factory.mktemp("rectify") / "whole"
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as err:
        patch.setattr(subprocesses, "run_command", run_command_here)
        printed = run_here("rectify", "-c", config, f"folder={folder}")
    assert "| model" in printed
    stages = re.findall(r"^stage (\d+) of (\d+): (.*) \(\d+\.\d (?:s|min) so far\)$", printed, re.M)
    assert [(int(k), int(n)) for k, n, _ in stages] == [(k, 14) for k in range(1, 15)]
    assert stages[1][2] == "pairs: pairs_1-rf" and stages[9][2] == "evaluation of flow, w = 1.5"
    bars = re.findall(r"straightness deviation and figure [^|]*\|[^|]*\| (\d+)/(\d+)", err.getvalue())
    assert bars[-1][0] == bars[-1][1]
    (folder.parent / "printed.txt").write_text(printed)
    return folder


def repeated_files(folder: Path) -> dict:
    """Everything that the second of two equal runs has to repeat: all files but logs, clocks and machine descriptions."""
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("pa*/*"))}
    weights = {}
    for name in ("1-rf", "2-rf", "distilled", "on_paths", "flow_map"):
        weights |= {f"{name} {key}": value.tolist() for key, value in load_file(locate.find(folder / name)).items()}
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "identity")} for row in results.read(folder / "evaluation")]
    pictures = {"comparison.png": (folder / "comparison.png").read_bytes()}  # the table has minutes
    return {"pairs": files, "weights": weights, "rows": rows, "pictures": pictures}


def table_of(folder: Path) -> list[list[str]]:
    """The cells of comparison.md; the first line are the names of the columns."""
    lines = (folder / "comparison.md").read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_table_and_figure(rectified):
    text, rows = (rectified / "comparison.md").read_text(), table_of(rectified)
    assert rows[0] == ["model", "NFE 1", "NFE 2", "images", "minutes", "network passes", "straightness deviation"]
    names = ["flow", "flow, w = 1.5", "distilled", "trajectory+alpha_flow", "trajectory+alpha_flow, consistency"]
    assert [row[0] for row in rows[2:]] == names and "FD-digits / accuracy" in text
    images = {row[0]: row[3] for row in rows[2:]}
    assert images["flow"] == "64" and images["distilled"] == str(3 * 64 + 2 * 40)
    assert len([row for row in results.read(rectified / "evaluation") if not results.is_control(row)]) == 10
    assert min(Image.open(rectified / "comparison.png").size) > 200


def test_early_check_leaves_the_precision_open():
    """The comparison at the end has that of the first training."""
    config = loading.load("configs/digits.yaml", [])
    settings = EvaluationSettings(owner="rectify", feature_extractor="digits", n_samples=20)
    check_before_training(config, settings)
    assert distributed.build_accelerator("bf16").mixed_precision == "bf16"


def test_stage_of_another_configuration(error, config, tmp_path):
    """A training that would go on with other keys than those it began with is refused, as the table would mix both."""
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "plan.json").write_text('{"1-rf": {"content": "of other keys"}}')
    line = error("rectify", "-c", config, f"folder={tmp_path / 'chain'}")
    assert "stages.1-rf: " in line and "have changed since it began" in line


def test_hint_samples_from_best_row(rectified):
    """That of the smallest distance at the smallest NFE."""
    printed = (rectified.parent / "printed.txt").read_text()
    ((best, hint),) = re.findall(r"; (.+) is best at NFE 1; sample with: (.+)$", printed, re.M)
    distances = {row[0]: float(row[1].split()[0]) for row in table_of(rectified)[2:]}
    assert distances[best] == min(distances.values())
    words = shlex.split(hint)[1:]
    ends = {"flow": "1-rf", "distilled": "distilled", "trajectory+alpha_flow": "flow_map"}  # of the routes
    assert words[words.index("--weights") + 1] == str(rectified / ends[best.partition(",")[0]])
    assert words[words.index("--sampling_steps") + 1] == "1" and ("--guidance_scale" in words) == ("w = " in best)
    run_command_here([*words, "--n_samples", "4", "--save_dir", str(rectified.parent / "samples")])


def test_the_stages_build_on_each_other(rectified):
    configs = {name: (rectified / name / "config.yaml").read_text() for name in ("2-rf", "distilled")}
    assert f"init_from: {rectified / '1-rf'}" in configs["2-rf"] and f"path: {rectified / 'pairs_1-rf'}" in configs["2-rf"]
    assert f"init_from: {rectified / '2-rf'}" in configs["distilled"]
    assert f"path: {rectified / 'pairs_2-rf'}" in configs["distilled"]


def test_costs_of_a_route(rectified, config, tmp_path):
    """Images and passes are those of all stages: 3 a training sample (alpha_flow: 4), Heun's evaluations a pair."""
    cfg = loading.load(config, [f"folder={rectified}"], kind=RectifyConfig)
    steps = rectify.Rectify(cfg, None, 0.0)
    cost = {name: steps.route_cost(route) for name, route in cfg.routes.items()}
    assert cost["flow"].images == 64 and cost["flow"].passes == 64 * 3
    assert cost["distilled"].passes == 3 * 64 * 3 + 40 * 3 * 2 + 40
    assert cost["trajectory+alpha_flow"].passes == pytest.approx(2 * 64 * 3 + 64 * 3.711 + 40 * 5)  # alpha is 1 for 29 %
    assert 0 < cost["flow"].minutes < cost["distilled"].minutes < 5
    copy = shutil.copytree(rectified, tmp_path / "copy")
    with open(copy / "1-rf" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "images": 64, "validation_loss": 1.0}\n')
    cfg = loading.load(config, [f"folder={copy}"], kind=RectifyConfig)
    assert rectify.Rectify(cfg, None, 0.0).route_cost(cfg.routes["flow"]) == cost["flow"]


def test_pairs_of_real_images_cost_less():
    settings = PairsConfig(sampling_method="heun", sampling_steps=8, guidance_scale=1.2)
    assert routes.pair_passes(settings, 1) == 2 * 15  # Euler in the last step, at the data
    assert routes.pair_passes(settings, 0, 1) == 16


def test_mistakes_come_out_before_anything_is_trained(error, tmp_path, config):
    command = ["rectify", "-c", tmp_path / "changed.yaml", f"folder={tmp_path / 'never'}"]
    whole = yaml.safe_load(config.read_text())

    def refused(*place_and_value) -> str:
        *place, last, value = place_and_value
        changed = json.loads(json.dumps(whole))
        section = changed
        for name in place:
            section = section[name]
        section[last] = value
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
        return error(*command)

    stages = whole["stages"]
    assert "unknown key 'route'. Did you mean 'routes'?" in refused("route", 3)
    assert "routes={}: must be at least one route" in refused("routes", {})
    assert "stages.paths.pairs.n_pairs=0: must be at least 1" in refused("stages", "paths", "pairs", "n_pairs", 0)
    assert "stages.paths: needs either config, for a training, or pairs" in refused("stages", "paths", "config", "x.yaml")
    assert "'1rf' is no stage; there are 1-rf" in refused("routes", "flow", "stages", ["1rf"])
    assert "must begin and end with a training" in refused("routes", "flow", "stages", ["1-rf", "paths"])
    assert "'distilled' builds on other stages than in routes." in refused("routes", "flow", "stages", ["1-rf", "distilled"])
    assert "and no stage before it makes any" in refused("routes", "distilled", "stages", ["1-rf", "2-rf"])
    assert "flow.coupling=independent: must be paired" in refused(
        "stages", "2-rf", {**stages["2-rf"], "overrides": ["flow.coupling=independent"]}
    )
    assert "model: must be that of 1-rf" in refused("stages", "2-rf", "overrides", ["model.args.width=32"])
    assert "stages.paths.pairs.sampling_method: unknown solver 'hen'" in refused(
        "stages", "paths", "pairs", "sampling_method", "hen"
    )
    assert "needs stages.paths.pairs.keep_states" in refused("stages", "paths", "pairs", "keep_states", 0)
    pairs_of_paths = ("stages", "paths", "pairs")
    assert "keep_states=3: must be less than sampling_steps=3" in refused(*pairs_of_paths, "keep_states", 3)
    assert "paths.pairs.real_fraction=0.5: must be 0 with keep_states" in refused(*pairs_of_paths, "real_fraction", 0.5)
    assert "data.name=toys: routes are for images" in refused("stages", "1-rf", "config", "configs/toy.yaml")
    assert "feature_extractor=mnst: unknown; choose one of" in refused("feature_extractor", "mnst")
    assert "the extractor takes 28x28 images, not 8x8" in refused("feature_extractor", "mnist")
    assert "use velocity or data" in refused("stages", "distilled", "overrides", ["flow.prediction=noise"])
    assert "stages.1-rf.share=0: must be more than 0, its share of the 3 minutes" in refused("minutes", 3)
    assert "'dopri5' chooses its own number of evaluations" in refused(*pairs_of_paths, "sampling_method", "dopri5")
    one = {**whole, "minutes": 3, "routes": {"flow": {"stages": ["1-rf"]}}}
    for wrong, line in [
        ({"share": 0.9}, "shares of the minutes add up to 0.9, not to 1"),
        ({"share": 1.0, "overrides": ["train.steps=5"]}, "overrides: train.steps is set by minutes=3"),
    ]:
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump({**one, "stages": {"1-rf": {**stages["1-rf"], **wrong}}}))
        assert line in error(*command)
    assert "'heun' does not take one evaluation a step" in refused("routes", "flow", "methods", ["heun"])
    assert "'dopri5' does not take one evaluation a step" in refused("routes", "flow", "methods", ["dopri5"])
    assert "'consistency' needs the score" in refused("routes", "distilled", "methods", ["consistency"])
    unconditional = {name: {**stage, "overrides": ["model.args.num_classes=null"]} for name, stage in stages.items()}
    for name in ("pairs_1-rf", "pairs_2-rf", "paths"):
        unconditional[name] = {"pairs": {**stages[name]["pairs"], "guidance_scale": 1}}
    assert "routes.flow.guidance_scale=[1.0, 1.5]: needs labels" in refused("stages", unconditional)
    minutes = ["rectify", "-c", "configs/digits_few_steps.yaml", f"folder={tmp_path / 'never'}", "--launcher", "torchrun"]
    assert "--launcher: minutes=3 is measured with one process" in error(*minutes)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("weights", ["null", "runs/other"])
def test_stage_with_other_weights_than_the_teacher(config, weights):
    """Only a network that starts from the teacher must be like it."""
    cfg = loading.load(config, kind=RectifyConfig)
    cfg.stages["distilled"].overrides = ["model.args.width=32", f"train.init_from={weights}"]
    routes.check_routes(cfg)


@pytest.mark.parametrize("given", [{}, {"num_classes": "auto"}])
@pytest.mark.parametrize(("subfolders", "labelled"), [(("a", "b"), True), ((".",), False)])
def test_guidance_on_a_folder(tmp_path, given, subfolders, labelled):
    """num_classes is auto, which is its default there: the subfolders decide, and a reflow has the classes of its pairs."""
    for name in subfolders:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "0.png")
    args = {key: value for key, value in STAGE["model"]["args"].items() if key != "num_classes"}
    data = {"data": {"name": "folder", "args": {"path": str(tmp_path / "images"), "channels": 1}}}
    flow = STAGE | data | {"model": {"name": "mini_unet", "args": args | given}}
    reflow = STAGE | ON_PAIRS | {"model": {"name": "mini_unet", "args": args | {"num_classes": "auto"}}}
    for name, stage in {"flow": flow, "reflow": reflow | {"flow": {"coupling": "paired"}}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(stage))
    stages = {name: StageConfig(str(tmp_path / f"{name}.yaml")) for name in ("flow", "reflow")}
    stages["pairs"] = StageConfig(pairs=PairsConfig(guidance_scale=1.5))
    route = RouteConfig(["flow", "pairs", "reflow"], [1.5])
    cfg = RectifyConfig(stages=stages, routes={"reflow": route})
    with nullcontext() if labelled else pytest.raises(UserError, match=r"guidance_scale=1\.5: needs labels"):
        routes.check_routes(cfg)


def test_sets_of_pairs_keep_their_seeds(tmp_path, config):
    """A set that is added before them in the YAML gets another one."""

    def seeds(path: Path, *names: str) -> list[str]:
        cfg = loading.load(path, [f"folder={tmp_path / 'run'}"], kind=RectifyConfig)
        arguments = [rectify.Rectify(cfg, None, 0.0).pairs(name, "1-rf") for name in names]
        return [words[words.index("--seed") + 1] for words in arguments]

    before = seeds(config, "pairs_1-rf", "paths")
    whole = yaml.safe_load(config.read_text())
    whole["stages"] = {"more": {"pairs": {"n_pairs": 40}}, **whole["stages"]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    (added, *after) = seeds(tmp_path / "more.yaml", "more", "pairs_1-rf", "paths")
    assert after == before and len({added, *after}) == 3
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {name: str(entry["seed"]) for name, entry in plan.items()} == {
        "more": added, "pairs_1-rf": before[0], "paths": before[1],
    }  # fmt: skip


def test_trial_of_pairs_of_a_reflow(rectified, tmp_path, config):
    """The network before them was trained on pairs itself, wherever the YAML says that those lie."""
    folder = shutil.copytree(rectified, tmp_path / "run")
    shutil.rmtree(folder / "pairs_2-rf")
    whole = yaml.safe_load(config.read_text()) | {"minutes": 1.0, "folder": str(folder)}
    whole["routes"] = {"flow": {"stages": ["1-rf"]}}
    for stage in whole["stages"].values():
        stage["share"] = 1.0
    (tmp_path / "minutes.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    cfg = loading.load(tmp_path / "minutes.yaml", kind=RectifyConfig)
    words = rectify.Rectify(cfg, None, 0.0).pairs("pairs_2-rf", "2-rf")
    assert int(words[words.index("--n_pairs") + 1]) > 0
    with pytest.raises(UserError, match=r"minutes=1: .*1-rf began without a budget"):
        rectify.Rectify(cfg, None, 0.0).training("1-rf", None, None)


def test_time_of_pairs_after_a_kill_is_unknown(monkeypatch, rectified, tmp_path, config):
    """A kill leaves no time to note it; what is noted afterwards is not the whole."""
    folder = shutil.copytree(rectified, tmp_path / "run")
    cfg = loading.load(config, [f"folder={folder}"], kind=RectifyConfig)

    def add_shard(arguments: list[str], launcher: str | None) -> None:
        assert json.loads((folder / "plan.json").read_text())["pairs_1-rf"]["running"]
        (folder / "pairs_1-rf" / "more.safetensors").touch()

    monkeypatch.setattr(subprocesses, "run_command", add_shard)
    chain = rectify.Rectify(cfg, None, 0.0)
    chain.record("pairs_1-rf", running=True, elapsed=3.0)
    chain.run_stage("pairs_1-rf", "1-rf", None)
    plan = json.loads((folder / "plan.json").read_text())["pairs_1-rf"]
    assert math.isnan(plan["elapsed"]) and plan["running"] is False


def test_a_folder_of_another_budget(rectified, tmp_path, config):
    folder = shutil.copytree(rectified, tmp_path / "run")
    cfg = loading.load(config, [f"folder={folder}"], kind=RectifyConfig)
    chain = rectify.Rectify(cfg, None, 0.0)
    chain.record("1-rf", minutes=10, share=0.5, seconds=1.0, count=3)
    with pytest.raises(UserError, match=r"minutes=null: .*plan\.json is of another budget"):
        chain.training("1-rf", None, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"1-rf": 3}', '{"1-rf": {"count": 3}}'])
def test_damaged_plan_is_named(error, monkeypatch, tmp_path, config, text):
    monkeypatch.setattr(subprocesses, "run_command", lambda arguments, launcher: None)
    (tmp_path / "plan.json").write_text(text)
    assert f"{tmp_path / 'plan.json'}: is damaged" in error("rectify", "-c", config, f"folder={tmp_path}")
    assert (tmp_path / "plan.json").read_text() == text


@pytest.mark.slow
def test_a_budget_of_minutes(tmp_path, config):
    """Steps and pairs follow from a trial, are stored, and are the same when the command runs again."""
    whole = yaml.safe_load(config.read_text())
    whole |= {"minutes": 0.1, "routes": {"reflow": {"stages": ["1-rf", "pairs_1-rf", "2-rf"]}}}
    for name, share in (("1-rf", 0.5), ("pairs_1-rf", 0.1), ("2-rf", 0.4)):
        whole["stages"][name]["share"] = share
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(whole))
    command = ["-m", "scripts.rectify", "-c", tmp_path / "c.yaml", f"folder={tmp_path / 'run'}"]
    succeed(*command)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["1-rf"]["count"] == round(0.1 * 60 * 0.5 / plan["1-rf"]["seconds"])
    assert snapshot.load(tmp_path / "run" / "1-rf").step == plan["1-rf"]["count"]
    succeed(*command)
    again = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert all(again[name]["count"] == plan[name]["count"] for name in plan)


@pytest.mark.slow
def test_sigterm_lets_the_step_save_and_ends(tmp_path, config):
    """The training that is under way writes its checkpoint; nothing is left running."""
    folder = tmp_path / "stopped"
    whole = yaml.safe_load(config.read_text())
    whole["stages"]["1-rf"]["overrides"] = ["train.steps=100_000", "train.checkpoint_every_steps=0"]
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(whole))
    command = [sys.executable, "-m", "scripts.rectify", "-c", str(tmp_path / "long.yaml"), f"folder={folder}"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "FLOW_NUM_THREADS": "1"})
    wait_until((folder / "1-rf" / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert checkpoint.list_checkpoints(folder / "1-rf" / "checkpoints")


@pytest.mark.slow
def test_killed_rectify_ends_with_same_files(tmp_path, config, rectified):
    """Killed as each stage begins, it goes on from there and ends with the same files."""
    folder = tmp_path / "cut"
    # the folder's name is part of the configurations inside the weights' headers, so not the bytes but the values are compared
    command = [sys.executable, "-m", "scripts.rectify", "-c", str(config), f"folder={folder}"]
    environment = {**os.environ, "FLOW_NUM_THREADS": "1"}
    routes = yaml.safe_load(config.read_text())["routes"].values()
    stages = list(dict.fromkeys(name for route in routes for name in route["stages"]))  # in the order of their turns
    assert len(stages) == 8
    for name in (*stages, "evaluation"):
        assert not (folder / name).exists()  # it is this start that comes so far
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until((folder / name).exists, process, 600)  # the stage before begins anew, and is done
        os.killpg(process.pid, signal.SIGKILL)  # the script and the step that it was at
        process.wait()
    succeed("-m", "scripts.rectify", "-c", config, f"folder={folder}", timeout=600)
    cut, whole = repeated_files(folder), repeated_files(rectified)
    manifests = [name for name in whole["pairs"] if name.name == "manifest.json"]  # these hold the hash of the weights' file
    assert len(manifests) == 3
    for name in manifests:
        del cut["pairs"][name], whole["pairs"][name]
    assert cut == whole


@pytest.mark.parametrize("name", ["digits_few_steps", "digits_simple_reflow", "mnist_few_steps", "mnist_rectify"])
def test_shipped_routes_fit_together(name):
    routes.check_routes(loading.load(f"configs/{name}.yaml", kind=RectifyConfig))
