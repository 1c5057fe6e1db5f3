"""The one error that a user is meant to read, and the one of the machine that is told from all others."""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries in other languages say; the last two are of torch.save, behind a write that failed.
_IN_WORDS = ("No space left on device", "iostream error", "unexpected pos")


class BimosError(Exception):
    """Something the user can mend. The message is one line: it names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


def disk_full(error: BaseException | None) -> bool:
    """Whether the disk is full; also where a library in another language reports it in words, or where it is another error's cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _IN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(error: BaseException | None = None, again: str = "run again") -> str:
    """The line of a full disk. Names the file, where the error of the system does.

    Args:
        again: how to go on, once there is room.
    """
    place = ""
    while error is not None and not place:
        if isinstance(error, OSError) and error.errno in _FULL:
            name = error.filename2 or error.filename  # a copy names what it copies first
            place = f" ('{name}')" if isinstance(name, str) else ""
        error = error.__cause__ or error.__context__
    return f"no space left on the device{place}: make room and {again}; what was saved before is intact"
