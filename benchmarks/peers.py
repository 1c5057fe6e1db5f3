"""Decoding and prompts of one model in torch, in llama.cpp and in the engine, in one process, in turns, on the same threads and tokens.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install -e '.[bench]'    # llama.cpp is compiled: for the processor that it is to run on
    python benchmarks/peers.py -o benchmarks/results/peers.json
    python benchmarks/peers.py -o benchmarks/results/peers.json --only SmolLM2-135M    # the other model's figures stay in the file

Models are made once (benchmarks/peer_models.py) and kept in build/peers. All decode greedily behind a prompt of 16 tokens, whatever the
token, some steps each in turn, and read prompts of 512 tokens of which the last one's logits are asked for. A figure is from the median
step, or prompt, of all rounds. llama.cpp has the batch size and the attention that were fastest here, tried before anything counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from bimos.cli.group import quiet
from bimos.engine import Engine
from bimos.evaluation.bandwidth import Bandwidth
from bimos.evaluation.runners import EngineRunner, Prompts, Runner, TransformersRunner, stopwatch
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.models import load_model
from peer_models import NAMES, contents, dense, prepare
from peer_plot import plot

TYPES = ("Q4_0", "Q8_0", "TQ2_0", "TQ1_0", "Q1_0", "Q2_K")
PROMPT, TOKENS, LONG, WIDE = 16, 128, 512, 8
TURN = 32  # steps before the next one decodes
ROUNDS = {"SmolLM2-135M": 7, "Llama 1.1B": 3}
TRIES = 2
FEWER = "bimos, fewer bits"
ENGINES: dict[str, dict[str, Any]] = {"bimos": {}, FEWER: {"head_bits": 4, "activation": "int8"}}  # llama.cpp's heads have 4 to 8 bits, too
REST = 0.05  # seconds in which the threads of the one before stop spinning


class LlamaCpp:
    """A .gguf file in llama.cpp, by its C interface. As `Runner`: one sequence."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads

    def context(self, flash: bool, batch: int) -> LlamaContext:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.no_perf = 1024, LONG, batch, True
        options.n_threads = options.n_threads_batch = self.threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return LlamaContext(self, llama_cpp.llama_init_from_model(self.model, options))


