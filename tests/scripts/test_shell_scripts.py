"""The shell scripts: where they work, and the one that makes two hosts of this machine."""

import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY


def test_shell_scripts_change_to_the_repository():
    """The first cd of every script below scripts/ that goes up from its own folder."""
    upwards = re.compile(r'^cd "\$\(dirname "\$0"\)/(\.\.[^"]*)"', re.M)
    changes_of = {path: upwards.search(path.read_text()) for path in sorted((REPOSITORY / "scripts").rglob("*.sh"))}
    ends = {path.name: (path.parent / up[1]).resolve() for path, up in changes_of.items() if up}
    assert "two_hosts.sh" in ends
    assert [name for name, folder in ends.items() if not (folder / "train.py").is_file()] == []


@pytest.mark.slow
def test_two_hosts_are_one(tmp_path):
    """scripts/dev/two_hosts.sh: two network namespaces; the numbers of one host; the cable cut and mended."""
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(
        ["scripts/dev/two_hosts.sh", tmp_path], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the weights are those of one host, to the bit" in result.stdout
    assert "the cable mended, the run went on" in result.stdout
