"""What a result needs to be reproduced: versions, commit and machine, and how a result is written to disk."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def provenance() -> dict[str, Any]:
    """What every JSON result carries.

    Returns:
        `{versions: {bimos, torch, transformers, python}, commit, machine: {cpu, cores, accelerator}}`. `commit` is None
        outside a git checkout and ends in `+dirty` if tracked files differ from it; `cores` are those this process may use.
    """
    import bimos

    versions = {"bimos": bimos.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {**versions, "python": platform.python_version()},
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": available_cores(), "accelerator": accelerator},
    }


def commit(root: Path | None = None) -> str | None:
    """Commit of the checkout at `root`, or that this package runs from, `+dirty` where tracked files differ; None if there is none."""
    root = root or Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():  # installed: the nearest repository above would be someone else's
        return None
    try:
        described = _git(root, "rev-parse", "HEAD")
        return f"{described}+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else described
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """Name of the CPU, such as `Intel(R) Xeon(R) Platinum 8481C`."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, never leaving half a file under `path`. NaN and infinities, which JSON has not, become null."""
    write_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` aside, fsync, rename. Makes the folder if needed.

    Raises:
        OSError: as the file system says; whatever was at `path` before is then still there.
    """
    if Path(path).exists() and not Path(path).is_file():  # a device or a pipe, which must not be replaced by a file
        Path(path).write_bytes(data)
        return
    path = Path(path).resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """`value` in JSON's types; what JSON cannot say, NaN and infinities, becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
