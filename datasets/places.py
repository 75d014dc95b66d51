"""Where data sets lie."""

import os
from pathlib import Path


def default_root() -> Path:
    """Where data sets lie when nobody says otherwise: $FLOW_DATA, else ./data."""
    return Path(os.environ.get("FLOW_DATA") or "data").expanduser()


def resolve_path(root: Path, path: str) -> Path:
    """The folder `path` as it is, or below `root` where there is only that one; where there is none a file of that name, which
    an error then calls one."""
    places = (Path(path), root / path)
    return next(filter(Path.is_dir, places), None) or next(filter(Path.exists, places), places[0])