@dataclasses.dataclass
class LlamaContext:
    """Keys and values, and a choice of batch and attention."""

    of: LlamaCpp
    context: Any

    def logits(self, ids: list[int]) -> Any:
        """Reads more tokens; the last one's logits `[vocabulary]`, which are overwritten by the next."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points at them
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) == 0, "llama_decode"
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.of.vocabulary,))

    def steps(self, prompts: Prompts, tokens: int) -> Iterator[list[int]]:
        (ids,) = prompts
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        for _ in range(tokens):
            ids = [int(self.logits(ids).argmax())]
            yield ids


def best_settings(model: LlamaCpp, prompt: list[int]) -> dict[str, Any]:
    """Seconds of a long prompt by attention and batch, of a step by attention, and the fastest of each; the best of its tries counts."""
    prompts, steps = {}, {}
    for flash, batch in itertools.product((False, True), (128, LONG)):
        context = model.context(flash, batch)
        prompts[flash, batch] = min(stopwatch(context.steps([prompt], 1))[0] for _ in range(TRIES))
        if batch == LONG:
            steps[flash] = min(statistics.median(stopwatch(context.steps([prompt[:PROMPT]], TURN))[1:]) for _ in range(TRIES))
        llama_cpp.llama_free(context.context)
    tried = [{"flash_attention": flash, "batch": batch, "prompt_seconds": seconds} for (flash, batch), seconds in prompts.items()]
    tried += [{"flash_attention": flash, "step_seconds": seconds} for flash, seconds in steps.items()]
    (flash, batch), decode_flash = min(prompts, key=lambda key: prompts[key]), min(steps, key=lambda key: steps[key])
    return {"prefill": {"flash": flash, "batch": batch}, "decode": {"flash": decode_flash, "batch": LONG}, "tried": tried}


def cosine(left: Any, right: Any) -> float:
    return torch.cosine_similarity(torch.as_tensor(left).double().flatten(), torch.as_tensor(right).double().flatten(), 0).item()


@torch.inference_mode()
def compare(name: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    files, refused, packed = prepare(name, folder, TYPES)
    teacher = dense(name, folder)
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int, length: int) -> Prompts:
        return torch.randint(3, teacher.config.vocab_size, (count, length), generator=generator).tolist()

    engines = {row: Engine(load_model(packed), threads=threads, **options) for row, options in ENGINES.items()}
    short, long = prompts(1, 64)[0], prompts(1, LONG)[0]
    peers = {kind: LlamaCpp(path, threads) for kind, path in files.items()}
    settings = best_settings(peers["Q4_0"], long)
    torch_runner = TransformersRunner(teacher)
    prefill: dict[str, Runner] = {"torch bf16": torch_runner, **{row: EngineRunner(engine) for row, engine in engines.items()}}
    decode = dict(prefill)
    # That all of them compute the same thing: last logits of a text beside torch's, of the same weights.
    expected = teacher(torch.tensor([short])).logits[0, -1]
    of_packed = load_model(packed, torch.float32)(torch.tensor([short])).logits[0, -1]
    agreement = {row: cosine(engine.logits(short)[-1], of_packed) for row, engine in engines.items()}
    for kind, peer in peers.items():
        prefill[f"llama.cpp {kind}"], decode[f"llama.cpp {kind}"] = peer.context(**settings["prefill"]), peer.context(**settings["decode"])
        agreement[f"llama.cpp {kind}"] = cosine(decode[f"llama.cpp {kind}"].logits(short), expected)
    assert agreement["bimos"] > 0.999 and agreement[FEWER] > 0.95 and agreement["llama.cpp Q8_0"] > 0.99, agreement

    bandwidth = Bandwidth()
    read: dict[str, list[float]] = {row: [] for row in prefill}
    several = {f"{row}, {WIDE} sequences": row for row in ENGINES}
    steps: dict[str, list[float]] = {row: [] for row in (*decode, *several)}
    for number in range(-1, rounds):  # the first does not count
        for _ in range(1 if number < 0 else 2):
            for row, runner in prefill.items():
                time.sleep(REST)
                read[row] += stopwatch(runner.steps(prompts(1, LONG), 1))
        wide = prompts(WIDE, PROMPT)
        runs = {row: decode[several.get(row, row)].steps(wide if row in several else wide[:1], TOKENS + 1) for row in steps}
        for run in runs.values():
            next(run)  # reads the prompt
        for _ in range(1 if number < 0 else TOKENS // TURN):
            for row, run in runs.items():
                time.sleep(REST)
                steps[row] += stopwatch(itertools.islice(run, TURN))
            if number >= 0:
                bandwidth.sample()
        for run in runs.values():
            run.close()
        if number < 0:
            for times in (*read.values(), *steps.values()):
                times.clear()
    rows = {}
    for row, times in steps.items():
        width = WIDE if row in several else 1
        rows[row] = {"decode_tokens_per_second": width / statistics.median(times), "steps": len(times), "sequences": width}
        rows[row]["decode_quartiles"] = sorted(width / seconds for seconds in statistics.quantiles(times)[::2])
        if row in read:
            rows[row] |= {"prefill_tokens_per_second": LONG / statistics.median(read[row]), "prompts": len(read[row])}
            rows[row]["prefill_quartiles"] = sorted(LONG / seconds for seconds in statistics.quantiles(read[row])[::2])
        if row in agreement:
            rows[row]["agreement"] = agreement[row]
    for kind, path in files.items():
        rows[f"llama.cpp {kind}"] |= contents(path)
    rows["torch bf16"]["bytes"] = sum(parameter.nbytes for parameter in teacher.parameters())
    for row in ENGINES:
        rows[row] |= {"bytes": (packed / "model.safetensors").stat().st_size, "options": ENGINES[row]}
    return {"rows": rows, "refused": refused, "settings": settings, "bandwidth": bandwidth.result(), "rounds": rounds, **provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--rounds", type=int, help=f"{', '.join(f'{rounds} of {name}' for name, rounds in ROUNDS.items())} if not given")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="for the models; 4 GB")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    built = llama_cpp.llama_print_system_info().decode().strip()
    if native.isa() == "avx512" and "AVX512_VNNI = 1" not in built:
        parser.error(f"llama.cpp was built without what this processor has ({built}): build it here, with -DGGML_NATIVE=ON")
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.exists() else {"models": {}}
    result |= {"threads": arguments.threads, "level": native.isa(), "prompt": PROMPT, "tokens": TOKENS, "long_prompt": LONG}
    result["llama_cpp_python"] = {"version": llama_cpp.__version__, "system_info": built}
    for name in (arguments.only,) if arguments.only else NAMES:
        began = time.perf_counter()
        measured = compare(name, arguments.folder / name, arguments.rounds or ROUNDS[name], arguments.threads)
        result["models"][name] = measured | {"seconds": time.perf_counter() - began}
        write_json(arguments.output, result)
        print(f"{name}, {result['models'][name]['seconds']:.0f} s")
        for row, values in measured["rows"].items():
            prompt = f"{values['prefill_tokens_per_second']:8.1f}" if "prefill_tokens_per_second" in values else ""
            print(f"  {row:>20}: decode {values['decode_tokens_per_second']:8.1f} tokens/s, prompt {prompt}", flush=True)
    plot(result, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
