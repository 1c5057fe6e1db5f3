"""Stages 1 and 2: start every block's layers from its inputs, then reconstruct the block.

For each decoder block in order: its inputs come from the student as binarized so far, its targets from the teacher. Latents
and scales are trained on the relative error of the block's output (compare BRECQ, 2102.05426, for reconstruction by
block; the student's own inputs let a block mend what the blocks before it broke). Memory: the teacher (with `low_memory` one block of
it, `mapped`), one block in training, and two streams of hidden states. A finished block goes to disk as `block-000.safetensors`; a
run that was killed begins again at the first one missing, after sending both streams through the blocks that are done.

With several processes each has its part of every batch: of the streams, of the sums that a start is made from, and of every step, whose
gradients are averaged.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bimos.config import RunConfig, decided
from bimos.kernels import native
from bimos.lanes import LANES, Lanes
from bimos.memory import given_back, peak_bytes, reset_peak, trim
from bimos.methods.base import MethodConfig
from bimos.models import convertible_linears, decoder_blocks
from bimos.processes import ALONE, Processes
from bimos.training.blockfiles import block_file, finished, is_own, recorded
from bimos.training.fused import fused
from bimos.training.initialise import initialise_block
from bimos.training.mapped import entering_in, release, rest, working_copy
from bimos.training.ondisk import give_back, on_disk
from bimos.training.pacing import LATE, PASSES, STARTING, TRAINED, Pace, seconds_a_token, sequences_ahead
from bimos.training.progress import Progress
from bimos.training.reconstruction import WARM_STEPS, reconstruct
from bimos.training.streams import advance, batches, capture, embed
from bimos.training.student import load_trained, replace_empty, save_tensors

LARGE = 16 << 20  # weights of a block that, with low memory, sees the halves of a batch one after the other


def reconstruct_blocks(
    teacher: nn.Module,
    windows: Tensor,
    method: MethodConfig,
    config: RunConfig,
    directory: Path,
    progress: Progress,
    seconds: float | None,
    processes: Processes = ALONE,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Initialise and reconstruct every block; leaves their files in `directory`.

    Args:
        windows: calibration tokens `[n, T]`, n a multiple of `config.blocks.batch_size`.
        seconds: time for all blocks together, or None for the epochs that the config asks for. Where they are too few for a start on as
            many sequences as the config asks for and so many epochs on them, the blocks after the first see fewer, all of them about the
            same number: as many as fit with their epochs, or `TRAINED` tokens with what training there is time for, or, where not even
            a start fits on those, as many as that can see, without training.
        processes: between which the work is divided.
        device: where blocks are trained; None: where the teacher is. With `low_memory` that is another.

    Returns:
        The stage's report: tokens, seconds, tokens per second and block, peak memory, first and last error of every block.
    """
    size = processes.divided(min(config.blocks.batch_size, len(windows)), "blocks.batch_size")
    windows = processes.share(windows, size * processes.count)
    entry: Any = teacher.get_input_embeddings()  # type: ignore[operator]
    windows, device = windows.to(entry.weight.device), device or entry.weight.device
    _, blocks = decoder_blocks(teacher)
    in_turn = config.low_memory and sum(p.numel() for p in blocks[0].parameters()) >= LARGE
    lanes = Lanes(size if size % LANES == 0 else 1, device, in_turn)  # both lanes call blocks with the same number of rows
    dtype = native.fast_dtype(torch.bfloat16, device) if config.low_memory else None
    with fused(teacher, dtype=dtype), lanes, given_back() if config.low_memory else nullcontext():
        return _each_block(teacher, windows, method, config, directory, progress, seconds, size, lanes, processes, device)


