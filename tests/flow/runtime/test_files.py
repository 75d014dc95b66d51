"""Files that are whole or absent."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flow.runtime import files


def test_failed_write_keeps_old_content(tmp_path):
    """Atomic file keeps the old content when writing fails."""
    path = tmp_path / "new" / "a.txt"
    with files.atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.parent == path.parent
    with pytest.raises(OSError, match="disk full"), files.atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    files.write_text(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü" and list(path.parent.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path):
    """As the umask says, also files of safetensors, which are the owner's alone at first."""
    umask = os.umask(0o027)
    try:
        with files.atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
        (tmp_path / "new").mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / "new" / "b.safetensors")
        files.atomic_rename_dir(tmp_path / "new", tmp_path / "b")
        files.link(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    finally:
        os.umask(umask)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*.safetensors")} == {
        f"{name}.safetensors": "0o640" for name in "abc"
    }
    assert (tmp_path / "c.safetensors").samefile(tmp_path / "a.safetensors")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of open files")
def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """After a loss of power the name leads to the old content or the new one, never to an empty file."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        done.append(f"sync {'temporary a.txt' if name.startswith(files.TEMPORARY) and name.endswith('-a.txt') else name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_text(tmp_path / "a.txt", "new")
    assert done == ["sync temporary a.txt", "rename", f"sync {tmp_path.name}"]


def test_names_that_are_not_utf8_are_written(tmp_path):
    """As the bytes that they are."""
    name = os.fsdecode(b"run-\xff")
    files.append_line(tmp_path / "log.txt", name)
    files.append_line(tmp_path / "log.txt", "ü")
    assert (tmp_path / "log.txt").read_bytes() == b"run-\xff\n" + "ü\n".encode()
    files.write_text(tmp_path / "table.md", f"| {name} |")
    assert (tmp_path / "table.md").read_bytes() == b"| run-\xff |"


def test_free_folder(tmp_path):
    """The first that is not there, is empty or will do; a name that no folder can have stays as it is."""
    for k in ("", "_2"):
        (tmp_path / f"a{k}" / "b").mkdir(parents=True)
    (tmp_path / "a_3").mkdir()
    assert files.free_folder(tmp_path / "a") == tmp_path / "a_3"
    assert files.free_folder(tmp_path / "a", lambda folder: folder.name == "a_2") == tmp_path / "a_2"
    assert files.free_folder(tmp_path / ("x" * 300)) == tmp_path / ("x" * 300)


def test_folders_without_a_name(tmp_path, monkeypatch):
    """Others are named after them."""
    monkeypatch.chdir(tmp_path)
    assert files.resolve_unnamed(Path()) == tmp_path and files.resolve_unnamed(Path("..")) == tmp_path.parent
    assert files.resolve_unnamed(Path("a/b")) == Path("a/b")


def test_folder_that_is_closed_is_not_free(tmp_path, monkeypatch):
    """Of another user; it does not end a training that has only its hint left to print."""
    (tmp_path / "a").mkdir()

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(files, "is_empty_dir", refuse)
    assert files.free_folder(tmp_path / "a") == tmp_path / "a_2"
