"""Snapshots on the Hugging Face hub: `hf:owner/name` and `hf:owner/name@revision` wherever weights are named.

Only FETCHED is ever fetched, files that cannot run code, into the cache of huggingface_hub, with its token and its
environment variables (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). `huggingface_hub` is imported where it is used, for
the sake of the start of every script.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from configs.errors import UserError
from datasets.hub import ask
from flow.runtime import distributed

Result = TypeVar("Result")

PREFIX = "hf:"
WEIGHTS_FILE = "model.safetensors"
CARD = "README.md"
LIBRARY = "flow-matching-runner"  # of a card, the mark of an export
FETCHED = (WEIGHTS_FILE, "config.yaml", CARD)
FILES = (*FETCHED, "samples.png")  # of an exported folder
_REFERENCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FORM = "must be hf:owner/name or hf:owner/name@revision"


def is_reference(weights: str | Path) -> bool:
    return str(weights).startswith(PREFIX)


def parse(key: str, reference: str | Path) -> tuple[str, str | None]:
    """(owner/name, revision) of a reference. Raises UserError that names the key for another form."""
    match = _REFERENCE.fullmatch(str(reference))
    if match is None:
        raise UserError(f"{key} {reference}: {_FORM}")
    return match.group(1), match.group(2)


def name_of(reference: str | Path) -> str:
    """`name` of hf:owner/name@revision, for tables and folders."""
    return parse("--weights", reference)[0].split("/")[1]


def download(reference: str | Path) -> Path:
    """The weights of a reference, in the cache of huggingface_hub.

    Where processes are connected, the main one decides which commit the revision is and fetches it; the others then take that
    commit, from the cache where it is on their disk. Every process has to call it.

    Raises:
        UserError: for a repository, revision or file that there is not, without access, and without a connection where the
            cache does not have the files.
    """
    repo, revision = parse("--weights", reference)
    path = distributed.decided_by_main(lambda: _fetch(reference, repo, revision))
    return path if path.is_file() else _fetch(reference, repo, path.parent.name)  # on another machine


def check_push(reference: str) -> str:
    """The repository owner/name of an upload. Raises UserError for a revision and without a token."""
    from huggingface_hub import get_token

    repo, revision = parse("--push", reference)
    if revision:
        raise UserError(f"--push {reference}: uploads go to the main branch; leave out @{revision}")
    if get_token() is None:
        raise UserError(f"--push {reference}: there is no token; log in with `hf auth login`, or set HF_TOKEN")
    return repo


def push(folder: Path, reference: str, private: bool) -> str:
    """Upload an exported folder as one commit, to a repository that is new or holds an earlier export; its address.

    private: of a new repository; an existing one stays as it is.

    Raises:
        UserError: for a repository of other files, without a token or a connection, and for what the hub refuses.
    """
    from huggingface_hub import HfApi

    key = f"--push {reference}"
    repo = check_push(reference)
    api = HfApi()
    _call(key, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    existing = set(_call(key, lambda: api.list_repo_files(repo))) - {".gitattributes"}
    if others := existing - set(FILES):
        raise UserError(f"{key}: the repository holds other files ({', '.join(sorted(others)[:3])}); name another one")
    if existing:
        text = _call(key, lambda: api.hf_hub_download(repo, CARD)) if CARD in existing else None
        if text is None or f"library_name: {LIBRARY}" not in Path(text).read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{key}: the repository holds no export of this project; name another one")
    _call(key, lambda: api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES), commit_message="Export"))
    return f"{api.endpoint}/{repo}"


def _fetch(reference: str | Path, repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(repo, revision=revision, allow_patterns=list(FETCHED), max_workers=1)

    path = Path(_call(f"--weights {reference}", fetch)) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"--weights {reference}: the repository has no {WEIGHTS_FILE}; scripts.export --push writes one")
    return path


def _call(key: str, function: Callable[[], Result]) -> Result:
    """What the client returns. Raises UserError that begins with the key."""
    try:
        return ask(function)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
