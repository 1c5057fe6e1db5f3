"""Commands that look into methods: `compare` them, `inspect` what one has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bimos.cli import show
from bimos.cli.group import Json, console, quiet, write_result
from bimos.errors import BimosError


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local directory or .gguf file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for rows, table, plot and page.", show_default=False)
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS",
            help="With commas: `fp16` (the model itself), methods, `hqq` and `auto-round` (libraries), .yaml recipes; options behind "
            "colons: `binarymos:num_experts=8`, `onebit:distill.lr_latent=1e-3`, `sign:untrained`.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SRC", help="Text to train on, as in `bimos quantize`.")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Budget of a row: tokens of end-to-end distillation.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="N", help="Budget of a row: minutes of all stages together.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of options that rows of methods start from.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One option of those rows, over the file's. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of data order and every random start.")] = None,
    embedding_bits: Annotated[int | None, typer.Option(metavar="8|16", help="Embeddings and head: int8 by row, or as they are.")] = None,
    ppl: Annotated[str, typer.Option(metavar="TEXTS", help="Texts for perplexity, as in `bimos eval`.")] = "wikitext2,c4",
    windows: Annotated[int | None, typer.Option(metavar="N", help="Only the first windows of each text.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="TASKS", help="zeroshot6, lambada or lm_eval tasks, with commas.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first documents of each task.")] = None,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Where checkpoints are kept; `work` in the output otherwise.")] = None,
    json: Json = None,
) -> None:
    """Compare methods at the same budget, text, seed and evaluation.

    Row after row, each in a process of its own; run again, after an interruption or with more rows, texts or tasks, it does what is
    missing. Writes a table, a plot of bits against perplexity, and a page.

    Example: `bimos compare HuggingFaceTB/SmolLM2-135M-Instruct --methods fp16,binarymos,onebit --data wiki.parquet --minutes 15 -o out`
    """
    from bimos.config import RunConfig, override, read_yaml

    base = override(read_yaml(config) if config else {}, assignments or [])
    given = {"data": data, "tokens": tokens, "minutes": minutes, "seed": seed, "embedding_bits": embedding_bits}
    given = {key: value for key, value in given.items() if value is not None}
    if "tokens" in given or "minutes" in given:
        given = {"tokens": None, "minutes": None} | given
    quiet()
    from bimos.comparison import run, table
    from bimos.comparison.pareto import require_matplotlib
    from bimos.comparison.rows import parse_rows
    from bimos.comparison.setting import Setting
    from bimos.config import DEFAULT_MINUTES

    require_matplotlib()
    together = RunConfig.from_dict(base | given, str(config) if config else "options")
    if together.tokens is None and together.minutes is None:
        together.minutes = DEFAULT_MINUTES
    setting = Setting.of(model, together, windows=windows, tasks=bool(tasks), limit=limit)
    if limit is not None and not tasks:
        raise BimosError("--limit is about tasks: give --tasks too, or --windows for perplexity")
    rows = parse_rows(show.split(methods), base, setting.shared())
    out = console(json)
    result = run.compare(rows, setting, output, texts=show.split(ppl), tasks=show.split(tasks), work=work, console=out)
    show.comparison(out, table.main_table(result))
    for metric in ("acc", "acc_norm"):
        if lines := table.task_table(result, metric):
            out.print(f"{metric}, %:")
            show.comparison(out, lines)
    out.print(f"written to {output}: index.html, table.md, pareto.svg, comparison.json", markup=False)
    write_result(json, result)


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A packed model with more than one scaling expert.", show_default=False)],
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="A file, a text as in `bimos eval --ppl`, or the text itself.", show_default=False)
    ],
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="End of the name of the linear to look at closely.", show_default="in the middle")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the text to run.")] = 512,
    shown: Annotated[int, typer.Option(metavar="N", help="Tokens in the heat map.")] = 48,
    comparison: Annotated[
        Path | None, typer.Option("--compare", metavar="DIR", help="Of `bimos compare`: also perplexity against the number of experts.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory for pictures and page.")] = Path("bimos-inspect"),
    json: Json = None,
) -> None:
    """Look into the routers of a packed model: which experts the tokens of a text choose, and what their scales become.

    Example: `bimos inspect smollm2-1bit --text "The lighthouse keeper wrote a letter every winter." -o figures`
    """
    quiet()
    from bimos.analysis.inspect import inspect as look
    from bimos.comparison.pareto import require_matplotlib

    require_matplotlib()
    out = console(json)
    result = look(model, text, output, layer=layer, tokens=tokens, shown=shown, comparison=comparison)
    show.routing(out, result)
    out.print(f"written to {output}: index.html, {', '.join(result['pictures'])}", markup=False)
    write_result(json, result)
