"""What a run is to do, settled and checked before any work: budget, text, output directory, the model's fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations

from bimos.config import DEFAULT_MINUTES, DistillConfig, RunConfig
from bimos.errors import BimosError, disk_full
from bimos.evaluation.perplexity import maximum_context
from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import write_json
from bimos.methods import MethodConfig, method_config
from bimos.models import check_finite, convertible_linears
from bimos.packing.checkpoint import check_output
from bimos.packing.embedding import check_embedding
from bimos.resume import WORK, check_same_run, discard, read_run, remembered, settle
from bimos.training.mapped import release
from bimos.training.sources import parse_sources


def settled_run(
    model: str | Path, output: Path, config: RunConfig | None, resume: bool, overwrite: bool, evaluate: Sequence[str]
) -> tuple[RunConfig, list[str]]:
    """What a run is to do, all of it checked that can be without its model, and an output directory that may be written."""
    work = output / WORK
    settle(output)
    if resume:
        evaluate = evaluate or read_run(output)["evaluate"]
        config = config or RunConfig.from_dict(remembered(output), str(work / "run.json"))
    config = config or RunConfig()
    config = with_budget(config, method_config(config.method, config.options))
    if not config.data:
        raise BimosError("no training text: give --data a txt, jsonl or parquet file, a Hub dataset, or 'self'")
    check_low_memory(config, evaluate)
    for name in evaluate:
        load_text(name)  # before the work, not after it
    if resume:
        check_same_run(output, read_run(output), str(model), config)
        return config, list(evaluate)
    if (work / "run.json").exists() and not overwrite:
        raise BimosError(f"'{output}' is not empty: it holds an interrupted run; --resume goes on with it, --overwrite starts anew")
    texts = [file for source in parse_sources(config.data) for file in source.files]
    check_output(output, overwrite, [model, *texts, *evaluate])
    if work.exists() and not (work / "run.json").exists():
        raise BimosError(f"'{work}' is where the run would keep its work, and holds something else; name another output directory")
    return config, list(evaluate)


def write_run(output: Path, facts: dict[str, Any], resume: bool) -> None:
    """Leave what the run is in its work folder. Raises BimosError: one to resume is of other weights, or there is no writing."""
    work = output / WORK
    if resume and read_run(output)["weights"] != facts["weights"]:
        raise BimosError(f"'{facts['model']}' has other weights than the run in '{output}' was started with; start anew with --overwrite")
    try:
        if not resume:
            discard(output)
            work.mkdir(parents=True, exist_ok=True)
        write_json(work / "run.json", facts)
    except OSError as error:
        if disk_full(error):
            raise
        raise BimosError(f"cannot write to '{output}': {error.strerror}; name another output directory") from None


def with_budget(config: RunConfig, method: MethodConfig) -> RunConfig:
    """The config, with the method's rate, and the default's minutes where something is trained and neither minutes nor tokens are given.

    Raises:
        BimosError: see `RunConfig.settled`.
    """
    settled = config.settled(method)
    endless = config.tokens is None and config.minutes is None and bool(settled.blocks.enabled or settled.distill.enabled)
    distill = dataclasses.replace(config.distill, lr_latent=settled.distill.lr_latent)
    return dataclasses.replace(config, minutes=DEFAULT_MINUTES if endless else config.minutes, distill=distill)


def check_low_memory(config: RunConfig, evaluate: Sequence[str] = ()) -> None:
    """Raises BimosError: what would need the whole teacher at once."""
    if config.low_memory and evaluate:
        raise BimosError(
            "--low-memory does not hold the whole model, and --ppl measures it: leave --ppl out, and use bimos eval afterwards"
        )
    if config.low_memory and any(source.kind == "self" for source in parse_sources(config.data)):
        raise BimosError("--low-memory does not hold the whole model, which would have to write the text of 'self'; give other --data")


def lean_options(config: RunConfig) -> list[str]:
    """The options that ask for torchao's optimizers."""
    plain, distill = DistillConfig(), config.distill
    return [f"distill.{key}={getattr(distill, key)}" for key in ("optimizer", "latents") if getattr(distill, key) != getattr(plain, key)]


def check_fit(teacher: PreTrainedModel, method: MethodConfig, config: RunConfig) -> None:
    """Raises BimosError on whatever would end the run only after much work."""
    linears = convertible_linears(teacher, config.skip)
    method.check_names(linears)
    for name, linear in linears.items():
        try:
            method.layout_of(name, linear.in_features, linear.out_features, linear.bias is not None)
        except BimosError as error:
            raise BimosError(f"'{name}': {error}") from None
    for name, module in teacher.named_modules():
        check_finite(module, name)
        if config.low_memory:
            release(module)
    if config.embedding_bits == 8:
        check_embedding(teacher.get_input_embeddings())
    limit = maximum_context(teacher)
    if limit is not None and config.sequence_length > limit:
        raise BimosError(
            f"sequence_length={config.sequence_length} is more than this model can take; use --set sequence_length={limit} or less"
        )
    for option in lean_options(config):
        if find_spec("torchao") is None:
            raise BimosError(f"{option} needs torchao: pip install 'bimos[lean]', or leave it out")
    known = get_available_reporting_integrations()
    if config.distill.report_to not in ("none", "all", *known):
        raise BimosError(f"distill.report_to={config.distill.report_to}: unknown or not installed; here: {', '.join(['none', *known])}")
