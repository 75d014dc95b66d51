"""The processes of a run: the accelerator, threads and memory, collectives."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedType, LoggerType, broadcast_object_list, str_to_bool
from torch import nn
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import TrainConfig
from flow.runtime import shutdown

Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
DIFFERENT = "processes have read different ones; start all with the same command, and give every machine the same files"
SCRIPT_TIMEOUT_MINUTES = 24 * 60  # a process of a script may work on its share for hours while others wait for it

LAUNCHER_SETTINGS = {  # environment variables of accelerate: the value that changes nothing, and what to do about another one
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed is not supported; use DDP or FSDP2 (configs/accelerate/)"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM is not supported; use DDP or FSDP2 (configs/accelerate/)"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "leave it out and set train.compile=true, or --compile of a script"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "leave it at 1 and set train.gradient_accumulation_steps"),
}


def build_accelerator(
    mixed_precision: str = "no",
    log_with: list[str] | None = None,
    log_dir: str | None = None,
    timeout_minutes: float = SCRIPT_TIMEOUT_MINUTES,
    ddp_comm_hook: str = "no",
) -> Accelerator:
    """Build the Accelerator, and set threads and memory of the process. Its own `mixed_precision` says what auto came to.

    Raises UserError where the launcher started another number of processes than requested or asks for what a configuration
    decides, and for a precision that the device does not have.
    """
    _check_launch()
    thread_note = set_threads()
    tune_malloc()
    shutdown.end_with_launcher()
    has_accelerator = _has_accelerator()
    mixed_precision = resolve_precision(mixed_precision)
    if mixed_precision == "fp16" and not has_accelerator:
        raise UserError("train.mixed_precision=fp16: needs a GPU; on a CPU use bf16 or no")
    timeout = timedelta(minutes=timeout_minutes)
    _prepare_fsdp(has_accelerator, timeout)
    # Without cpu=True, two processes on a machine without GPUs would each be process 0 of 1.
    try:
        accelerator = Accelerator(
            cpu=not has_accelerator,
            mixed_precision=mixed_precision,
            log_with=log_with or None,
            project_dir=log_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=DDPCommunicationHookType(ddp_comm_hook)),
            ],
        )
    except ValueError as error:  # e.g. bf16 on a GPU that has none
        if "already been initialized" in str(error):
            raise UserError(
                f"train.mixed_precision={mixed_precision}: this process works in another one already; start a new process"
            ) from None
        raise UserError(f"train.mixed_precision={mixed_precision}, train.log_with={log_with}: {error}") from None
    if accelerator.is_fsdp2:
        if ddp_comm_hook != "no":
            raise UserError(f"train.ddp_comm_hook={ddp_comm_hook}: has no effect on sharded weights (FSDP2); set it to no")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate's policy would cast the inputs, so t and the time features, to 16 bits; see `autocast_forward`.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE={expected}, but {accelerator.num_processes} process(es) joined; start with "
            "`accelerate-launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    check_same(accelerator, mixed_precision, "mixed precision", "differs between processes; name one, the same everywhere")
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", mixed_precision):
        accelerator.print(f"note: the launcher's mixed precision {launcher} is not used; pass -mp {launcher} to the script")
    if mixed_precision == "bf16" and not has_accelerator and not _cpu_has_bf16():
        accelerator.print("note: this CPU has no bf16 instructions; fp32 (-mp no, or -mp auto) is up to a hundred times faster")
    if thread_note:
        accelerator.print(thread_note)
    return accelerator


def resolve_precision(mixed_precision: str) -> str:
    """What `auto` means on this machine: bf16 where its GPU or CPU has instructions for it, else no; others as they are."""
    if mixed_precision != "auto":
        return mixed_precision
    if not _has_accelerator():
        return "bf16" if _cpu_has_bf16() else "no"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def default_device() -> torch.device:
    """The accelerator of the machine, else, or with ACCELERATE_USE_CPU=true, the CPU."""
    device = torch.accelerator.current_accelerator() if _has_accelerator() else None
    return device or torch.device("cpu")


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() and not _keeps_to_cpu()


def _keeps_to_cpu() -> bool:
    """Whether ACCELERATE_USE_CPU says so, read as Accelerate reads it. Raises UserError for another word than yes or no."""
    value = os.environ.get("ACCELERATE_USE_CPU") or "false"
    try:
        return bool(str_to_bool(value))
    except ValueError:
        raise UserError(f"ACCELERATE_USE_CPU={value}: must be true or false") from None


def _cpu_has_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.11
        return torch.cpu._is_avx512_bf16_supported()
    capabilities: Any = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def build_training_accelerator(config: TrainConfig, log_dir: Path, own_trackers: Collection[str] = ()) -> Accelerator:
    """The accelerator of a trainer; its trackers write to `log_dir`. own_trackers: names that Accelerate does not know.

    Raises:
        UserError: for a tracker that is unknown or not installed.
    """
    allowed = [*LoggerType.list(), *own_trackers]
    if unknown := next((name for name in config.log_with if name not in allowed), None):
        raise UserError(f"train.log_with={config.log_with}: unknown tracker {unknown!r}; choose from {', '.join(allowed)}")
    log_with = [name for name in config.log_with if name not in own_trackers]
    accelerator = build_accelerator(
        config.mixed_precision, log_with, str(log_dir), config.timeout_minutes, config.ddp_comm_hook
    )
    present = [str(tracker) for tracker in accelerator.log_with]  # accelerate leaves out the others without a word
    if missing := next((name for name in log_with if name not in (*present, "all")), None):
        raise UserError(f"train.log_with={config.log_with}: the package of {missing} is not installed; pip install {missing}")
    return accelerator


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; one of the CPU without waiting for what the device is doing. float64 is float32 on mps."""
    if device.type == "mps" and x.dtype == torch.float64:
        x = x.float()
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    with torch.cuda.device(device):  # in a thread of its own the first GPU would be the current one
        return x.pin_memory().to(device, non_blocking=True)


