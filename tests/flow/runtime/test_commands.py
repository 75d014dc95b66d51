"""Command lines that scripts run."""

from pathlib import Path

from flow.runtime.commands import evaluate_arguments


def test_flags_of_evaluate():
    """One value, several, none, and a flag without a value; a zero is a value."""
    flags = {"methods": ["euler", "heun"], "guidance_interval": (0.2, 1.0), "seed": 0, "nfe": None, "no_control": True}
    assert evaluate_arguments("run", Path("out"), ["data.root=/data"], **flags) == [
        "evaluate.py", "--weights", "run", "--methods", "euler", "heun", "--guidance_interval", "0.2", "1.0", "--seed", "0",
        "--no_control", "--out", "out", "data.root=/data",
    ]  # fmt: skip
