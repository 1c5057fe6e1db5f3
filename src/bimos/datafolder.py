"""Where local texts and evaluation sets lie, and what of them is no text: for training and evaluation alike."""

from __future__ import annotations

import os
from pathlib import Path

from bimos.errors import BimosError


def data_directory() -> Path | None:
    """Folder of local texts and evaluation sets: `$BIMOS_DATA`, or `../shared/data` beside a checkout; None if there is none.

    Raises:
        BimosError: `BIMOS_DATA` names a folder that does not exist.
    """
    if given := os.environ.get("BIMOS_DATA"):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise BimosError(f"BIMOS_DATA='{given}' is not a folder; unset it or name the folder that holds wikitext2/, c4/ and zeroshot/")
        return folder
    checkout = Path(__file__).resolve().parents[2]
    beside = checkout.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def whole_characters(text: str) -> str:
    """`text`, with U+FFFD for what is no character: JSON can name one half of a surrogate pair, which nothing can write or tokenise."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
