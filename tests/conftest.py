"""What tests share: the entry scripts run in child processes, tiny runs trained once a session, the real data sets."""

import importlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from configs import loading
from flow.evaluation import memorization
from flow.losses import Batch, FlowLoss, Losses
from flow.runtime.errors import cli_main
from flow.sampling import locate, snapshot
from models import autoencoder

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # also where there is a GPU, whose tests are in test_gpu.py
torch.set_num_threads(1)  # the networks of the tests are too small for more
ENTRY_SCRIPTS = ("train", "sample", "evaluate")
MAINS = {  # scripts whose main is not that of the module scripts.NAME
    **{name: name for name in ENTRY_SCRIPTS},
    **{name: f"scripts.{name}.__main__" for name in ("benchmark", "doctor", "rectify", "report")},
    **{name: f"scripts.dev.{name}" for name in ("fault_injection", "gallery", "strip", "train_classifier")},
}
REPOSITORY = Path(__file__).parent.parent
POINTS = 2000  # of the set of `points_flow`
LONGEST = ("test_train", "test_user_errors", "test_rectify", "test_extending")  # half a minute each

# A network and a run small enough for seconds.
TINY = [
    "model.name=unet",
    "model.args={width: 16, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [4], head_channels: 16, "
    "num_classes: 10}",
]
DROPOUT = (  # TINY's network with dropout, given after it
    "model.args={width: 16, channel_mult: [1, 2], blocks_per_level: 1, attention_resolutions: [4], head_channels: 16, "
    "num_classes: 10, dropout: 0.1}"
)
TINY_RUN = [
    "optimizer.name=adamw", "train.steps=4", "train.batch_size=32", "train.log_every_steps=2", "train.checkpoint_every_steps=2",
    "train.sample_every_steps=0", "train.log_with=[]", "preview.n_samples=4", "preview.sampling_steps=1",
    "preview.guidance_scale=1",
]  # fmt: skip
TINY_TRAIN = ["-c", "configs/digits.yaml", *TINY, *TINY_RUN]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def run_script(*command: str | Path, processes: int = 1, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """`python COMMAND...` in the repository (with two or more processes: under torchrun), output captured as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    env = {**os.environ, "FLOW_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=timeout
    )


def succeed(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """`run_script`, and the script must end well."""
    result = run_script(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def fail(*command: str | Path, **options) -> str:
    """`run_script` with a user's mistake: exit code 2, no traceback, the one line of error is returned."""
    result = run_script(*command, **options)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def wait_until(condition: Callable[[], object], process: subprocess.Popen | psutil.Process, seconds: float = 120) -> None:
    """Wait for it while the process runs; where that ends or so many seconds pass, the test fails and nothing goes on."""
    deadline, watched = time.monotonic() + seconds, psutil.Process(process.pid)
    while not condition():
        has_ended = watched.status() == psutil.STATUS_ZOMBIE
        if has_ended or time.monotonic() > deadline:
            for member in [*watched.children(recursive=True), watched]:
                member.kill()
            said = process.communicate() if isinstance(process, subprocess.Popen) else ""
            raise AssertionError(f"{'the process has ended' if has_ended else f'nothing within {seconds} seconds'}: {said}")
        time.sleep(0.005)


def stranger(run: Path, path: Path, replaced: dict[str, str] | None = None, **entries: str) -> Path:
    """The snapshot of a run as a bare file, with other text in its configuration or other entries in its header."""
    source = locate.find(run)
    with safe_open(source, framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != "digest"}
    for old, new in (replaced or {}).items():
        assert old in header["config"]
        header["config"] = header["config"].replace(old, new, 1)
    save_file(load_file(source), path, metadata={**header, **entries})
    return path


class TwoWeights(nn.Module):
    """Two weights, a float64 buffer and an integer one."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("scale", torch.full((1,), value, dtype=torch.float64))
        self.register_buffer("count", torch.tensor([7]))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.scale.fill_(value)


def loss_at(loss: FlowLoss, net: Callable, x0: Tensor, x1: Tensor, t: Tensor, y: Tensor | None = None) -> Losses:
    """The losses of the pairs (x0, x1) [b, ...] where the uniforms of the batch are t [b]."""
    rows = slice(0, len(x1))
    batch = Batch(x1, x0, y, t.double()[:, None], 0, rows, range(len(x1)), list(range(len(x1))))
    return loss(net, net, batch)


@pytest.fixture(scope="session", autouse=True)
def pairs_in_figures():
    """Figures of nearest pairs show 4 of them: one of 24 takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorization, "PAIRS", 4)
        yield


@pytest.fixture(autouse=True)
def accelerate_state():
    """Accelerate keeps the first Accelerator's settings for the life of a process; no test inherits another's precision."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepare(patch: pytest.MonkeyPatch, script: str, *arguments) -> Callable[[], None]:
    """The main of a script, ready to be called in this process, which saves the seconds of a start."""
    patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return importlib.import_module(MAINS.get(script, f"scripts.{script}")).main


def run_here(script: str, *arguments) -> str:
    """`here` for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(REPOSITORY)
        prepare(patch, script, *arguments)()
    return printed.getvalue()


