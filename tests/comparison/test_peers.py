"""Rows of libraries: what they find is packed exactly and counted like all else; with the libraries where they are installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bimos.comparison import peers
from bimos.comparison.peers import HQQ, AutoRound, Codes, packed
from bimos.comparison.rows import parse_rows
from bimos.errors import BimosError
from bimos.evaluation.perplexity import perplexity
from bimos.evaluation.texts import load_text
from bimos.models import convertible_linears, load_teacher, load_to_measure
from bimos.packing.groups import by_input
from bimos.packing.integrity import read_headers

Compare = Callable[..., dict[str, Any]]
GROUP = 32
SHARED = {"data": "river.txt", "tokens": 512, "minutes": None, "seed": 3, "embedding_bits": 8}


def dense(codes: Codes, group_size: int) -> Tensor:
    width = codes.code.shape[1]
    return by_input(codes.step, group_size, width) * (codes.code - by_input(codes.zero, group_size, width))


def rounded(self: HQQ, model: Any, tokenizer: Any, linears: Mapping[str, nn.Linear], *rest: Any) -> Iterator[tuple[str, Codes]]:
    """Stands for the library: nearest integers, zero points in the middle."""
    for name, linear in linears.items():
        weight = linear.weight.detach().float()
        step = weight.unflatten(1, (-1, self.group_size)).abs().amax(-1) / 1.5
        code = (weight / by_input(step, self.group_size, weight.shape[1]) + 1.5).round().clamp(0, 3)
        yield name, Codes(code, step, torch.full_like(step, 1.5))


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def test_packed_is_what_the_codes_say(exact_kernels: None) -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 4, (24, 64), generator=generator)
    step = torch.randint(1, 64, (24, 4), generator=generator) / 64  # so that float16 holds the offsets, too
    codes = Codes(code, step, torch.randint(0, 4, (24, 4), generator=generator).float())
    bias, x = torch.randn(24, generator=generator).half(), torch.randn(5, 64, generator=generator)
    torch.testing.assert_close(packed(codes, bias, 16)(x), x @ dense(codes, 16).T + bias.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("avx2_alone")  # where the teacher is widened to float32 while it is rounded
def test_a_row_counts_every_byte_and_is_done_once(
    compare_tiny: Compare, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(HQQ, "codes", rounded)
        patched.setattr(peers, "find_spec", lambda name: object())
        patched.setattr(peers, "version", lambda name: "0.0")
        result = compare_tiny(tmp_path / "out", "fp16", f"hqq:group_size={GROUP}", f"rtn2:group_size={GROUP}")
    _, row, ours = sorted(result["rows"], key=lambda row: row["row"])
    assert (row["total_bytes"], row["bits_per_parameter"]) == (ours["total_bytes"], ours["bits_per_parameter"])
    assert row["body_bits_per_weight"] == 2 + 32 / GROUP == row["peer"]["own_body_bits_per_weight"]
    directory = tmp_path / "out" / "work" / f"hqq-group_size={GROUP}" / "model"
    body = {name: entry for name, entry in read_headers([directory / "model.safetensors"]).items() if "_proj" in name}
    stored = sum(torch.Size(shape).numel() * {"U8": 8, "F16": 16}[dtype] for shape, dtype in body.values())
    weights = sum(4 * torch.Size(shape).numel() for name, (shape, _) in body.items() if name.endswith("weight"))  # two planes
    assert stored / weights == row["body_bits_per_weight"]
    assert row["total_bytes"] == (directory / "model.safetensors").stat().st_size
    model, tokenizer = load_to_measure(directory), load_teacher(result["setting"]["model"])[1]
    measured = perplexity(model, tokenizer, load_text(str(text_file)), windows=2).value
    assert row["perplexity"][text_file.name]["value"] == pytest.approx(measured, rel=1e-6)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "rounded by hqq 0.0 (3.000 bits a body weight in its own format)" in page
    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # what is finished needs no library
    never = lambda job, steps: pytest.fail(f"{job.name} again")  # noqa: E731
    assert len(compare_tiny(tmp_path / "out", f"hqq:group_size={GROUP}", spawn=never)["rows"]) == 3


def test_the_row_that_a_kill_interrupted_is_done_again(compare_tiny: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HQQ, "codes", rounded)
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "version", lambda name: "0.0")
    (row,) = compare_tiny(tmp_path / "out", f"hqq:group_size={GROUP}")["rows"]
    folder = tmp_path / "out" / "work" / f"hqq-group_size={GROUP}"
    shutil.rmtree(tmp_path / "out" / "rows")
    for name in ("made.json", "model/result.json", "evaluation.json"):
        (folder / name).unlink()
    (again,) = compare_tiny(tmp_path / "out", f"hqq:group_size={GROUP}")["rows"]
    assert again["perplexity"]["river.txt"]["value"] == row["perplexity"]["river.txt"]["value"]


@pytest.mark.parametrize("row", ["hqq:group_size=32", "auto-round:group_size=32"])
def test_a_library_that_is_missing_is_named_before_any_work(
    compare_tiny: Compare, tmp_path: Path, without_libraries: None, row: str
) -> None:
    with pytest.raises(BimosError) as caught:
        compare_tiny(tmp_path / "out", "fp16", row, spawn=lambda job, steps: pytest.fail("work"))
    name = row.partition(":")[0]
    assert str(caught.value) == f"row '{row}': {name} needs the library {name}; install it with: pip install 'bimos[peers]'"
    assert not (tmp_path / "out").exists()


def test_a_library_that_fails_is_named(compare_tiny: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Iterator[Any]:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(HQQ, "codes", failing)
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "version", lambda name: "0.0")
    with pytest.raises(BimosError, match=r"row 'hqq:group_size=32' failed: hqq 0.0 failed: no such kernel"):
        compare_tiny(tmp_path / "out", "hqq:group_size=32")


def test_groups_that_do_not_divide_the_inputs_are_refused(compare_tiny: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    with pytest.raises(BimosError, match=r"row 'hqq': .*down_proj': hqq with group_size=64: not a divisor of in_features=96"):
        compare_tiny(tmp_path / "out", "hqq")


def test_options() -> None:
    plain, changed = parse_rows(["auto-round", "auto-round:iters=20:initialise.sequences=8"], {}, SHARED)
    assert plain.config.tokens is None  # which are those of distillation
    assert peers.row_config(changed.config) == AutoRound(iters=20) and changed.config.initialise.sequences == 8
    for given, fragment in (
        ("hqq:iters=2", "no option 'iters'"),
        ("hqq:name=x", "no option 'name'"),
        ("auto-round:iters=0", "iters=0"),
        ("hqq:group_size=12", "group_size=12"),
    ):
        with pytest.raises(BimosError, match=fragment):
            parse_rows([given], {}, SHARED)
    with pytest.raises(BimosError, match="rows 'hqq' and 'hqq:group_size=64' are the same run"):
        parse_rows(["hqq", "hqq:group_size=64"], {}, SHARED)


def test_hqq_is_packed_as_the_library_dequantises_it(teacher_directory: Path) -> None:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    teacher, tokenizer = load_teacher(teacher_directory)
    linears = convertible_linears(teacher)
    for name, codes in HQQ(group_size=GROUP).codes(teacher, tokenizer, linears, None, 0):
        weight = linears[name].weight.detach().float()
        code, meta = quantize.Quantizer.quantize(weight, nbits=2, group_size=GROUP, axis=1, device="cpu", bitpack=False)
        theirs = quantize.Quantizer.dequantize(code, meta | {"compute_dtype": torch.float32})
        ours = packed(codes, None, GROUP)(torch.eye(weight.shape[1])).T
        assert (ours - theirs).abs().max() < 4e-3 * codes.step.max()  # float16 scales and zero points
        assert (ours - weight).norm() < 0.6 * weight.norm()


def test_auto_round_is_packed_as_the_library_dequantises_it(teacher_directory: Path) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    teacher, tokenizer = load_teacher(teacher_directory)
    linears = convertible_linears(teacher)
    before = {name: linear.weight.detach().float().clone() for name, linear in linears.items()}
    embedding = teacher.get_input_embeddings().weight.clone()
    windows = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    found = dict(AutoRound(group_size=GROUP, iters=2, batch_size=2).codes(teacher, tokenizer, linears, windows, 0))
    assert list(found) == list(linears) and torch.equal(teacher.get_input_embeddings().weight, embedding)
    for name, codes in found.items():
        theirs = teacher.get_submodule(name).weight.detach().float()
        ours = packed(codes, None, GROUP)(torch.eye(theirs.shape[1])).T
        assert (ours - theirs).abs().max() < 0.02 * codes.step.max()  # bfloat16 weights
        assert 0 < (ours - before[name]).norm() < 0.7 * before[name].norm()
        assert torch.equal(codes.zero, codes.zero.round()) and codes.zero.min() >= 0 and codes.zero.max() <= 3


@pytest.mark.parametrize(
    ("row", "module", "own"), [("hqq:group_size=32", "hqq", 3.0), ("auto-round:group_size=32:iters=2", "auto_round", 2.5625)]
)
def test_rows_of_the_libraries(
    compare_tiny: Compare, tmp_path: Path, capfd: pytest.CaptureFixture[str], row: str, module: str, own: float
) -> None:
    pytest.importorskip(module, reason=f"{module} is not installed")
    (made,) = compare_tiny(tmp_path / "out", row)["rows"]
    assert made["body_bits_per_weight"] == 3 and made["peer"]["own_body_bits_per_weight"] == own
    assert made["perplexity"]["river.txt"]["value"] < 1000 and made["speed"]["runs_in"].startswith("engine")
    assert made["stages"][0]["seconds"] > 0 and made["peer"]["version"]
    assert capfd.readouterr().out == ""  # it is the command's
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][0]["row"] == row
