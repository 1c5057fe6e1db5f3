"""The engine against transformers on a real model: logits of a text, and greedy continuations.

    python benchmarks/parity.py smollm2-1bit -o benchmarks/results/parity.json

The other side is the same checkpoint in float32 in transformers, its products in plain torch (`BIMOS_ISA=reference`), in a process of
its own: nothing of the C++ library is on both sides. Logits are teacher-forced, all in one context. A continuation counts as equal
when all of its tokens are; where one is not, `margins` has the reference's lead of its own token over the engine's, relative to the
norm of its logits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimos.evaluation.texts import load_text
from bimos.evaluation.versions import provenance, write_json

BATCH = 25


def reference(directory: str, windows: dict[str, Tensor], new: int) -> dict[str, Tensor]:
    """Of transformers: `logits [T, vocabulary]`, `tokens [prompts, new]`, and `scores [prompts, new, vocabulary]` that picked them."""
    from bimos.models import load_model

    model: Any = load_model(directory, torch.float32)
    with torch.inference_mode():
        result = {"logits": model(input_ids=windows["text"][None], use_cache=False).logits[0]}
        arguments = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
        tokens, scores = [], []
        for prompts in windows["prompts"].split(BATCH):
            output = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), return_dict_in_generate=True, output_logits=True, **arguments
            )
            tokens.append(output.sequences[:, prompts.shape[1] :])
            scores.append(torch.stack(output.logits, 1).half())
    return result | {"tokens": torch.cat(tokens), "scores": torch.cat(scores)}


def compare(
    directory: str, text: str = "wikitext2", length: int = 2000, prompts: int = 100, prompt: int = 64, new: int = 32
) -> dict[str, Any]:
    """Errors of the engine's logits, and how many continuations are equal."""
    from bimos.engine import Engine
    from bimos.generation import Sampling

    engine = Engine.from_pretrained(directory)
    characters = load_text(text).text[: 12 * (length + prompts * prompt)]
    ids = torch.tensor(engine.tokenizer(characters, add_special_tokens=False)["input_ids"][: length + prompts * prompt])
    windows = {"text": ids[:length], "prompts": ids[length:].view(prompts, prompt)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(windows, Path(folder, "windows.pt"))
        command = [sys.executable, __file__, directory, "--new", str(new), "--reference", folder]
        subprocess.run(command, check=True, env=os.environ | {"BIMOS_ISA": "reference"})
        expected = torch.load(Path(folder, "expected.pt"), mmap=True)
        result = _logits(engine.logits(windows["text"].tolist()), expected["logits"], windows["text"])
        sampling = Sampling(max_new_tokens=new, temperature=0, repetition_penalty=1)
        steps: list[list[int]] = [[] for _ in range(prompts)]
        for start in range(0, prompts, BATCH):
            for step in engine.tokens(windows["prompts"][start : start + BATCH].tolist(), sampling, stop=False):
                for i, token in enumerate(step):
                    steps[start + i].append(-1 if token is None else token)
        actual, wanted = torch.tensor(steps), expected["tokens"]
        margins = []
        for i in (actual != wanted).any(-1).nonzero().flatten().tolist():
            first = int((actual[i] != wanted[i]).nonzero()[0])
            scores = expected["scores"][i, first].float()
            margins.append(float((scores[wanted[i, first]] - scores[actual[i, first]]) / scores.norm()))
    sizes = {"text": text, "tokens": length, "prompts": prompts, "prompt_tokens": prompt, "new_tokens": new}
    return sizes | result | {"equal": prompts - len(margins), "margins": margins}


def _logits(actual: Tensor, expected: Tensor, ids: Tensor) -> dict[str, float]:
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    own, other = actual[:-1].log_softmax(-1), expected[:-1].log_softmax(-1)
    losses = [-values.gather(-1, ids[1:, None]).mean().item() for values in (own, other)]
    return {
        "relative_error": ((actual - expected).norm() / expected.norm()).item(),
        "relative_error_worst_token": error.max().item(),
        "same_likeliest": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "kl_nats": (other.exp() * (other - own)).sum(-1).mean().item(),
        "loss_engine": losses[0],
        "loss_reference": losses[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packed checkpoint")
    parser.add_argument("--text", default="wikitext2", help="as `bimos eval --ppl` takes it")
    parser.add_argument("--new", type=int, default=32, help="tokens of a continuation")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # the other process: its folder
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.reference:
        expected = reference(arguments.model, torch.load(arguments.reference / "windows.pt"), arguments.new)
        torch.save(expected, arguments.reference / "expected.pt")
        return
    result = {"model": Path(arguments.model).name, **compare(arguments.model, arguments.text, new=arguments.new)}
    print(result)
    if arguments.output:
        write_json(arguments.output, result | provenance())


if __name__ == "__main__":
    main()
