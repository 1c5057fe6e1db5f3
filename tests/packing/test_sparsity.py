"""Ones counted against planes unpacked, operations against the definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from bimos.cli import app
from bimos.kernels.reference import unpack_signs
from bimos.packing.checkpoint import save_packed
from bimos.packing.integrity import read_config, weight_files
from bimos.packing.linear import PackedLinear
from bimos.packing.sparsity import sparsity_report

Make = Callable[..., PreTrainedModel]


@pytest.fixture
def directory(packed: Make, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    torch.manual_seed(0)
    model = packed("qwen2", planes=2, experts=1, group=32, grouped=("scale_group_01",))
    for module in model.modules():
        if isinstance(module, PackedLinear):  # about a quarter of ones in the second plane
            module.weight[1] &= torch.randint(0, 256, module.weight[1].shape, dtype=torch.uint8)
    save_packed(model, None, tmp_path / "model")
    return model, tmp_path / "model"


def test_what_planes_skip(directory: tuple[PreTrainedModel, Path]) -> None:
    model, path = directory
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    bits = [torch.cat([(unpack_signs(layer.weight[p]) > 0).flatten().float() for layer in layers]) for p in range(2)]
    report = sparsity_report(weight_files(path), read_config(path)["quantization_config"])
    assert report is not None
    assert report["share_of_ones"] == pytest.approx([part.mean().item() for part in bits]) and report["share_of_ones"][1] < 0.3
    assert report["additions_skipped"] == pytest.approx(1 - torch.cat(bits).mean().item())
    groups = sum(layer.scale_group_01[0].numel() for layer in layers)  # type: ignore[index]
    assert report["operations_per_weight"] == pytest.approx(((bits[0] + bits[1]).sum().item() + 2 * groups) / len(bits[0]))
    assert report["dense_operations_per_weight"] == pytest.approx(1 + groups / len(bits[0]))
    assert report["operations"] == pytest.approx(report["operations_per_weight"] / report["dense_operations_per_weight"])


def test_info_says_so(directory: tuple[PreTrainedModel, Path], packed: Make, tmp_path: Path) -> None:
    out = tmp_path / "info.json"
    shown = CliRunner().invoke(app, ["info", str(directory[1]), "--json", str(out)])
    assert shown.exit_code == 0, shown.output
    found = json.loads(out.read_text())["planes"]
    assert f"{found['additions_skipped']:.1%} of the additions are skipped" in shown.output and 0.5 < found["additions_skipped"] < 0.7
    save_packed(packed("llama"), None, tmp_path / "signs")
    assert CliRunner().invoke(app, ["info", str(tmp_path / "signs"), "--json", str(out)]).exit_code == 0
    assert "planes" not in json.loads(out.read_text())
