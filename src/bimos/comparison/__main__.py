"""`python -m bimos.comparison JOB.json make evaluate`: one row; see `work.py`."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path

from bimos.cli.group import console, quiet
from bimos.errors import BimosError, disk_full


def main() -> None:
    """Exit code 2: what to mend is in `error.txt`; `ENOSPC`: the disk is full, and there may be no room to say it in a file."""
    try:
        _work()
    except KeyboardInterrupt:
        sys.exit(130)  # the same Ctrl-C has reached the starter, which says so
    except Exception as error:
        if not disk_full(error):
            raise
        sys.exit(errno.ENOSPC)


def _work() -> None:
    quiet()  # before the libraries are imported
    from bimos.comparison.work import Job, work
    from bimos.evaluation.versions import write_text

    path, *steps = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    _end_with_starter()
    try:
        work(job, steps, console(Path("-")))  # on stderr: stdout is for the JSON of the command
    except BimosError as error:
        write_text(Path(job.folder) / "error.txt", str(error))
        sys.exit(2)


def _end_with_starter() -> None:
    def watch() -> None:
        os.read(0, 1)  # ends when nobody can write to it any more; not sys.stdin, whose lock would be held when this process ends
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
