"""What `bimos quantize --low-memory` takes for a random model of 1.1 billion weights: memory of stage 2, and time of a block.

    python benchmarks/low_memory.py --data wiki.jsonl -o benchmarks/results/low_memory.json

The model (22 blocks, hidden 2048, ffn 5632, 32 heads, 4 of keys; 2.2 GB in bfloat16) and a tokenizer trained on the text are made once, in
build/low-memory. Peak memory is that of the process, files that are mapped included, since stage 2 began; beside it lie the hidden states.
With `--blocks` the model has fewer blocks, and a folder of its own: what a block takes is the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bimos.config import RunConfig
from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.methods import method_config
from bimos.quantize import plan

SHAPE: dict[str, Any] = {
    **{"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1},
}
SHARD = "500MB"


def make(folder: Path, data: str, blocks: int) -> None:
    if (folder / "tokenizer.json").exists():
        return
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": blocks}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([data], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def measured(model: Path, folder: Path, data: str, method: str, blocks: int, tokens: int) -> dict[str, Any]:
    """One run of `bimos quantize`."""
    packed, report = folder / "packed", folder / "result.json"
    began = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, "-m", "bimos", "quantize", str(model), "-o", str(packed), "--low-memory", "--overwrite"),
            *("--method", method, "--data", data, "--json", str(report)),
            *("--set", f"blocks.tokens={tokens}", "--set", f"initialise.sequences={tokens // 512}"),
            *(("--minutes", "100000") if method_config(method).trained else ()),  # all blocks see all of the text
        ],
        check=True,
    )
    seconds = time.monotonic() - began
    result = json.loads(report.read_text())
    (stage,) = result["stages"]
    config = RunConfig.from_dict(result["config"])
    return {
        "method": method,
        "blocks": blocks,
        "calibration_tokens": tokens,
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "packed_bytes": result["total_bytes"],
        "peak_memory_bytes": stage["peak_memory_bytes"],
        "planned_memory_bytes": plan(str(model), config)["peak_memory_bytes"]["blocks"],
        "hidden_states_bytes": 2 * tokens * SHAPE["hidden_size"] * native.fast_dtype(torch.bfloat16).itemsize,
        "seconds_a_block": stage["seconds"] / len(stage["blocks"]),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a txt or jsonl file")
    parser.add_argument("--method", nargs="+", default=["binarymos"])
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--blocks", type=int, nargs="+", default=[SHAPE["num_hidden_layers"]])
    parser.add_argument("--folder", type=Path, default=Path("build/low-memory"))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    runs = []
    for blocks in arguments.blocks:
        name = "llama-1.1b" if blocks == SHAPE["num_hidden_layers"] else f"llama-{blocks}-blocks"
        model = arguments.folder / name
        model.mkdir(parents=True, exist_ok=True)
        make(model, arguments.data, blocks)
        for method in arguments.method:
            runs.append(measured(model, arguments.folder, arguments.data, method, blocks, arguments.tokens))
            print(json.dumps(runs[-1], indent=1))
    if arguments.output:
        write_json(arguments.output, {"runs": runs, **provenance()})


if __name__ == "__main__":
    main()
