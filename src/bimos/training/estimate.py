"""What a run will take: peak memory of each stage, from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bimos.config import DistillConfig, RunConfig
from bimos.kernels import native
from bimos.lanes import LANES
from bimos.methods import MethodConfig, method_config
from bimos.models import convertible_linears, decoder_blocks
from bimos.training.answers import KEPT_BYTES
from bimos.training.blockwise import LARGE
from bimos.training.losses import CHUNK_BYTES
from bimos.training.measuring import MOST_SAMPLES, SAMPLES
from bimos.training.probing import Kept, kept_by

RUNTIME = 700 * 2**20  # Python, torch, transformers and the text that is mapped, before any model
LATENT = 4 * 4  # float32 latent, gradient and two Adam moments
# Float32 matrices [in, in], and [out, in] beside its latent, that the start of a linear holds: with a factor in float64, with scales refit.
STARTS = ((4, 1), (3, 4))


def peak_memory(model: nn.Module, config: RunConfig, processes: int = 1, device: str = "cpu") -> dict[str, int]:
    """Bytes at the peak of each stage that the config asks for, in each process, on the device where it trains.

    The teacher is held in 16 bits, or 32 where the processor is slow in 16 (`native.fast_dtype`), and so are activations. Stages 1
    and 2 add two streams of hidden states and one block, in training or (whichever is more) with the matrices behind the start of
    its widest linear; stage 3 adds every block in training and the activations of a step. What a method's layers keep for their
    gradients is asked of a small one (`kept_by`); beside it norms, attention and gates keep what enters and what leaves them.

    With low memory, stages 1 and 2 have no teacher in memory and, on a CPU, neither streams nor moments of Adam. Several processes have
    each a part of the streams and of every batch; in stage 3 of all weights, gradients and moments too, but two blocks are whole at a time.

    Args:
        model: may be on the meta device.
        processes: between which the work is divided.
        device: `cpu` or `cuda`.
    """
    on_cpu = device == "cpu"
    lanes = LANES if on_cpu else 1
    linears = convertible_linears(model, config.skip)
    _, blocks = decoder_blocks(model)
    dtype = native.fast_dtype(torch.bfloat16, torch.device(device))
    value = dtype.itemsize  # bytes
    method = method_config(config.method, config.options)
    config = config.settled(method)
    low = config.low_memory
    on_disk = low and on_cpu
    weights = 0 if low else value * sum(p.numel() for p in model.parameters())
    latent = sum(_latents(method.of_linear(name), m) for name, m in linears.items())
    whole: Any = model.config
    hidden = whole.get_text_config().hidden_size
    layers = _kept(method, linears, dtype, on_cpu)
    # What is added to the residual stream is not kept, but what enters its linear is; of the others what leaves them. Two norms a block.
    around = sum(m.in_features if m.out_features == hidden else m.out_features for m in linears.values()) + 4 * hidden * len(blocks)
    kept = round(
        value * around + sum(layers[name].bytes_a_token(m.in_features, m.out_features) for name, m in linears.items())
    )  # bytes a token
    # Signs and their gradient; in float32 that of the first plane is the latent's.
    body_weights = sum(m.weight.numel() for m in linears.values())
    shares = {name: m.weight.numel() / body_weights for name, m in linears.items()}
    others = {name: layer.planes if value == 2 else max(0, layer.planes - 1) for name, layer in layers.items()}
    signs = round(sum(share * (layers[name].of_signs + value * others[name]) for name, share in shares.items()))
    made = round(sum(share * lanes * layers[name].of_weight for name, share in shares.items()))  # weights for the product, a lane
    tokens = config.blocks.tokens if config.blocks.enabled else 0
    if config.initialise.activation_aware:  # beside a batch
        tokens = tokens or config.initialise.sequences * config.sequence_length
    batch = max(1, config.blocks.batch_size // processes) * config.sequence_length
    streams = 0 if on_disk else 2 * value * hidden * max(tokens // processes, batch)
    of_block = latent // len(blocks)
    widest = max(m.weight.numel() for m in linears.values())
    in_turn = on_disk and max(sum(p.numel() for p in block.parameters()) for block in blocks) >= LARGE and config.blocks.batch_size >= LANES
    training = starting = passing = 0
    if low:  # a pass through the block: its pages, one weight in the dtype of the work, and what the widest linears give
        passing = 4 * of_block + 2 * sum(p.numel() for p in blocks[0].parameters()) + value * widest
        passing += 3 * value * batch * max(max(m.in_features, m.out_features) for m in linears.values())
    if config.blocks.enabled:
        training = (LATENT - (8 if on_disk else 0) + signs + made) * of_block + kept // len(blocks) * batch // (LANES if in_turn else 1)
        training += 2 * 4 * widest  # gradients of one linear on their way
    if config.initialise.activation_aware and (method.uses_inputs or config.blocks.enabled):
        seen = min(tokens, config.initialise.sequences * config.sequence_length)
        samples = min(MOST_SAMPLES, seen * SAMPLES // (batch * processes))
        starting = 4 * of_block + max(
            4 * max(squares * m.in_features**2 + copies * m.weight.numel() for squares, copies in STARTS) + 4 * samples * m.in_features
            for m in linears.values()
        )
        # A batch in each lane, up to the widest linear: its input as it is and weighted, and six of the stream's vectors, all in float32.
        widths = [m.in_features for m in linears.values()]
        starting += (1 if in_turn else lanes) * batch * (4 * (2 * max(widths) + 6 * hidden) + 3 * value * max(widths))
        # What enters or leaves four groups of linears in the teacher, and its stream behind the block.
        vectors = value * hidden * (seen // processes)
        starting += 5 * vectors if not low and 4 * vectors <= KEPT_BYTES else 0
    stages = {"blocks": RUNTIME + weights + streams + max(4 * of_block, training, starting, passing)}
    if config.distill.enabled:
        step = max(1, config.distill.batch_size // processes) * config.sequence_length
        is_shared = on_cpu and processes == 1  # signs, by lanes; elsewhere a pass keeps its own, which nobody divides
        alone = sum(share * (layers[name].of_signs_alone + layers[name].of_weight) for name, share in shares.items())
        own = 0 if is_shared else round(alone * latent) // (len(blocks) if config.distill.checkpointing else 1) + 2 * value * widest
        state = _state(config.distill) + (signs + made if is_shared else 0)
        states = 2 * value * hidden * len(blocks) * step if config.distill.hidden_weight or config.distill.relative_weight else 0
        if config.distill.checkpointing:  # what enters each block, and one of them inside
            kept = value * hidden * len(blocks) + kept // len(blocks)
        # A byte a weight of bfloat16 (csrc/group8.h), two of float32 (csrc/int16.h), some more for sums or steps, counted wherever it runs.
        is_tiled = is_shared and config.distill.int8_teacher
        tiles = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) * {2: 17, 4: 33}[value] // 16 if is_tiled else 0
        working = kept * step + states + 6 * lanes * CHUNK_BYTES
        held = weights + tiles + state * latent + own
        if processes > 1:  # the teacher's embeddings and head stay whole; at first, so are all weights
            body = value * sum(p.numel() for block in blocks for p in block.parameters())
            parts = weights - body + (body + state * latent) // processes + 2 * (2 * 4 * latent + body) // len(blocks)
            held = max(parts + own, weights + 4 * latent - working)
        stages["distill"] = RUNTIME + held + working
    return stages


def _state(distill: DistillConfig) -> int:
    """Bytes a latent, with gradient and moments."""
    width = 2 if distill.latents == "bfloat16" else 4
    if distill.train != "all":
        return width
    return 2 * width + (2 if distill.optimizer == "adamw8bit" else 2 * width)


def _kept(method: MethodConfig, linears: dict[str, nn.Linear], dtype: torch.dtype, on_cpu: bool) -> dict[str, Kept]:
    """Of every linear; those with the same options are asked once."""
    known: dict[str, Kept] = {}
    for name in linears:
        own = method.of_linear(name)
        if (key := repr(own)) not in known:
            known[key] = kept_by(own, dtype, on_cpu)
    return {name: known[repr(method.of_linear(name))] for name in linears}


def _latents(method: MethodConfig, linear: nn.Linear) -> int:
    """How many a layer of this size trains."""
    with torch.device("meta"):
        layer = method.layer(linear.in_features, linear.out_features, False, method)
    return sum(latent.numel() for latent in layer.roles()["latent"])