def prepare_model(net: nn.Module, accelerator: Accelerator, compiled: bool = False) -> None:
    """The network to the device, in the memory layout in which it is fastest there, and through torch.compile if requested."""
    if accelerator.is_fsdp2:  # which shards contiguous weights only
        net.to(accelerator.device).to(memory_format=torch.contiguous_format)
    else:
        place(net, accelerator.device, accelerator.mixed_precision == "no")
    if compiled:
        net.compile()


def place(net: nn.Module, device: torch.device, in_float32: bool) -> None:
    """The network to the device, in the memory layout in which it is fastest there.

    Pixels with their channels side by side are what the tensor cores of GPUs work on; on a CPU that is also faster in fp32,
    but slower in bf16, whose group norm loses more than the convolutions gain (docs/performance.md).
    """
    side_by_side = device.type == "cuda" or in_float32
    net.to(device).to(memory_format=torch.channels_last if side_by_side else torch.contiguous_format)


def autocast_forward(model: nn.Module, accelerator: Accelerator) -> None:
    """Let the forward pass of a network that FSDP2 has sharded run in mixed precision, with float32 inputs and outputs, as
    Accelerate does for other networks."""
    forward = model.forward

    @functools.wraps(forward)
    def in_mixed_precision(*args: Any, **kwargs: Any) -> torch.Tensor:
        with accelerator.autocast():
            output = forward(*args, **kwargs)
        return output.float()

    model.forward = in_mixed_precision


def build_single_process_accelerator(script: str) -> Accelerator:
    """The accelerator of a script that works on one process; raises UserError where there are several."""
    accelerator = build_accelerator()
    if accelerator.num_processes > 1:
        raise UserError(f"{script}: works on one process, not on {accelerator.num_processes}; start it with python -m")
    return accelerator


@contextmanager
def cpu_accelerator() -> Iterator[Accelerator]:
    """An accelerator of this process alone, on the CPU in fp32, for checks. Accelerate keeps device and precision for the rest
    of a process, which may need others, so they are forgotten at the end."""
    try:
        yield Accelerator(cpu=True, mixed_precision="no")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def set_threads() -> str | None:
    """Use all cores where a launcher left one thread a process; returns a line that says so, or None.

    `accelerate-launch` and `torchrun` set OMP_NUM_THREADS=1 where the user did not, which halves a CPU run on two cores.
    FLOW_NUM_THREADS overrides.
    """
    requested = os.environ.get("FLOW_NUM_THREADS")
    if requested is not None:
        if not requested.isdecimal() or int(requested) < 1:
            raise UserError(f"FLOW_NUM_THREADS={requested}: must be a whole number of at least 1")
        torch.set_num_threads(int(requested))
        return None
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1" or threads <= 1:
        return None
    torch.set_num_threads(threads)
    return f"threads: {threads} a process (the launcher had set OMP_NUM_THREADS=1; FLOW_NUM_THREADS overrides)"


def tune_malloc() -> None:
    """Have glibc retain freed memory: it returns blocks above 32 MiB to the system, and mapping the activations of a large
    network page by page again takes a tenth of each step (docs/performance.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_bytes() -> int:
    """Bytes that this process held at most, on the GPU where it uses one."""
    if _has_accelerator() and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # here, as Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def decided_by_main(decide: Callable[[], Result]) -> Result:
    """decide() on the main process; all processes get its result, or its error, an OSError as a UserError. For what may change
    a moment later, such as the latest file of a folder. Every process calls it; without a process group it is just decide()."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return decide()
    answer: list[Any] = [None, None, UserError]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:  # a ValueError that is no UserError gets its key from `error_context`
            answer[1:] = str(error), UserError if isinstance(error, UserError | OSError) else ValueError
    value, message, kind = broadcast_object_list(answer)
    if message:
        raise kind(message)
    return value


