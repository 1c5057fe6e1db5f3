"""Packed linears against torch's own bfloat16 product of the same shape, router, scales and tables included.

    python benchmarks/products.py -o benchmarks/results/kernels.json
    BIMOS_ISA=avx2 python benchmarks/products.py

A BinaryMoS layer with 4 experts, bfloat16 activations. The two take turns, and each figure is a median, so that what else the
machine does meets both. What is timed is the second of two calls. "hot": of the same weights; "cold": of others, of copies that together
exceed the last cache, so that weights come from memory and only the code is near, as it is in a model that goes through its layers. There
the bytes of the planes a second are set against the machine's read bandwidth, measured in between in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bimos.evaluation.versions import provenance, write_json
from bimos.kernels import native
from bimos.packing.linear import PackedLinear

SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 5632), (4096, 4096), (4096, 11008)]
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
COLD_BYTES = 512 * 2**20
EXPERTS = 4


def layer(n_in: int, n_out: int) -> PackedLinear:
    tensors = {
        "weight": torch.randint(0, 256, (1, n_out, n_in // 8), dtype=torch.uint8),
        "scale_in": (torch.rand(1, EXPERTS, n_in) + 0.5).half(),
        "scale_out": (torch.rand(1, EXPERTS, n_out) + 0.5).half(),
        "router": (torch.randn(EXPERTS, n_in) * n_in**-0.5).half(),
    }
    return PackedLinear.from_tensors(tensors)


def in_turns(functions: dict[str, Callable[[], Any]], seconds: float = 0.6) -> dict[str, float]:
    """Median microseconds of the second of two calls of every function, one after the other for `seconds`, 15 times at least."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 15:
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def hot(n_in: int, n_out: int, tokens: int) -> dict[str, float]:
    packed, dense = layer(n_in, n_out), torch.randn(n_out, n_in, dtype=torch.bfloat16)
    x = torch.randn(tokens, n_in, dtype=torch.bfloat16)
    rounded = layer(n_in, n_out)
    rounded.int8 = True
    times = in_turns({"packed_us": lambda: packed(x), "int8_us": lambda: rounded(x), "bfloat16_us": lambda: F.linear(x, dense)})
    return times | {name: times["bfloat16_us"] / times[f"{kind}_us"] for name, kind in (("speedup", "packed"), ("int8_speedup", "int8"))}


@torch.inference_mode()
def cold(n_in: int, n_out: int) -> dict[str, float]:
    size = n_in * n_out // 8
    layers = [layer(n_in, n_out) for _ in range(COLD_BYTES // size // 2)]  # the stored planes lie beside their tiles
    dense = [torch.randn(n_out, n_in).bfloat16() for _ in range(max(2, COLD_BYTES // (2 * n_in * n_out)))]
    wide = torch.zeros(COLD_BYTES // 4)
    x = torch.randn(1, n_in, dtype=torch.bfloat16)
    for packed in layers:
        packed(x)
    turn, weights = itertools.cycle(layers), itertools.cycle(dense)
    times = in_turns({"packed_us": lambda: next(turn)(x), "bfloat16_us": lambda: F.linear(x, next(weights)), "read_us": wide.sum}, 8)
    bandwidth = COLD_BYTES / times.pop("read_us") / 1e3
    return times | {
        "speedup": times["bfloat16_us"] / times["packed_us"],
        "planes_gb_per_second": size / times["packed_us"] / 1e3,
        "read_gb_per_second": bandwidth,
        "share_of_bandwidth": size / times["packed_us"] / 1e3 / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"level": native.isa() or "reference", "threads": arguments.threads, "experts": EXPERTS, "hot": {}, "cold": {}}
    for n_in, n_out in SHAPES:
        name = f"{n_in}x{n_out}"
        result["hot"][name] = {}
        for tokens in TOKENS:
            row = result["hot"][name][tokens] = hot(n_in, n_out, tokens)
            print(
                f"{name:>11} {tokens:>4} tokens: bf16 {row['bfloat16_us']:9.1f} us, exact {row['packed_us']:9.1f}: {row['speedup']:.1f}x, "
                f"int8 {row['int8_us']:9.1f}: {row['int8_speedup']:.1f}x",
                flush=True,
            )
    for n_in, n_out in SHAPES[-2:]:
        row = result["cold"][f"{n_in}x{n_out}"] = cold(n_in, n_out)
        print(
            f"{n_in}x{n_out} cold: {row['packed_us']:.1f} us, {row['speedup']:.1f}x bfloat16, "
            f"{row['planes_gb_per_second']:.1f} of {row['read_gb_per_second']:.1f} GB/s ({row['share_of_bandwidth']:.0%})"
        )
    if arguments.output:
        write_json(arguments.output, result | provenance())


if __name__ == "__main__":
    main()
