"""Files of data sets on the Hugging Face hub, in its cache (`HF_HOME`); `HF_TOKEN` or `hf auth login` opens private ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def list_files(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision (None: main) stands for, and the paths of its files. Raises ValueError."""
    from huggingface_hub import HfApi

    info = _ask(repository, lambda: HfApi().dataset_info(repository, revision=revision))
    return info.sha, [file.rfilename for file in info.siblings]


def download(repository: str, commit: str, names: Sequence[str]) -> Path:
    """The folder below which the files lie, downloaded where the cache lacks them. Raises ValueError."""
    from huggingface_hub import hf_hub_download

    for name in names:
        path = _ask(repository, lambda n=name: hf_hub_download(repository, n, repo_type="dataset", revision=commit))
        folder = Path(path).parents[name.count("/")]
    return folder


def _ask(repository: str, request: Any) -> Any:
    from huggingface_hub import errors

    try:
        return request()
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        reason = "is not there, or private or gated: accept its terms on the hub and set HF_TOKEN, or `hf auth login`"
    except Exception as error:  # of the network, the file system and a dozen kinds of the hub
        reason = f"cannot be read from the hub ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    raise ValueError(f"hf:{repository}: {reason}")