def check_same(accelerator: Accelerator, value: Any, what: str, problem: str = DIFFERENT) -> None:
    """For what every process has read for itself, perhaps on another machine. Raises UserError, on all of them, where one has
    another value than the main process."""
    if any_process(accelerator, decided_by_main(lambda: value) != value):
        raise UserError(f"{what}: {problem}")


def main_process_first(accelerator: Accelerator, make: Callable[[], Any]) -> Any:
    """make() on the main process, then on one process of each machine, then on all others: only one downloads."""
    turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    result = None
    for i in range(3):
        if i == turn:
            result = make()
        accelerator.wait_for_everyone()
    return result


def progress(accelerator: Accelerator, total: int, desc: str, initial: int = 0, shown: bool = True) -> tqdm:
    """The bar of a long job, with the time left, on the main process; a line every ten seconds where it goes to a file."""
    mininterval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        mininterval=mininterval,
        dynamic_ncols=True,
        disable=not (shown and accelerator.is_main_process),
    )


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process where the flag is True on any; the device is not waited for."""
    if accelerator.num_processes == 1:
        return flag
    answer = AnyProcess(accelerator)
    answer(flag)
    return answer.wait()


class AnyProcess:
    """`any_process` of a flag that is asked for at every step: a call returns the answer to the call before, so that no process
    waits for the others. A single process gets the flag itself."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.started: tuple[torch.Tensor, Any] | None = None  # the flag, and the work that adds those of the others to it

    def __call__(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        before = self.wait()
        value = torch.tensor([int(flag)])
        group = _control_group(dist.group.WORLD, self.accelerator.init_handler.timeout)
        self.started = value, dist.all_reduce(value, group=group, async_op=True)
        return before

    def wait(self) -> bool:
        """The answer to the last call; False where there was none."""
        if self.started is None:
            return False
        (value, work), self.started = self.started, None
        work.wait()
        return bool(value.item())


def gather_to_main(accelerator: Accelerator, local: Any) -> list | None:
    """The objects of all processes, by rank, on the main process; None on the others."""
    if accelerator.num_processes == 1:
        return [local]
    gathered = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(local, gathered, group=_control_group(dist.group.WORLD, accelerator.init_handler.timeout))
    return gathered


def gather_in_order(accelerator: Accelerator, parts: list[tuple[int, Any]]) -> list | None:
    """The items of (position, item) of all processes, by position, on the main process; None on the others."""
    gathered = gather_to_main(accelerator, parts)
    if gathered is None:
        return None
    return [item for _, item in sorted((pair for local in gathered for pair in local), key=lambda pair: pair[0])]


@functools.cache
def _control_group(world: dist.ProcessGroup, timeout: timedelta):
    """A gloo group for flags and objects, whatever backend carries the gradients; one for each default group, as a process may
    create several in turn."""
    return dist.new_group(backend="gloo", timeout=timeout)


def _check_launch() -> None:
    """Raises UserError for a launcher that would change the training, and for too few processes.

    `accelerate-launch --cpu --num_processes 2` starts one process without a message. It leaves a rendezvous address but no
    group.
    """
    for name, (off, advice) in LAUNCHER_SETTINGS.items():
        value = os.environ.get(name, off)
        if value.lower() not in ("", off):
            raise UserError(f"{name}={value}, which the launcher has set: {advice}")
    if os.environ.get("ACCELERATE_USE_CPU") == "":  # which Accelerate takes for no word at all
        del os.environ["ACCELERATE_USE_CPU"]
    lone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if _keeps_to_cpu() and lone and "PMI_SIZE" not in os.environ:
        raise UserError(
            "the launcher started one process where several were requested (--cpu --num_processes N does that); use "
            "`accelerate-launch --multi_gpu --num_processes N`, which on a machine without GPUs runs on the CPU, "
            "or `torchrun --nproc_per_node N`"
        )


def _prepare_fsdp(has_accelerator: bool, timeout: timedelta) -> None:
    """Prepare a launch with FSDP, before the Accelerator is built; does nothing without it. Processes on CPUs are declared to
    be GPUs: accelerate shards only those, although gloo shards on CPUs just as well, which the tests rely on.

    Raises UserError for FSDP's first version, whose flat weights have no names, and for sharded checkpoints, whose metadata is
    a pickle.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_version={version}: must be 2, see configs/accelerate/fsdp.yaml")
    state_dict = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT (accelerate's default)")
    if state_dict.upper() not in ("FULL_STATE_DICT", "1"):
        raise UserError(f"fsdp_state_dict_type={state_dict}: must be FULL_STATE_DICT, see configs/accelerate/fsdp.yaml")
    if not has_accelerator and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True, timeout=timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
