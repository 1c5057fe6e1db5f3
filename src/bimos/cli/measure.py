"""Commands that look and change nothing: `eval`, `bench`, `info`, `methods` and `doctor`."""

from __future__ import annotations

import dataclasses
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from bimos.cli import show
from bimos.cli.group import Activation, CacheBits, HeadBits, Json, console, quiet, write_result
from bimos.errors import BimosError

Model = Annotated[
    str, typer.Argument(metavar="DIR|MODEL", help="Packed directory, model directory, .gguf file or Hub id.", show_default=False)
]


def evaluate(
    model: Model,
    ppl: Annotated[str | None, typer.Option(metavar="TEXTS", help="wikitext2, wikitext2-validation, c4 or files, with commas.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="TASKS", help="zeroshot6, lambada or lm_eval tasks, with commas.")] = None,
    windows: Annotated[int | None, typer.Option(metavar="N", help="Only the first windows of each text.")] = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens a window.")] = 2048,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first documents of each task.")] = None,
    activation: Activation = "exact",
    json: Json = None,
) -> None:
    """Measure perplexity and zero-shot accuracy.

    Perplexity on WikiText-2 if nothing else is asked for.

    Example: `bimos eval smollm2-1bit --ppl wikitext2,c4 --tasks zeroshot6 --json result.json`
    """
    quiet()
    from bimos.evaluation.perplexity import perplexity
    from bimos.evaluation.texts import load_text
    from bimos.evaluation.versions import provenance
    from bimos.evaluation.zeroshot import check_tasks, expand, zero_shot
    from bimos.models import load_to_measure, load_tokenizer
    from bimos.packing.linear import set_activation

    for name, given in (("ppl", ppl), ("tasks", tasks)):
        if given is not None and not show.split(given):
            raise BimosError(f"--{name} '{given}' names nothing; leave it out, or name what to measure")
    if limit is not None and not tasks:
        raise BimosError("--limit is about tasks: give --tasks too, or --windows for perplexity")
    if tasks and find_spec("lm_eval") is None:
        raise BimosError("zero-shot tasks need lm_eval; install it with: pip install 'bimos[eval]'")
    for name, number in (("limit", limit), ("windows", windows)):
        if number is not None and number < 1:
            raise BimosError(f"--{name} {number}: must be at least 1")
    names = show.split(tasks)
    if names:
        check_tasks(expand(names))
    texts = [load_text(name) for name in show.split(ppl or (None if tasks else "wikitext2"))]  # before the model: it may be missing
    if len({text.name for text in texts}) < len(texts):
        raise BimosError(f"--ppl {ppl}: two of these texts have one name; rename a file")
    started = time.monotonic()
    loaded, tokenizer = load_to_measure(model), load_tokenizer(model)
    set_activation(loaded, activation)
    out = console(json)
    result: dict[str, Any] = {"model": model, "activation": activation, "perplexity": {}}
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bars:
        for text in texts:
            bar = bars.add_task(text.label)
            measured = perplexity(
                *(loaded, tokenizer, text),
                context=context,
                windows=windows,
                progress=lambda done, total, value, bar=bar: bars.update(
                    bar, completed=done, total=total, description=f"perplexity {value:.2f}"
                ),  # type: ignore[misc]
            )
            result["perplexity"][text.name] = measured.to_dict()
    if names:
        result["tasks"] = zero_shot(loaded, tokenizer, names, limit=limit)
    result |= provenance() | {"seconds": time.monotonic() - started}
    show.perplexities(out, result)
    show.tasks(out, result)
    write_result(json, result)


def bench(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(metavar="N,N", help="Lengths of the prompts in tokens; 16,128,512 as far as they fit.", show_default=False)
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences decoded side by side, with commas.")] = "1,8",
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to decode behind each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds; figures are medians over them.")] = 5,
    threads: Annotated[int | None, typer.Option(metavar="N", help="As many as torch takes if not given.", show_default=False)] = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = 16,
    activation: Activation = "exact",
    json: Json = None,
) -> None:
    """Measure how fast a model reads and decodes on this CPU.

    Also its memory, and the share of the machine's read bandwidth that decoding reaches, measured in between. In the engine where that
    covers the model, in transformers elsewhere.

    Example: `bimos bench smollm2-1bit --prompt 16,512 --threads 2 --json speed.json`
    """
    quiet()
    from bimos.engine import check_options
    from bimos.evaluation.speed import Runs, measure
    from bimos.evaluation.versions import provenance

    check_options(head_bits, cache_bits, activation)
    options = {"head_bits": head_bits, "cache_bits": cache_bits, "activation": activation}
    runs = Runs(None if prompt is None else _numbers("prompt", prompt), _numbers("batch", batch), tokens, repeats, threads)
    out = console(json)
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("runs")
        measured = measure(model, runs, lambda done, total: bars.update(bar, completed=done, total=total), options)
    result = {"model": model, **measured, **provenance()}
    show.speed(out, result)
    write_result(json, result)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(map(int, show.split(text))))
    except ValueError:
        numbers = ()
    if not numbers:
        raise BimosError(f"--{option} {text}: must be whole numbers with commas, such as 16,512")
    return numbers


def info(model: Model, json: Json = None) -> None:
    """Show where a model's bytes are, and its bits per weight; of planes of zeros and ones, how many additions they skip.

    Of a .gguf file or a Hub id only the config is read: sizes are then those of 16-bit weights. Checksums are not compared:
    that is done when weights are loaded.

    Example: `bimos info smollm2-1bit`
    """
    quiet()
    from bimos.models import empty_model, load_config
    from bimos.packing.agreement import check_headers
    from bimos.packing.integrity import is_packed, read_config, weight_files
    from bimos.packing.sizes import size_report
    from bimos.packing.sparsity import sparsity_report

    result: dict[str, Any] = {"model": model}
    if Path(model).expanduser().is_dir():
        directory = Path(model).expanduser()
        packing = (read_config(directory).get("quantization_config") if is_packed(directory) else None) or {}
        if packing:
            check_headers(directory)
        result |= size_report(directory)
        result |= {key: packing[key] for key in ("method", "options", "embedding_bits", "format_version") if key in packing}
        planes = sparsity_report(weight_files(directory), packing) if is_packed(directory) else None
        result |= {} if planes is None else {"planes": planes}
    else:
        result |= size_report(empty_model(load_config(model)))
    out = console(json)
    show.sizes(out, result)
    show.planes(out, result)
    if "method" in result:
        options = ", ".join(f"{key}={value}" for key, value in dict(result.get("options") or {}).items())
        out.print(f"method {result['method']} ({options or 'no options'}), embeddings in {result.get('embedding_bits', 16)} bits")
    write_result(json, result)


def methods(json: Json = None) -> None:
    """List the binarization methods and their options.

    Example: `bimos methods`
    """
    from bimos.methods import available_methods

    known = available_methods()
    table = Table("method", "what it is", "options and their defaults", box=None, pad_edge=False)
    for name, config in known.items():
        options = ", ".join(f"{key}={value}" for key, value in config().to_dict().items())
        table.add_row(name, config.summary, options or "none")
    console(json).print(table)
    described = {name: {"summary": config.summary, "options": dataclasses.asdict(config())} for name, config in known.items()}
    write_result(json, {"methods": described})


def doctor(json: Json = None) -> None:
    """Show this machine, the installation and the kernels in use.

    Exit code 1 if something must be mended.

    Example: `bimos doctor`
    """
    quiet()
    from bimos.doctor import diagnose

    report = diagnose()
    show.diagnosis(console(json), report)
    write_result(json, report)
    if report["problems"]:
        raise typer.Exit(1)
