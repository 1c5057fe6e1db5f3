"""The start of a block: in the order of execution, from the student's inputs, towards the teacher's outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig, PreTrainedModel

from bimos.config import InitialiseConfig
from bimos.lanes import Lanes
from bimos.methods import InputStatistics, method_config
from bimos.models import convertible_linears, decoder_blocks
from bimos.training import initialise, measuring
from bimos.training.answers import KEPT_BYTES, Answers
from bimos.training.initialise import Group, execution_groups, initialise_block
from bimos.training.measuring import Measurement
from bimos.training.streams import advance, capture, embed
from bimos.training.student import trainable_layers

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, attention_bias=True)
OPT = OPTConfig(**SIZES, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=64)
NEOX = GPTNeoXConfig(**SIZES, intermediate_size=48)


def setting(config: Any, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, nn.Module, list[str], Any, Tensor]:
    """A model, its second block, that block's linears, how it is called, and what enters it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            parameter.data = 0.5 * torch.randn_like(parameter)
    model = model.to(dtype)
    windows = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    _, calls = capture(model, windows[:4])
    prefix, blocks = decoder_blocks(model)
    stream = torch.cat([embed(model, part) for part in windows.split(4)])
    stream = advance(blocks[0], calls[0], stream, 4)
    names = [name.removeprefix(f"{prefix}.1.") for name in convertible_linears(model, []) if name.startswith(f"{prefix}.1.")]
    return model, blocks[1], names, calls[1], stream


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups(dtype: torch.dtype) -> None:
    _, block, names, call, stream = setting(LLAMA, dtype)
    assert execution_groups(block, names[::-1], call, stream[:4]) == [
        Group(ATTENTION, False),
        Group(("self_attn.o_proj",), True),
        Group(("mlp.gate_proj", "mlp.up_proj"), False),
        Group(("mlp.down_proj",), True),
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_groups_of_other_architectures() -> None:
    _, block, names, call, stream = setting(OPT)
    groups = execution_groups(block, names, call, stream[:4])
    assert [group.residual for group in groups] == [False, True, False, True]
    assert set(groups[0].names) == set(ATTENTION) and groups[3].names == ("fc2",)
    _, block, names, call, stream = setting(NEOX)  # attention and MLP side by side, both added to the block's input
    groups = execution_groups(block, names, call, stream[:4])
    assert {group.names[0] for group in groups if group.residual} == {"attention.dense", "mlp.dense_4h_to_h"}


def test_a_linear_behind_a_norm_is_not_added() -> None:
    """As in Gemma 2, where what a linear gives is normed before it enters the stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.direct, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.norm(self.inner(x))
            return x + self.direct(x)

    groups = execution_groups(Block(), ["inner", "direct"], lambda block, hidden: block(hidden), torch.randn(2, 5, 16))  # type: ignore[arg-type]
    assert groups == [Group(("inner",), False), Group(("direct",), True)]


def begin(config: Any, options: dict[str, Any] | None = None, disturbed: float = 0.3, **settings: Any) -> tuple[float, nn.Module]:
    """Relative error of the block behind the start, whose input is not quite the teacher's."""
    _, block, names, call, stream = setting(config)
    noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(2))
    inputs = stream + disturbed * noise * stream.square().mean().sqrt()
    student = copy.deepcopy(block)
    method = method_config("binarymos", options or {})
    initialise_block(
        block, student, names, call, (stream, inputs), 4, method, InitialiseConfig(**settings), torch.Generator().manual_seed(0)
    )
    assert sorted(name for name, _ in trainable_layers(student)) == sorted(names)
    mine, theirs = advance(student, call, inputs, 4), advance(block, call, stream, 4)
    return ((mine - theirs).square().sum() / theirs.square().sum()).item(), student


@pytest.mark.parametrize("config", [LLAMA, OPT, NEOX], ids=lambda config: config.model_type)
def test_each_part_of_the_start_helps(config: Any) -> None:
    blind, _ = begin(config, activation_aware=False)
    plain, _ = begin(config, {"compensation": 0}, refit=False)
    compensated, _ = begin(config, refit=False)
    refit, _ = begin(config)
    assert refit < compensated < plain < 1.1 * blind


