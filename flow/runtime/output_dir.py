"""An output folder holds the work of one run: the same settings, or a refusal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema import UserError
from flow.runtime import files


def check_same_settings(
    folder: Path, existing: Sequence[Mapping[str, Any]] | None, settings: Mapping[str, Any], kind: str, script: str
) -> None:
    """Check that an output folder can be continued with these settings.

    Unfinished files of an interrupted run are deleted.

    Args:
        existing: the settings recorded in the folder, in one file or several; None where it holds no output of the script.
        settings: those of this run, as JSON gives them back. A key that was recorded but is not among them is not compared.
        kind: what the folder holds, as in "holds images of another run".

    Raises:
        UserError: for a folder with other settings, or with files that the script did not write.
    """
    if existing is None and folder.exists() and not files.is_empty_dir(folder):
        raise UserError(f"--save_dir {folder}: exists and was not written by {script}; name another folder")
    for recorded in existing or ():
        for key, value in settings.items():
            if recorded.get(key) != value:
                raise UserError(
                    f"--save_dir {folder}: holds {kind} of another run ({key} {recorded.get(key)}, now {value}); "
                    "name another folder"
                )
    files.clean_temporaries(folder)
