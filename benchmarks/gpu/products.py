"""Packed linears on a GPU against cuBLAS in bfloat16, and a whole decoding step of a small packed Llama against its original.

    python benchmarks/gpu/products.py -o benchmarks/results/gpu.json      # minutes, most of them compilation and tuning

A BinaryMoS layer with 4 experts, bfloat16 activations, router and scales included. Every figure is GPU time: calls are captured in a CUDA
graph that goes through copies of the weights larger together than the last cache, and a graph is replayed until `SECONDS` are over; the
median replay counts. So neither Python nor the driver is in it. For a decoding token that is set against the bandwidth that a copy of 1 GiB
reaches (read and written), in bytes of the planes, and against a kernel with the same grid that does nothing. Weights, tokens and the model
are random: none of it says anything about quality.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bimos.evaluation.versions import provenance, write_json
from bimos.packing.linear import PackedLinear
from bimos.packing.together import join_siblings

DECODE = [(4096, 11008), (8192, 28672)]
PREFILL = (2048, 4096, 11008)  # tokens, in, out
EXPERTS = 4
COLD_BYTES = 512 * 2**20  # several times the last cache of any GPU
COPY_BYTES = 2**30
SECONDS = 1.0
LLAMAS: dict[str, dict[str, Any]] = {  # shapes of SmolLM2-135M and of a model of 1.1 billion parameters
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}  # fmt: skip
CACHE = 2048  # positions of the static cache: more than there are steps


def layer(n_in: int, n_out: int) -> PackedLinear:
    """A packed linear on the GPU with random bits, whose outputs are about as large as its inputs."""
    tensors = {
        "weight": torch.randint(0, 256, (1, n_out, n_in // 8), dtype=torch.uint8, device="cuda"),
        "scale_in": ((torch.rand(1, EXPERTS, n_in, device="cuda") + 0.5) * n_in**-0.5).half(),
        "scale_out": (torch.rand(1, EXPERTS, n_out, device="cuda") + 0.5).half(),
        "router": (torch.randn(EXPERTS, n_in, device="cuda") * n_in**-0.5).half(),
    }
    return PackedLinear.from_tensors(tensors)


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, one after the other, each of which has run before: kernels are compiled and chosen by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 0) -> float:
    """GPU time of one of the calls: the median over replays of their graph, `replays` of them or SECONDS."""
    graph = capture(calls)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < (replays or 10) or (not replays and time.perf_counter() < end):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return statistics.median(times) / len(calls)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / microseconds([lambda: target.copy_(source)]) * 1e6


def empty_kernel(grid: tuple[int, int, int], warps: int) -> Callable[[], Any]:
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    return functools.partial(nothing[grid], num_warps=warps)


def product(n_in: int, n_out: int, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Packed against dense, the same shape; outputs of packed ones are held to the reference's first."""
    from bimos.kernels import reference, triton, triton_tuning

    copies = max(2, min(64, COLD_BYTES // (n_in * n_out // 8))) if tokens == 1 else 2
    layers = [layer(n_in, n_out) for _ in range(copies)]
    x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16)
    first = layers[0]
    expected = reference.packed_linear(x.float(), first.weight, first.scale_in, first.scale_out, first.router)
    error = ((first(x).float() - expected).norm() / expected.norm()).item()
    packed = microseconds([functools.partial(each, x) for each in layers])
    stored = triton.Stored(first.weight, first.scale_in, first.scale_out, first.router, None, None)
    run = functools.partial(triton.launch, x, [stored], 0)
    config = triton_tuning.choose(run, x, (1, n_out, n_in, EXPERTS, 0))
    assert config is not None, "no configuration runs on this GPU"
    grid = triton.divide(config, tokens, n_out, n_in // 8, x.device)[1]
    empty = microseconds([empty_kernel(grid, config.warps)] * len(layers))
    del layers
    weights = [torch.randn(n_out, n_in, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, COLD_BYTES // (2 * n_in * n_out)))]
    dense = microseconds([functools.partial(F.linear, x, weight) for weight in weights])
    size = n_in * n_out // 8
    return {
        "packed_us": packed,
        "bfloat16_us": dense,
        "speedup": dense / packed,
        "empty_kernel_us": empty,
        "planes_bytes": size,
        "planes_gb_per_second": size / packed / 1e3,
        "share_of_copy_bandwidth": size / packed * 1e6 / bandwidth,
        "tflops": 2e-6 * tokens * n_in * n_out / packed,
        "relative_error": error,
        "config": config._asdict(),
        "grid": list(grid),
    }


def llama(shape: dict[str, Any], device: str = "cuda") -> nn.Module:
    """A random Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=CACHE, **shape))
    return model.to(torch.bfloat16).eval()


def pack(model: nn.Module, make: Callable[[int, int], nn.Module]) -> None:
    """Puts `make(in, out)` in the place of every linear of the body."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child.in_features, child.out_features))


def decoding_step(model: nn.Module, positions: int = CACHE) -> Callable[[], torch.Tensor]:
    """A call that decodes one token greedily through a static cache, all of its state on the device, and returns its logits."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=positions)
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    every = torch.arange(positions, device=device)

    def step() -> torch.Tensor:
        seen = (every <= position)[None, None]  # [1, 1, 1, positions]
        logits = model(token, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        position.add_(1)
        return logits

    return step


def decode_llama(shape: dict[str, Any]) -> dict[str, Any]:
    """A greedy step of the original and of a packed one, in turns."""
    steps, models = CACHE // 8, {"bfloat16": llama(shape), "packed": llama(shape)}
    pack(models["packed"], layer)
    join_siblings(models["packed"])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(3):
        for name, model in models.items():
            times[name].append(microseconds([decoding_step(model)], steps))
    dense, packed = (statistics.median(found) for found in times.values())
    rates = {"bfloat16_tokens_per_second": 1e6 / dense, "packed_tokens_per_second": 1e6 / packed}
    return {"bfloat16_us": dense, "packed_us": packed, **rates, "speedup": dense / packed, "model": shape, "cache": CACHE}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no GPU here; this benchmark measures nothing else", file=sys.stderr)
        sys.exit(2)
    from bimos.kernels import gpu

    if problem := gpu.problem(torch.device("cuda", torch.cuda.current_device())):
        print(f"error: the Triton kernels do not run here: {problem}", file=sys.stderr)
        sys.exit(2)
    import triton

    start = time.perf_counter()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {"experts": EXPERTS, "copy_gb_per_second": bandwidth / 1e9, "decode": {}, "prefill": {}, "llama": {}}
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {bandwidth / 1e9:.0f} GB/s", flush=True)

    def keep() -> None:  # after every row: device time may end
        now = provenance()
        now["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        if arguments.output:
            write_json(arguments.output, result | now | {"seconds": time.perf_counter() - start})

    def measure(place: dict[str, Any], name: str, function: Callable[[], dict[str, Any]], told: str) -> None:
        try:
            place[name] = function()
            print(f"{name}: {told.format(**place[name])}", flush=True)
        except Exception as error:  # no reason to lose the others
            place[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {place[name]['error']}", flush=True)
        keep()

    told = (
        "{packed_us:.1f} us, {speedup:.1f}x bfloat16, {share_of_copy_bandwidth:.0%} of a copy's bandwidth; empty: {empty_kernel_us:.1f} us"
    )
    for n_in, n_out in DECODE:
        measure(result["decode"], f"{n_in}x{n_out}", functools.partial(product, n_in, n_out, 1, bandwidth), told)
    tokens, n_in, n_out = PREFILL
    told = f"{tokens} tokens in {{packed_us:.0f}} us, {{tflops:.0f}} TFLOP/s, {{speedup:.2f}}x bfloat16"
    prompt = functools.partial(product, n_in, n_out, tokens, bandwidth)
    measure(result["prefill"], f"{n_in}x{n_out}", lambda: prompt() | {"tokens": tokens}, told)
    for name, shape in LLAMAS.items():
        told = "a decoding step in {packed_us:.0f} us, {packed_tokens_per_second:.0f} tokens/s, {speedup:.2f}x bfloat16"
        measure(result["llama"], name, functools.partial(decode_llama, shape), told)


if __name__ == "__main__":
    main()
