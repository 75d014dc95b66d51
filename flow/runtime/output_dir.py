"""An output folder holds the work of one run: the same settings, or a refusal; and only what is missing is made."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from configs.errors import UserError
from flow.runtime import distributed, files


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


def write_missing(
    accelerator: Accelerator, plan: Mapping[Path, range], verify: Callable[[Path, int], str | None],
    write: Callable[[Path, range, tqdm], None], desc: str,
) -> int:  # fmt: skip
    """Write the files that are missing or damaged, each process its share of them. Damage is named.

    Args:
        plan: the indices of the items of each file.
        verify: what is wrong with a file of so many items, None where it is whole.
        write: makes one file, and counts its items on the bar.

    Returns:
        How many items all processes wrote, on the main process; on the others 0.
    """
    local_files = list(plan.items())[accelerator.process_index :: accelerator.num_processes]
    num_written = 0
    with distributed.progress(accelerator, sum(len(indices) for _, indices in local_files), desc) as bar:
        for path, indices in local_files:
            damage = verify(path, len(indices))
            if not damage:
                bar.update(len(indices))
                continue
            if path.exists():
                bar.write(f"{damage}; regenerating")
            write(path, indices, bar)
            num_written += len(indices)
    return sum(distributed.gather_to_main(accelerator, num_written) or [0])
