"""train.mixed_precision=auto: bf16 where the machine has instructions for it."""

from pathlib import Path

import pytest
import torch

from flow.runtime.distributed import build_accelerator, resolve_precision

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(torch.accelerator.is_available() or not CPUINFO.exists(), reason="reads the flags of a CPU")
def test_auto_is_what_the_cpu_has():
    flags = set(CPUINFO.read_text().split())
    expected = "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "no"
    assert resolve_precision("auto") == expected
    assert build_accelerator("auto").mixed_precision == expected


def test_others_stay():
    assert [resolve_precision(name) for name in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
