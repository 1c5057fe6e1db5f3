"""Continuations of a few prompts by teacher and student, side by side: what a perplexity feels like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bimos.evaluation.mode import evaluating

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write the first lines of a story about a lighthouse keeper.",
)


def complete(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64, chat: bool | None = None, **options: Any) -> str:
    """The model's answer to `prompt`, greedy unless `options` say otherwise, without the prompt.

    Args:
        chat: put the prompt through the tokenizer's chat template. None: if it has one.
        options: for `model.generate`; `repetition_penalty` is 1.2 unless given, without which small models, teacher
            and student alike, repeat themselves when greedy.
    """
    if tokenizer.chat_template if chat is None else chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": _padding(model, tokenizer)} | options
    with evaluating(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def compare_samples(teacher: Any, student: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[dict[str, str]]:
    """`[{prompt, teacher, student}]`, both by `complete` with the same options."""
    models = {"teacher": teacher, "student": student}
    return [
        {"prompt": prompt} | {name: complete(model, tokenizer, prompt, **options) for name, model in models.items()} for prompt in prompts
    ]


def _padding(model: Any, tokenizer: Any) -> int | None:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if candidate is not None:
            return candidate[0] if isinstance(candidate, list) else candidate
    return None