def _each_block(
    teacher: nn.Module,
    windows: Tensor,
    method: MethodConfig,
    config: RunConfig,
    directory: Path,
    progress: Progress,
    seconds: float | None,
    size: int,
    lanes: Lanes,
    processes: Processes,
    device: torch.device,
) -> dict[str, Any]:
    """`windows` and `size` are this process's."""
    prefix, blocks = decoder_blocks(teacher)
    if config.low_memory and not release(blocks):  # read when the model was loaded
        progress.note("this model's weights are not mapped from .safetensors files here: all of them stay in memory")
    directory.mkdir(parents=True, exist_ok=True)
    reset_peak()
    known = [entry for index in range(len(blocks)) if (entry := recorded(block_file(directory, index))) is not None]
    if len(known) == len(blocks):  # by an earlier process: nobody needs what goes from block to block any more
        return _report([{"block": index, **entry} for index, entry in enumerate(known)])
    dtype = native.fast_dtype(torch.bfloat16, device)
    names = [name.removeprefix(prefix + ".").split(".", 1) for name in convertible_linears(teacher, config.skip)]
    with entering_in(teacher, dtype, device) if config.low_memory else nullcontext():
        first = working_copy(blocks[0], dtype, device) if config.low_memory else None
        _, calls = capture(teacher, windows[:size], first)
        lane_calls = calls if lanes.count == 1 else capture(teacher, windows[: size // lanes.count], first)[1]
        del first
        stream, student_stream = _entering(teacher, windows, size, directory if config.low_memory and device.type == "cpu" else None)
    if config.low_memory:
        release(teacher)  # the embedding has been read for the last time
    history: list[dict[str, Any]] = []
    worked, before = 0.0, None
    if config.low_memory:
        progress.note(_plan(blocks[0], len(blocks), method, config, stream, dtype))
    progress.begin("block reconstruction", len(blocks))
    for index, (stored, call, lane_call) in enumerate(zip(blocks, calls, lane_calls, strict=True)):
        local = [name for number, name in names if int(number) == index]
        own = method.of_block(f"{prefix}.{index}")
        copies = (working_copy(stored, dtype, device) for _ in range(2))
        block, trainable = copies if config.low_memory else (stored, copy.deepcopy(stored))
        path = block_file(directory, index)
        found = finished(path)
        if found is not None:
            tensors, entry = found
            replace_empty(trainable, local, own)
            load_trained(trainable, tensors)
            advance(block, call, stream, size, stream, lanes)
            advance(trainable, call, student_stream, size, student_stream, lanes)
        else:
            trim()  # what training the block before has left
            start = time.monotonic()
            left = None if seconds is None else max(0.0, (seconds - worked) / (len(blocks) - index))
            if len(stream) < len(windows) and processes.count * stream.shape[:-1].numel() < TRAINED:
                left = 0.0
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
            solving, behind = initialise_block(
                block, trainable, local, call, (stream, student_stream), size, own, config.initialise, generator, lanes, processes
            )
            stream = advance(block, call, stream, size, stream, lanes) if behind is None else behind
            del behind
            if config.low_memory:
                rest(block)
            training = time.monotonic()
            entry = reconstruct(
                trainable, index, lanes, lane_call, student_stream, stream, config, generator, left, start, progress, processes, directory
            )
            going_on = time.monotonic()
            training = going_on - training
            advance(trainable, call, student_stream, size, student_stream, lanes)
            done = time.monotonic()
            entry["seconds"] = processes.agreed(done - start)
            entry["next_sequences"] = float(processes.count * len(stream))
            if seconds is not None and index + 1 < len(blocks):
                count, together = processes.count * len(stream), processes.count * size
                window = (done - going_on) / count
                measuring = (going_on - start - training - solving) / min(count, config.initialise.sequences)
                pace = Pace(solving, measuring + window, PASSES * window)
                if entry["tokens"] >= WARM_STEPS * together * windows.shape[1]:
                    pace = pace._replace(training=training * windows.shape[1] / entry["tokens"])
                ahead = sequences_ahead(index, len(blocks), count, together, seconds, worked + entry["seconds"], pace, config, before)
                before = pace
                entry["next_sequences"] = processes.agreed(float(ahead))
                needed = worked + entry["seconds"] + pace.seconds(int(entry["next_sequences"])) * (len(blocks) - 1 - index)
                if index == 1 and needed > LATE * seconds:  # the first one also warms up
                    taken = f"{len(blocks)} blocks take about {needed / 60:.1f} minutes on this machine"
                    progress.note(f"{taken}, the budget has {seconds / 60:.1f} for them: give it more --minutes")
            state = {name: tensor for name, tensor in trainable.state_dict().items() if is_own(trainable, name)}
            if processes.is_first:
                save_tensors(state, path, {key: repr(value) for key, value in entry.items()})
            del state
            processes.wait()
        del block, trainable  # before there is another
        if config.low_memory:
            release(stored)
        kept = int(entry["next_sequences"]) // processes.count
        stream, student_stream = stream[:kept], student_stream[:kept]
        worked += entry["seconds"]
        history.append({"block": index, **entry})
        progress.advance(1, loss=entry["loss_last"])
    return _report(history)


def _report(history: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, seconds = (sum(entry[key] for entry in history) for key in ("tokens", "seconds"))
    return {
        "name": "blocks",
        "tokens": int(tokens / len(history)),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),  # of one block
        "peak_memory_bytes": peak_bytes(),
        "loss_first": sum(entry["loss_first"] for entry in history) / len(history),
        "loss_last": sum(entry["loss_last"] for entry in history) / len(history),
        "blocks": history,
    }


def _entering(teacher: nn.Module, windows: Tensor, size: int, directory: Path | None) -> tuple[Tensor, Tensor]:
    """What enters the first block, `[n, T, d]`, once for the teacher and once for the student; on disk where a directory is given."""
    streams: list[Tensor] = []
    for rows in batches(len(windows), size):
        hidden = embed(teacher, windows[rows])
        if not streams:
            shape = (len(windows), *hidden.shape[1:])
            streams = [hidden.new_empty(shape) if directory is None else on_disk(shape, hidden.dtype, directory) for _ in range(2)]
        for stream in streams:
            stream[rows] = hidden
            give_back(stream[rows])
    return streams[0], streams[1]


def _plan(block: nn.Module, count: int, method: MethodConfig, config: RunConfig, stream: Tensor, dtype: torch.dtype) -> str:
    """What is ahead: bytes from shapes, and time from a product as it is multiplied here."""
    weights = sum(p.numel() * p.element_size() for p in block.parameters())
    passes = STARTING + (PASSES * config.blocks.epochs if decided(config.blocks.enabled, method.trained) else 0)
    minutes = passes * stream.shape[:-1].numel() * seconds_a_token(block, dtype) / 60
    streams = 2 * stream.numel() * stream.element_size()
    told = f"{count} blocks, one in memory at a time: {weights / 1e6:,.0f} MB each in their file, hidden states {streams / 1e6:,.0f} MB"
    told += f", about {minutes:.1f} minutes a block"
    return told if config.minutes is None else f"{told} if all of the text is seen, and {config.minutes:g} minutes in all"