def test_refit_takes_the_streams_error_away() -> None:
    """With nothing binarized, the refit weights alone must mend part of an error that comes in."""
    _, block, names, call, stream = setting(LLAMA)
    torch.manual_seed(3)
    inputs = stream + 0.5 * stream @ torch.randn(32, 32) * 32**-0.5
    groups = execution_groups(block, names, call, stream[:4])
    student = copy.deepcopy(block)
    before = (advance(student, call, inputs, 4) - advance(block, call, stream, 4)).square().mean()
    writers: list[Group] = []
    lanes = Lanes(1, stream.device)
    answers = Answers(block, groups, call, stream, 4, lanes)
    for group in groups:
        measured = Measurement(answers, student, group, list(writers), call)
        measured.run(inputs, 4, lanes)
        for name in group.names:
            measured.refit(name)
        writers += [group] if group.residual else []
    after = (advance(student, call, inputs, 4) - advance(block, call, stream, 4)).square().mean()
    assert after < 0.5 * before


def test_statistics_are_those_of_what_the_student_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block, names, call, stream = setting(LLAMA)
    found: dict[str, InputStatistics] = {}

    def keep(module: nn.Module, names: list[str], method: Any, statistics: dict[str, InputStatistics], generator: Any) -> None:
        found.update(statistics)

    monkeypatch.setattr(initialise, "binarize", keep)
    inputs = stream + 1
    config = InitialiseConfig(refit=False, sequences=7)  # whole batches: four of the eight rows
    initialise_block(block, copy.deepcopy(block), names, call, (stream, inputs), 4, method_config("sign"), config, torch.Generator())
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = block.get_submodule(ATTENTION[0]).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        call(block, inputs[:4])
        handle.remove()
    statistics = found[ATTENTION[0]]
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.gram, seen[0].T @ seen[0] / 64)
    torch.testing.assert_close(statistics.second_moment, seen[0].square().mean(0))
    assert len(statistics.sample) and all((seen[0] == row).all(-1).any() for row in statistics.sample)
    assert set(found) == set(names)


@pytest.mark.parametrize("config", [LLAMA, OPT, NEOX], ids=lambda config: config.model_type)
def test_answers_are_the_same_made_once_or_anew(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error, student = begin(config)
    monkeypatch.setattr("bimos.training.answers.KEPT_BYTES", 0)
    again, other = begin(config)
    assert again == error
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("kept", [0, KEPT_BYTES])
@pytest.mark.parametrize("size", [2, 4])
def test_lanes_start_like_one(size: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, block, names, _, stream = setting(LLAMA)
    _, calls = capture(model, torch.zeros(size, 16, dtype=torch.long))
    monkeypatch.setattr("bimos.training.answers.KEPT_BYTES", kept)
    answers = advance(block, calls[1], stream, size)
    students = []
    torch.set_num_threads(4)
    for rows in (1, 4):
        student = copy.deepcopy(block)
        with Lanes(rows, stream.device) as lanes:
            assert lanes.count == min(rows, 2)
            arguments = (size, method_config("sign"), InitialiseConfig(), torch.Generator().manual_seed(0), lanes)
            _, behind = initialise_block(block, student, names, calls[1], (stream, stream + 0.1), *arguments)
        assert (behind is None) == (kept == 0)
        if behind is not None:
            torch.testing.assert_close(behind, answers)
        students.append(advance(student, calls[1], stream, size))
    torch.set_num_threads(1)
    torch.testing.assert_close(*students, rtol=1e-3, atol=1e-4)


def test_samples_are_few_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block, names, call, stream = setting(LLAMA)
    monkeypatch.setattr(measuring, "MOST_SAMPLES", 20)
    lanes = Lanes(1, stream.device)
    group = execution_groups(block, names, call, stream[:4])[0]
    measured = Measurement(Answers(block, [group], call, stream, 4, lanes), block, group, [], call)
    measured.run(stream, 4, lanes)
    statistics = measured.statistics()
    assert statistics.importance is not None
    assert 16 <= len(statistics.sample) <= 20 and len(statistics.importance) == len(statistics.sample)
    torch.testing.assert_close(measured.statistics().sample, statistics.sample)