@pytest.fixture
def main_of(monkeypatch):
    """main_of("sample", *arguments): its main, see `prepare`; in the repository, unless the test goes elsewhere."""
    monkeypatch.chdir(REPOSITORY)
    return partial(prepare, monkeypatch)


@pytest.fixture
def here(main_of, capsys):
    """here("sample", *arguments): what the script prints, run in this process."""

    def call(script: str, *arguments) -> str:
        main_of(script, *arguments)()
        return capsys.readouterr().out

    return call


@pytest.fixture
def error(main_of, capsys):
    """error("train", *arguments): the one line that the script leaves on stderr, run in this process."""

    def call(script: str, *arguments) -> str:
        with pytest.raises(SystemExit) as left:
            cli_main(main_of(script, *arguments))
        captured = capsys.readouterr().err
        assert left.value.code == 2, captured
        lines = [line for line in captured.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in captured, captured
        return lines[0]

    return call


def member(rank: int, port: int, function: Callable, arguments: tuple, problems: SimpleQueue) -> None:
    """What each of the two processes of `pair` runs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "FLOW_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        function(*arguments)
    except BaseException:
        problems.put(traceback.format_exc())
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def group(pair) -> Callable[..., None]:
    """group("sample", *arguments): the script run by two processes, which must end well."""
    return lambda script, *arguments: pair(run_here, script, *map(str, arguments))


@pytest.fixture(scope="session")
def pair() -> Callable[..., None]:
    """pair(function, *arguments): the function of a test module called by two processes, which must end well; a server that has
    done the imports forks them."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["torch._dynamo", "torch_fidelity", "sklearn.datasets", "train", "sample", "evaluate"])

    def call(function: Callable, *arguments) -> None:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        problems = forks.SimpleQueue()
        processes = [forks.Process(target=member, args=(rank, port, function, arguments, problems)) for rank in range(2)]
        for process in processes:
            process.start()
        while running := [process for process in processes if process.exitcode is None]:
            answered = connection.wait([process.sentinel for process in running], timeout=240)
            if not answered or any(process.exitcode for process in processes):
                for process in running:  # one of them may wait for the other
                    process.kill()
                    process.join()
        problem = "a process was killed, or they hang" if problems.empty() else problems.get()
        assert all(process.exitcode == 0 for process in processes), problem

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 4 steps on digits, with labels. Tests must not write to it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run_here("train", *TINY_TRAIN, "-e", run)
    return run


@pytest.fixture
def points_flow(tmp_path):
    """points_flow("mixture", 3): the snapshot of an untrained flow of that set, its random weights those of the seed."""

    def make(name: str, seed: int, args: str = "{width: 16}") -> Path:
        data = ["data.name=toys", f"data.args={{name: {name}, n: {POINTS}}}"]
        cfg = loading.load(None, [*data, "model.name=mlp", f"model.args={args}"])
        net = models.build("mlp", (2,), cfg.model.args)
        torch.manual_seed(seed)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        path = tmp_path / f"{name}_{seed}{'_labels' * ('num_classes' in args)}.safetensors"
        snapshot.save(path, net.state_dict(), cfg, (2,), 10, 1000)
        return path

    return make


@pytest.fixture(scope="session")
def packed_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packed digits: train, test, and the images of train in other shards. Tests must not write to it."""
    root = tmp_path_factory.mktemp("packed_digits")
    for name, split in (("train", "train"), ("test", "test"), ("other", "train")):
        shards = ["--shard_images", 99] * (name == "other")
        run_here("pack_images", "--source", "digits", "--split", split, *shards, "--save_dir", root / name)
    return root


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained AutoencoderKL as diffusers writes it: images 1x8x8, latents 2x4x4. Tests must not write to it."""
    pytest.importorskip("diffusers")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vae") / "autoencoder"
    autoencoder.build_vae(1, [8, 8], 2, 1).save(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of data sets: a new folder, so that no test reads features that an earlier run stored, with links to the sets
    below the user's $FLOW_DATA."""
    root = tmp_path_factory.mktemp("data_root")
    if "FLOW_DATA" in os.environ:
        for path in Path(os.environ["FLOW_DATA"]).absolute().glob("*"):
            if path.name != "features":
                (root / path.name).symlink_to(path)
    os.environ["FLOW_DATA"] = str(root)
    return root


@pytest.fixture(scope="session")
def real_data(data_root) -> Path:
    """The folder that holds MNIST and CIFAR-10, or a skip."""
    if not (data_root / "MNIST").is_dir() or not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip("FLOW_DATA names no folder with MNIST and CIFAR-10")
    return data_root


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
