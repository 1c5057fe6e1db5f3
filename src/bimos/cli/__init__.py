"""The command line. A command is a function that parses, calls one function of the package and shows what it returns.

What the user can mend (`BimosError`, a full disk) ends as one line on stderr and exit code 2, an interruption with exit
code 130; anything else is a bug and keeps its traceback. Heavy imports happen inside the commands: help is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from bimos import __version__
from bimos.cli import make, measure, study, talk
from bimos.cli.group import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bimos {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def bimos(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models with about one bit per weight: make them, measure them, talk to them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": make.quantize,
    "eval": measure.evaluate,
    "compare": study.compare,
    "inspect": study.inspect,
    "bench": measure.bench,
    "info": measure.info,
    "generate": talk.generate,
    "chat": talk.chat,
    "unpack": make.unpack,
    "convert": make.convert,
    "methods": measure.methods,
    "doctor": measure.doctor,
    "demo": make.demo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    app(prog_name="bimos")
