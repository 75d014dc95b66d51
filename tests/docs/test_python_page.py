"""docs/python.md: its examples run in order, on a tiny run, and print what their comments say."""

import re

from conftest import REPOSITORY, TINY_RUN

PAGE = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
MLP = ["model.name=mlp", "model.args={width: 16, depth: 1, num_classes: 10}"]  # whose divergence takes milliseconds
FEWER = '"train.steps=2", "train.batch_size=16", "preview.n_samples=4", "preview.sampling_steps=1"'
INLINE = re.findall(r"`(sampler\.sample\(.*?\))`", PAGE)


def test_examples(here, capsys, monkeypatch, tmp_path):
    here("train", "data.name=digits", *MLP, *TINY_RUN, "-e", tmp_path / "runs/digits")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    code = CODE.replace('"train.steps=100"', FEWER)
    names: dict = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    comments = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert len(comments) == len(re.findall(r"^print\(", code, re.M)) >= 6
    assert set(comments) <= set(lines)
    assert len(INLINE) >= 2
    for call in INLINE:
        assert len(eval(call, names)) == 16
    assert any(line.startswith("2 ") for line in lines)  # of the callback
    assert (tmp_path / "runs/notebook/checkpoints/step_00000002").is_dir()
