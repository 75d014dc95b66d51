"""Files that are whole or absent."""

import pytest

from flow.runtime import files


def test_atomic_file_keeps_the_old_content_when_writing_fails(tmp_path):
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
