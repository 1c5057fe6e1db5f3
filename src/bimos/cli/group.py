"""What every command shares: how errors end, how results are written, and silence from the libraries below."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from bimos.errors import BimosError, disk_full, no_space

UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")  # of the click that typer brings

CONTINUE = {"quantize": "run again with --resume", "demo": "run again to continue", "compare": "run again to continue"}


class Commands(TyperGroup):
    """Turns what the user can mend into one line and an exit code. Lists commands in the order of their definition."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except UsageError as error:  # of `bimos` itself, before any command
            raise _misused(error) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BimosError as error:
            raise _fail(str(error)) from error
        except UsageError as error:
            raise _misused(error) from error
        except KeyboardInterrupt as error:
            how = CONTINUE.get(ctx.invoked_subcommand)
            print("\ninterrupted" + (f"; {how}" if how else ""), file=sys.stderr)
            raise typer.Exit(130) from error
        except Exception as error:
            if disk_full(error):
                begun = ", with --resume if the run had begun" if ctx.invoked_subcommand == "quantize" else ""
                raise _fail(no_space(error, "run again" + begun)) from error
            raise


def _misused(error: Any) -> typer.Exit:
    asked = "" if error.ctx is None else f"; see {error.ctx.command_path} --help"
    return _fail(f"{error.format_message().rstrip('.')}{asked}")


def _fail(message: str) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(2)


def quiet() -> None:
    """No bars and advice about the insides of libraries; downloads from the Hub keep their bars, they can take an hour."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="bimos")
    warnings.showwarning = _show_warning
    for library in ("torchao", "torch.utils._pytree"):  # which transformers imports where it is there: kernels that it has not, for one
        logging.getLogger(library).setLevel(logging.ERROR)
    import datasets
    import huggingface_hub.utils
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # and the Hub's with them
    huggingface_hub.utils.enable_progress_bars()
    modeling_gguf_pytorch_utils.tqdm = functools.partial(modeling_gguf_pytorch_utils.tqdm, disable=True)  # it asks no setting
    datasets.utils.logging.set_verbosity_error()


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def console(json_file: Path | None = None) -> Console:
    """Where people read results. Wide when it is no terminal, so that no table is cut in a log."""
    stderr = str(json_file) == "-"
    plain = Console(highlight=False, markup=False, stderr=stderr)  # brackets are brackets: paths, pip install 'bimos[eval]'
    return plain if plain.is_terminal else Console(highlight=False, markup=False, stderr=stderr, width=140)


def _writable(path: Path | None) -> Path | None:
    """A result that takes an hour must not be lost to a typing error in the name of its file."""
    if path is not None and str(path) != "-":
        replaced = path.is_file() or not path.exists()  # by a new file, which the folder must take; not a device or a pipe
        folder = path.resolve().parent if replaced else path.absolute().parent
        if not folder.is_dir():
            raise BimosError(f"--json {path}: there is no folder '{folder}'; make it first")
        if path.is_dir() or not all(os.access(place, os.W_OK) for place in [folder] * replaced + [path] * path.exists()):
            raise BimosError(f"--json {path}: cannot write there; give another file")
        if path.is_file() and not _is_result(path):
            raise BimosError(f"--json {path}: that file is there and no result of bimos; name another")
    return path


def _is_result(path: Path) -> bool:
    """Whether a file may be replaced by a result: an empty one, or one that `write_result` has written. Not a model's config."""
    if path.stat().st_size == 0:
        return True
    try:
        known = json.loads(path.read_bytes()) if path.stat().st_size < 2**28 else None
    except (ValueError, RecursionError):
        return False
    return isinstance(known, dict) and ("bimos" in known or "bimos" in dict(known.get("versions") or {}))


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_writable, help="Write the result to a file as JSON; - for stdout."),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        metavar="8|4",
        help="Bits a weight of the head, whatever the checkpoint has (engine only); 4 cost a 135M model 0.7 % of perplexity.",
        show_default="as stored",
    ),
]
CacheBits = Annotated[int, typer.Option(metavar="16|8", help="Bits of cached keys and values (engine only); 8 take half the memory.")]
Activation = Annotated[str, typer.Option(metavar="HOW", help="exact, or int8: faster and less exact (packed models on a CPU).")]


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """The command's result as JSON, where `--json` asks for it, and which bimos it is of."""
    from bimos import __version__

    result = {"bimos": __version__} | result
    if str(path) == "-":
        from bimos.evaluation.versions import plain

        print(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False))
    elif path is not None:
        from bimos.evaluation.versions import write_json

        write_json(path, result)
