"""train.mixed_precision=auto: bf16 where the machine has instructions for it."""

import pytest
import torch

from flow.runtime.distributed import build_accelerator, resolve_precision


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch before 2.11")
@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_auto_is_what_the_cpu_has(monkeypatch, flag):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "bf16": False} | ({flag: True} if flag else {}))
    expected = "bf16" if flag else "no"
    assert resolve_precision("auto") == expected
    assert build_accelerator("auto").mixed_precision == expected


def test_others_stay():
    assert [resolve_precision(name) for name in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
