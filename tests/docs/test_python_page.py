"""docs/python.md: its examples run in order, on a tiny run, and print what their comments say."""

import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
INLINE = re.findall(r"`(sampler\.sample\(.*?\))`", PAGE)


def test_examples(capsys, monkeypatch, tiny_run, tmp_path):
    for name, target in {"configs": REPOSITORY / "configs", "runs/digits": tiny_run}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    code = CODE.replace("train.steps=100", "train.steps=2").replace('"train.log_with', '"train.batch_size=16", "train.log_with')
    names: dict = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    for expected in re.findall(r"^print\(.*\)  # (.*)$", code, re.M):
        assert expected in lines
    assert len(INLINE) >= 2
    for call in INLINE:
        assert len(eval(call, names)) == 16
    assert any(line.startswith("2 ") for line in lines)  # of the callback
    assert (tmp_path / "runs/notebook/checkpoints/step_00000002").is_dir()
