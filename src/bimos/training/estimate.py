"""What a run will take: peak memory of each stage, from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bimos.config import RunConfig
from bimos.kernels import native
from bimos.lanes import LANES
from bimos.methods import MethodConfig, method_config
from bimos.models import convertible_linears, decoder_blocks
from bimos.training.losses import CHUNK_BYTES
from bimos.training.measuring import KEPT_BYTES

RUNTIME = 600 * 2**20  # Python, torch, transformers and the text that is mapped, before any model
LATENT = 4 * 4  # float32 latent, gradient and two Adam moments
MOMENTS, COPIES = 8, 8  # float32 matrices [in, in] and [out, in] that error compensation holds
SIGNS = 1 + 1  # signs, kept for the backward pass, and their gradient, as values


def peak_memory(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Bytes at the peak of each stage that the config asks for.

    The teacher is held in 16 bits, or 32 where the processor is slow in 16 (`native.fast_dtype`), and so are activations. Stages 1
    and 2 add two streams of hidden states and one block, in training or (whichever is more) with the matrices behind the start of
    its widest linear; stage 3 adds every block in training and the activations of a step. Activations are counted per linear: input,
    scaled input, both scales, product, which autograd keeps.

    Args:
        model: may be on the meta device.
    """
    linears = convertible_linears(model, config.skip)
    _, blocks = decoder_blocks(model)
    value = native.fast_dtype(torch.bfloat16).itemsize  # bytes
    weights = value * sum(p.numel() for p in model.parameters())
    if config.low_memory:  # mapped but for the embedding; a block in its file's bits, the teacher's copy, and the student's
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        weights = 2 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in blocks.parameters())) + (2 + 2 * value) * largest
    method = method_config(config.method, config.options)
    config = config.settled(method)
    latent = sum(_latents(method, m) for m in linears.values())
    whole: Any = model.config
    settings = whole.get_text_config()
    hidden = settings.hidden_size
    kept = sum(value * (3 * m.in_features + 3 * m.out_features) for m in linears.values())  # bytes a token
    kept += len(blocks) * value * 12 * hidden  # norms, residuals, attention
    sequences = config.initialise.sequences if config.initialise.activation_aware else 0  # beside a batch
    tokens = config.blocks.tokens if config.blocks.enabled else sequences * config.sequence_length
    streams = 2 * value * hidden * max(tokens, config.blocks.batch_size * config.sequence_length)
    block = 4 * latent // len(blocks)  # its latents
    training = starting = 0
    if config.blocks.enabled:
        training = (LATENT + SIGNS * value - 4) * latent // len(blocks)
        training += kept // len(blocks) * config.blocks.batch_size * config.sequence_length
    if config.initialise.activation_aware:
        starting = max(4 * (MOMENTS * m.in_features**2 + COPIES * m.weight.numel()) for m in linears.values())
        # What enters or leaves four groups of linears in the teacher, and its stream behind the block.
        vectors = value * hidden * min(tokens, config.initialise.sequences * config.sequence_length)
        starting += 5 * vectors if 4 * vectors <= KEPT_BYTES else 0
    stages = {"blocks": RUNTIME + weights + streams + block + max(training, starting)}
    if config.distill.enabled:
        step = config.distill.batch_size * config.sequence_length
        state = (LATENT if config.distill.train == "all" else 4) + SIGNS * value
        states = 2 * value * hidden * len(blocks) * step if config.distill.hidden_weight or config.distill.relative_weight else 0
        # A byte a weight, and a sixteenth for sums (csrc/group8.h), counted wherever it runs.
        is_tiled = config.distill.int8_teacher and value == 2
        tiles = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) * 17 // 16 if is_tiled else 0
        stages["distill"] = RUNTIME + weights + tiles + state * latent + kept * step + states + 6 * LANES * CHUNK_BYTES
    return stages


def _latents(method: MethodConfig, linear: nn.Linear) -> int:
    """How many a layer of this size trains."""
    with torch.device("meta"):
        layer = method.layer(linear.in_features, linear.out_features, False, method)
    return sum(latent.numel() for latent in layer.roles()["latent"])
