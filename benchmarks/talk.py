"""Whether a packed model still talks: its answers to fifty instructions beside the original's.

    pip install py3langid
    python benchmarks/talk.py DIR --teacher MODEL -o benchmarks/results/talk.json --samples docs/samples.md

An answer passes if it is in English, as the instructions are, ends of its own accord, and has no four words in a row more than three
times. Both models answer as `bimos chat` would, the packed one in the engine and the original in transformers. With `--text FILE ...`, text
that the model was trained on, instructions that occur in it word for word are refused.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import py3langid
import torch
import transformers

from bimos.engine import Engine
from bimos.evaluation.texts import read_documents
from bimos.evaluation.versions import provenance, write_json, write_text
from bimos.generation import Sampling
from bimos.models import load_model, load_tokenizer

INSTRUCTIONS = Path(__file__).with_name("instructions.txt")
RUN, REPEATS = 4, 3  # words in a row, and how often they may occur
SHOWN = 10


def faults(answer: str, has_ended: bool) -> list[str]:
    """What is wrong with an answer, in words; nothing if it passes."""
    found = [] if has_ended else ["does not end"]
    words = answer.lower().split()
    runs = Counter(tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1))
    if runs and max(runs.values()) > REPEATS:
        found.append(f"'{' '.join(runs.most_common(1)[0][0])}' {max(runs.values())} times")
    if not words:
        found.append("says nothing")
    elif len(words) > RUN and py3langid.classify(answer)[0] != "en":  # fewer words do not tell
        found.append("not English")
    return found


def student_answers(directory: Path, prompts: Sequence[list[int]], sampling: Sampling, tokenizer: Any) -> list[tuple[str, bool]]:
    """What the engine says to each of `prompts`, and whether it came to an end."""
    engine = Engine.from_pretrained(directory)
    answers = []
    for prompt in prompts:
        ids = [token for (token,) in engine.tokens([prompt], sampling)]
        answers.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) < sampling.max_new_tokens))
    return answers


def teacher_answers(model: Any, prompts: Sequence[list[int]], sampling: Sampling, tokenizer: Any) -> list[tuple[str, bool]]:
    """The same of the original, all prompts in one batch; it samples from a generator of its own."""
    transformers.set_seed(sampling.seed or 0)
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    longest = max(map(len, prompts))
    # A prompt's own first token on its left: what stands there is penalised as a repetition, though nothing attends to it.
    ids = torch.tensor([prompt[:1] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=seen, **sampling.arguments())[:, longest:]
    answers = []
    for said in output.tolist():
        end = next((i for i, token in enumerate(said) if token in stops), sampling.max_new_tokens)
        answers.append((tokenizer.decode(said[:end], skip_special_tokens=True).strip(), end < sampling.max_new_tokens))
    return answers


def text_of(path: Path) -> str:
    """All of a file of training text, chats too: instructions have nothing that JSON would write in another way."""
    if path.suffix == ".parquet":
        return "\n".join(read_documents(path))
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")


def samples(result: dict[str, Any]) -> str:
    """docs/samples.md: every fifth instruction with both answers, unedited."""
    rows = result["answers"][:: len(result["answers"]) // SHOWN][:SHOWN]
    count = len(result["answers"])
    parts = [
        "# Samples",
        f"{result['teacher']} and its packed form, by `benchmarks/talk.py`: every {count // SHOWN}th of {count} instructions, unedited. "
        f"{result['passed']['student']} of all answers of the packed model and {result['passed']['teacher']} of the original are in "
        f"English, end of their own accord, and repeat no {RUN} words in a row more than {REPEATS} times.",
    ]
    for row in rows:
        parts.append(f"## {row['instruction']}")
        for name in ("student", "teacher"):
            label = {"student": "Packed", "teacher": "Original"}[name]
            fault = f" ({', '.join(row[name]['faults'])})" if row[name]["faults"] else ""
            quoted = "\n".join(f"> {line}".rstrip() for line in row[name]["answer"].splitlines()) or "> "
            parts.append(f"**{label}**{fault}\n\n{quoted}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--temperature", type=float, default=Sampling.temperature)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--samples", type=Path)
    arguments = parser.parse_args()
    instructions = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    for path in arguments.text:
        seen = text_of(path)
        if known := [text for text in instructions if text in seen]:
            sys.exit(f"in the training text '{path}': {known}")
    tokenizer = load_tokenizer(arguments.model)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=0)
    prompts = []
    for text in instructions:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(shown, add_special_tokens=False)["input_ids"])
    said = {
        "student": student_answers(arguments.model, prompts, sampling, tokenizer),
        "teacher": teacher_answers(load_model(arguments.teacher, torch.bfloat16), prompts, sampling, tokenizer),
    }
    rows = []
    for i, text in enumerate(instructions):
        row: dict[str, Any] = {"instruction": text}
        for name, answers in said.items():
            answer, has_ended = answers[i]
            row[name] = {"answer": answer, "faults": faults(answer, has_ended)}
        rows.append(row)
    passed = {name: sum(not row[name]["faults"] for row in rows) for name in said}
    print(f"of {len(rows)} answers pass: {passed}")
    conditions = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed}
    result = {"teacher": Path(arguments.teacher).name, "passed": passed, "sampling": conditions, "answers": rows, **provenance()}
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.samples:
        write_text(arguments.samples, samples(result))


if __name__ == "__main__":
    main()
