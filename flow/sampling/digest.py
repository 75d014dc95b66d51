"""The digest of itself that a safetensors file carries in its header."""

import hashlib
import json
import re
from pathlib import Path

KEY = "digest"
BLANK = "0" * 64  # what stands in its place when it is computed
_DIGEST = re.compile(rb'("digest":")([0-9a-f]{64})(")')


def seal(path: Path) -> None:
    """Fill in the digest of a file whose metadata have the entry `digest`, so far BLANK, and put the metadata in order: the
    library writes them in a random one, and the same weights would be another file each time."""
    with open(path, "r+b") as file:
        start = file.read(8)
        header = json.loads(file.read(size := int.from_bytes(start, "little")))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:  # the library writes JSON in the same way
            raise ValueError(f"{path}: the header of safetensors has another form than expected")
        digest = hashlib.sha256(start + text)
        hashlib.file_digest(file, lambda: digest)  # the rest of the file
        file.seek(8)
        file.write(_DIGEST.sub(rb"\g<1>" + digest.hexdigest().encode() + rb"\g<3>", text, count=1))


def stored_and_actual(path: Path) -> tuple[str | None, str]:
    """(the digest that the file carries, None for a file that was never sealed; the one that it should carry)."""
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        match = _DIGEST.search(header)
        digest = hashlib.sha256(start + _DIGEST.sub(rb"\g<1>" + BLANK.encode() + rb"\g<3>", header, count=1))
        hashlib.file_digest(file, lambda: digest)  # the rest of the file
    return match.group(2).decode() if match else None, digest.hexdigest()
