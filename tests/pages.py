"""The pages of the documentation as tests read them."""

import re

from conftest import REPOSITORY


def blocks(name: str, language: str) -> list[str]:
    """The blocks of code in this language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / name).read_text(encoding="utf-8"), re.S)
