"""Where data sets lie."""

import os
from pathlib import Path


def default_root() -> Path:
    """Where data sets lie when nobody says otherwise: $FLOW_DATA, else ./data."""
    return Path(os.environ.get("FLOW_DATA") or "data").expanduser()


def resolve_path(root: Path, path: str) -> Path:
    """The folder `path` as it is, or below `root` where there is only that one."""
    folder = Path(path)
    return root / folder if not folder.is_dir() and (root / folder).is_dir() else folder
