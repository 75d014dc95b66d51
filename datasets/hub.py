"""Files of data sets on the Hugging Face hub, in its cache (`HF_HOME`); `HF_TOKEN` or `hf auth login` opens private ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def list_files(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision (None: main) stands for, and the paths of its files. Raises ValueError."""
    from huggingface_hub import HfApi

    info = _named(repository, lambda: HfApi().dataset_info(repository, revision=revision))
    return info.sha, [file.rfilename for file in info.siblings]


def download(repository: str, commit: str, names: Sequence[str]) -> Path:
    """The folder below which the files lie, downloaded where the cache lacks them. Raises ValueError."""
    from huggingface_hub import hf_hub_download

    for name in names:
        path = _named(repository, lambda n=name: hf_hub_download(repository, n, repo_type="dataset", revision=commit))
        folder = Path(path).parents[name.count("/")]
    return folder


def _named(repository: str, request: Callable[[], Result]) -> Result:
    try:
        return ask(request)
    except ValueError as error:
        raise ValueError(f"hf:{repository}: {error}") from None


def ask(request: Callable[[], Result]) -> Result:
    """What the client returns. Raises ValueError with a reason for whatever it raises about the hub, the connection or the
    disk."""
    from huggingface_hub import constants, errors

    access = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return request()
    except errors.GatedRepoError:
        reason = f"access has to be asked for on its page; then {access}"
    except errors.RepositoryNotFoundError:
        reason = f"there is no such repository, or it is private and the token is not one for it; {access}"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except errors.LocalEntryNotFoundError:
        reason = f"the hub ({constants.ENDPOINT}) cannot be reached, and the cache does not have the files"
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        reason = f"the hub refuses: {_first_line(error)}" + (f"; {access}" if refused else "")
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore")):  # whose errors are of no common kind with others
            reason = f"the hub ({constants.ENDPOINT}) cannot be reached ({_first_line(error)})"
        elif isinstance(error, OSError | ValueError):
            reason = _first_line(error)
        else:
            raise
    raise ValueError(reason)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
