"""What processes agree on, and the precision of the gradients between them."""

import os
from pathlib import Path

import pytest
import torch

from configs import loading
from configs.errors import UserError
from flow.runtime import distributed


def refuse(rank: int, kind: type[Exception] = UserError) -> None:
    raise kind(f"refused by {rank}")


def the_main_process_decides() -> None:
    """For each of two processes, which would decide otherwise on its own: one that looks later, at a folder that has changed
    since, gets the same answer."""
    rank = int(os.environ["RANK"])
    distributed.build_accelerator()
    assert distributed.decided_by_main(lambda: ("decided by", rank)) == ("decided by", 0)
    for kind, raised in ((UserError, UserError), (ValueError, ValueError), (OSError, UserError)):
        with pytest.raises(raised, match="refused by 0") as error:
            distributed.decided_by_main(lambda kind=kind: refuse(rank, kind))
        assert error.type is raised


def processes_notice_different_files() -> None:
    """Both learn of it, the one whose files are like those of the main process as well."""
    accelerator = distributed.build_accelerator()
    distributed.check_same(accelerator, ["a", 3], "data")
    with pytest.raises(UserError, match="data: processes have read different ones; start all with the same command"):
        distributed.check_same(accelerator, os.environ["RANK"], "data")


def gradients_between_processes_have_their_precision() -> None:
    """Both processes have the gradient 1 + 2^-12, which fp16 rounds to 1."""
    for hook, expected in (("fp16", 1.0), ("no", 1 + 2**-12)):
        config = loading.load(None, [f"train.ddp_comm_hook={hook}", "train.log_with=[]"])
        accelerator = distributed.build_training_accelerator(config.train, Path("unused"))
        net = torch.nn.Linear(1, 1, bias=False)
        model = accelerator.prepare(net)
        accelerator.backward(model(torch.tensor([[1 + 2**-12]])).sum())
        assert net.weight.grad.item() == expected


def keep_promises() -> None:
    the_main_process_decides()
    processes_notice_different_files()
    gradients_between_processes_have_their_precision()


def test_promises_of_two_processes(pair):
    """Of one pair, whose start takes seconds: the traceback names the one that does not hold."""
    pair(keep_promises)


def test_a_process_on_its_own_decides():
    assert distributed.decided_by_main(lambda: 3) == 3


@pytest.fixture
def threads():
    """Whatever a test sets them to, they are one again after it."""
    yield
    torch.set_num_threads(1)


def test_threads_of_flow_num_threads(monkeypatch, threads):
    for number in ("3", "2"):
        monkeypatch.setenv("FLOW_NUM_THREADS", number)
        assert distributed.set_threads() is None and torch.get_num_threads() == int(number)
    monkeypatch.setenv("FLOW_NUM_THREADS", "²")
    with pytest.raises(UserError, match="FLOW_NUM_THREADS=²: must be a whole number of at least 1"):
        distributed.set_threads()


@pytest.mark.parametrize(
    ("launcher", "processes", "omp_threads", "expected"),
    [(True, "1", "1", 8), (True, "2", "1", 4), (True, "8", "1", None), (True, "2", "3", None), (False, "", "1", None)],
)
def test_one_thread_of_a_launcher_is_ignored(monkeypatch, threads, launcher, processes, omp_threads, expected):
    """The cores are divided among the processes; what a user sets stays."""
    for name in ("FLOW_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", omp_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    note = distributed.set_threads()
    assert torch.get_num_threads() == (expected or 1)
    assert (note is None) == (expected is None) and (note is None or note.startswith(f"threads: {expected} a process"))


def test_an_unknown_word_for_the_cpu(monkeypatch):
    """An empty one is none."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=maybe: must be true or false"):
        distributed.build_accelerator()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    assert distributed.build_accelerator().num_processes == 1


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set train.gradient_accumulation_steps"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set train.compile=true"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "use DDP or FSDP2"),
    ],
)
def test_a_launcher_changes_no_training(monkeypatch, name, value, advice):
    """Else it would divide the gradients once more, or rename the weights."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}, which the launcher has set: .*{advice}"):
        distributed.build_accelerator()
