"""Commands that produce text: `generate` and `chat`."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from bimos.cli.group import Activation, CacheBits, HeadBits, Json, console, quiet, write_result
from bimos.errors import BimosError

Model = Annotated[
    str, typer.Argument(metavar="DIR", help="A packed model; also an original one, a .gguf file or a Hub id.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 takes the likeliest token; higher is freer.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Sample from the likeliest tokens with this total probability.")]
TopK = Annotated[int, typer.Option(metavar="K", min=0, help="Sample from so many of the likeliest tokens; 0: all.")]
MinP = Annotated[float, typer.Option(metavar="P", help="Sample from tokens at least this probable, times the likeliest one.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", metavar="R", help="Above 1, tokens that were there become less likely.")]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="The same seed gives the same text.", show_default=False)]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue; - reads it from stdin.", show_default=False)],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = 16,
    activation: Activation = "exact",
    json: Json = None,
) -> None:
    """Continue a text.

    Example: `bimos generate smollm2-1bit --prompt "Once upon a time" --max-new-tokens 60`
    """
    from bimos.generation import Sampling, continue_text

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, top_k, seed, min_p)
    _replace_bad_bytes()
    prompt = _utf8(sys.stdin.read().rstrip("\n") if prompt == "-" else prompt)
    loaded, tokenizer = _load(model, seed, head_bits, cache_bits, activation)
    out = sys.stderr if str(json) == "-" else sys.stdout
    begun = False

    def say(piece: str) -> None:
        nonlocal begun
        _say(piece if begun else prompt + piece, out)
        begun = True

    text = continue_text(loaded, tokenizer, prompt, sampling, say)
    print("" if begun else prompt, file=out)
    write_result(json, {"model": model, "prompt": prompt, "text": text, "seed": seed})


def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = None,
    head_bits: HeadBits = None,
    cache_bits: CacheBits = 16,
    activation: Activation = "exact",
) -> None:
    """Talk to a model.

    `/reset` starts over, `/exit` or Ctrl-D leaves, Ctrl-C stops an answer.

    Example: `bimos chat smollm2-1bit`, or `echo "Who are you?" | bimos chat smollm2-1bit`
    """
    from bimos.generation import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, top_k, seed, min_p)
    conversation = Conversation(*_load(model, seed, head_bits, cache_bits, activation), sampling)
    _replace_bad_bytes()
    typed = sys.stdin.isatty()
    if typed:
        kind = "" if conversation.has_template else "This model has no chat template: it continues what you write. "
        console().print(f"[dim]{kind}/reset starts over, /exit leaves[/dim]", markup=True)
    while (message := _read(typed)) is not None:
        if message in ("/exit", "/quit"):
            return
        if message == "/reset":
            conversation.reset()
        elif message:
            _answer(conversation, message, typed)


def _replace_bad_bytes() -> None:
    """Of what comes on stdin; a tokenizer takes nothing but Unicode."""
    if sys.stdin is None:  # closed: nothing comes
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def _utf8(text: str) -> str:
    """With what is no UTF-8 replaced: bytes of an argument come as surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(typed: bool) -> str | None:
    """The next message; None at the end of the input."""
    if not typed:
        line = _utf8(sys.stdin.readline())
        return line.strip() if line else None
    try:
        return _utf8(input("> ")).strip()
    except EOFError:
        print()
        return None


def _answer(conversation: Any, message: str, typed: bool) -> None:
    try:
        conversation.reply(message, _say)
    except KeyboardInterrupt:
        if not typed:
            raise
    except BimosError as error:
        if not typed:
            raise
        print(f"error: {error}", file=sys.stderr)
    print()


def _say(piece: str, out: Any = None) -> None:
    print(piece, end="", flush=True, file=out)


def _load(model: str, seed: int | None, head_bits: int | None, cache_bits: int, activation: str) -> tuple[Any, Any]:
    import torch

    from bimos.engine import Engine, check_options, is_engine_model, refusal, refuse_bits
    from bimos.packing import mapped
    from bimos.packing.family import Unknown
    from bimos.tokens import load_tokenizer

    check_options(head_bits, cache_bits, activation)
    options: dict[str, Any] = {"head_bits": head_bits, "cache_bits": cache_bits, "activation": activation}
    quick, path = None, Path(model).expanduser()
    if (path / "config.json").is_file() and not torch.cuda.is_available():
        with suppress(Unknown):
            quick = mapped.load(path)
    if quick is not None and is_engine_model(quick):
        tokenizer = load_tokenizer(model)
        return Engine(quick, tokenizer, **options), tokenizer
    quiet()
    import transformers

    from bimos import models
    from bimos.packing.linear import set_activation

    loaded: Any = models.load_model(model)
    tokenizer = models.load_tokenizer(model)
    if seed is not None:
        transformers.set_seed(seed)
    if torch.cuda.is_available():
        loaded = loaded.cuda()
    reason = refusal(loaded)
    if reason is None:
        return Engine(loaded, tokenizer, **options), tokenizer
    refuse_bits(head_bits, cache_bits, reason)
    set_activation(loaded, activation)
    return loaded, tokenizer
