"""What an unfinished run leaves in its output directory, and whether it may be continued.

In the folder `work`: `run.json` (what was asked for), the token cache, one file per finished block and the distillation's checkpoints. It
is deleted once the checkpoint is in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from bimos.config import RunConfig
from bimos.errors import BimosError
from bimos.evaluation.versions import write_json
from bimos.packing.checkpoint import recover
from bimos.training.checkpoints import checkpoints
from bimos.training.data import TokenStream

WORK = "work"
DONE = ".bimos-work-done"  # what it is called while it is being deleted
# What a run was that does not say so, being begun before there was the key.
UNSAID = {"low_memory": False, "distill": {"int8_teacher": False, "expert_share": 1.0, "epsilon": 1e-8}}


def fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes and a few values of every parameter: tells one model from another in milliseconds."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        picked = values[:: max(1, len(values) // 16)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()


def settle(output: Path) -> None:
    """Put things in order after a kill in one of the moments when the work was not in its place.

    They are the first, before `run.json` was there, those when a new checkpoint took the place of the old one, and the last, when the work
    was being deleted.
    """
    recover(output.resolve())
    work = output / WORK
    shutil.rmtree(output / DONE, ignore_errors=True)
    stranded = output.resolve().parent / f".{output.resolve().name}.saving" / WORK
    if (stranded / "run.json").exists() and output.is_dir() and not work.exists():
        stranded.rename(work)
    if work.is_dir() and all(path.name.startswith(".run.json.") for path in work.iterdir()):
        shutil.rmtree(work)
        with contextlib.suppress(OSError):
            output.rmdir()


def discard(output: Path) -> None:
    """Delete the work, so that after a kill there is all of it or none."""
    work, done = output / WORK, output / DONE
    shutil.rmtree(done, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        work.rename(done)
    shutil.rmtree(done, ignore_errors=True)


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Within it, this run works in `output` and no other. The lock lies beside it: what is in it changes places.

    Raises:
        BimosError: another run works there, or there is no writing.
    """
    place = output.expanduser().resolve()
    path = place.parent / f".{place.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        if not path.exists():  # the library also waits for a place where there is no writing
            raise BimosError(f"cannot write to '{output}'; name another output directory") from None
        raise BimosError(f"another run works in '{output}'; let it finish, or name another output directory") from None
    except OSError as error:
        raise BimosError(f"cannot write to '{output}': {error.strerror}; name another output directory") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def read_run(output: Path) -> dict[str, Any]:
    path = output / WORK / "run.json"
    if not path.exists():
        if (output / "result.json").exists():
            raise BimosError(f"nothing to resume in '{output}' (the run there is finished); give another directory, or --overwrite")
        raise BimosError(f"nothing to resume in '{output}'; start without --resume")
    with contextlib.suppress(ValueError, TypeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and {"model", "weights", "config", "evaluate"} <= known.keys():
            said = {**known["config"]}
            unsaid = {
                key: {**value, **said.get(key, {})} if isinstance(value, dict) else said.get(key, value) for key, value in UNSAID.items()
            }
            return known | {"config": {**said, **unsaid}}
    raise BimosError(f"'{path}' is damaged; start anew with --overwrite")


def remembered(output: str | Path) -> dict[str, Any]:
    """The config that the unfinished run in `output` was started with. Raises BimosError: there is none."""
    output = Path(output).expanduser()
    settle(output)
    return read_run(output)["config"]


def check_same_run(output: Path, known: dict[str, Any], model: str, config: RunConfig) -> None:
    if known["model"] != model and not same_path(known["model"], model):
        raise BimosError(f"the run in '{output}' is of model '{known['model']}', not '{model}'; name that model, or use --overwrite")
    before, now = flat(known["config"]), flat(json.loads(json.dumps(config.to_dict())))
    begun = bool(checkpoints(output / WORK / "distill"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and (begun or not key.startswith("distill.")):
            raise BimosError(
                f"the run in '{output}' was started with {key}={before.get(key)}, now it is {now.get(key)}; "
                "give the same options (none: they are remembered) or use --overwrite"
            )


def same_path(a: str, b: str) -> bool:
    """Whether both lead to one thing that exists."""
    return Path(a).expanduser().exists() and Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def check_same_text(stream: TokenStream, path: Path) -> None:
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != stream.fingerprint:
        raise BimosError(f"the training text '{stream.spec}' has changed since the run began; put it back, or start anew with --overwrite")
    write_json(path, stream.fingerprint)  # type: ignore[arg-type]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys in one level, `{"distill.lr_latent": 7e-4}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
