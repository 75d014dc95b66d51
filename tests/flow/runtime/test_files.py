"""Files that are whole or absent."""

import pytest

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
