"""Sizes by `bimos quantize --dry-run`, from configs alone: LLaMA-2-7B and 13B and SmolLM2-135M, as in the papers' tables.

python benchmarks/sizes.py -o benchmarks/results/sizes.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bimos.evaluation.versions import provenance, write_json

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32_000}
CONFIGS = {
    "LLaMA-2-7B": (16, LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11_008}),
    "LLaMA-2-13B": (16, LLAMA | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13_824}),
    "SmolLM2-135M": (
        8,
        LLAMA
        | {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
}
RUN = (
    "import sys; from bimos.cli import main; from bimos.memory import peak_resident_bytes\n"
    "try: main()\n"
    "finally: print('PEAK', peak_resident_bytes(), file=sys.stderr)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    models = {}
    for name, (bits, config) in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            report = Path(folder) / "plan.json"
            began = time.monotonic()
            command = [sys.executable, "-c", RUN, "quantize", folder, "--dry-run", "--embedding-bits", str(bits), "--json", str(report)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.monotonic() - began
            peak = int(done.stderr.rsplit("PEAK", 1)[1])
            plan = json.loads(report.read_text())
        kept = {
            key: plan[key]
            for key in ("total_bytes", "original_bytes", "compression", "body_bits_per_weight", "bits_per_parameter", "peak_memory_bytes")
        }
        models[name] = {"embedding_bits": bits, **kept, "dry_run": {"seconds": seconds, "peak_memory_bytes": peak}}
        size, bits = plan["total_bytes"] / 1e9, plan["body_bits_per_weight"]
        print(f"{name}: {size:.3f} GB, {plan['compression']:.2f}x, body {bits:.3f} bits; {seconds:.1f} s, {peak / 2**20:.0f} MiB")
    if arguments.output:
        write_json(arguments.output, {"models": models, **provenance()})


if __name__ == "__main__":
    main()
