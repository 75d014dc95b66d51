"""Previews during a training."""

from conftest import TINY_TRAIN


def test_a_failed_preview_does_not_end_the_run(here, tmp_path):
    """Its numbers overflow at this guidance; the training goes on, and so does a resume."""
    run, overflow = tmp_path / "run", ["preview.guidance_scale=1e38", "preview.sampling_steps=3"]
    printed = here("train", *TINY_TRAIN, "-e", run, *overflow)
    assert "note: no preview at step 4: image 0: its numbers are not finite" in printed
    assert (run / "snapshots/step_00000004.safetensors").is_file() and not list(run.glob("samples/*.png"))
    assert "no preview at step 4" in here("train", "-e", run, "-r", "latest")
    here("train", "-e", run, "-r", "latest", "preview.guidance_scale=2")
    assert [p.name for p in run.glob("samples/*.png")] == ["step_00000004.png"]
