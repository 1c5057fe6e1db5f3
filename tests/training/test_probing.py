"""What layers keep while they train, as the plan of a run has it."""

from __future__ import annotations

import pytest
import torch

from bimos.methods import available_methods, method_config
from bimos.training.probing import kept_by


@pytest.mark.parametrize("name", list(available_methods()))
def test_every_method_can_be_asked(name: str) -> None:
    kept = kept_by(method_config(name), torch.float32)
    assert min(kept.of_input, kept.of_output, kept.of_token, kept.of_weight) >= 0
    assert kept.of_weight > 0 or kept.planes > 0  # of the weight there is something to multiply by


@pytest.mark.parametrize(("planes", "experts"), [(1, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_scales_keep_scaled_inputs_products_and_gates(planes: int, experts: int, dtype: torch.dtype) -> None:
    kept = kept_by(method_config("binarymos", {"planes": planes, "num_experts": experts}), dtype)
    assert (kept.of_input, kept.of_output) == (planes * dtype.itemsize, planes * dtype.itemsize)
    assert kept.of_token == (4 * experts if experts > 1 else 0)
    assert kept.of_weight == pytest.approx(0, abs=0.01) and kept.planes == planes


@pytest.mark.parametrize("group_size", [96, 48, 192, 100])
def test_groups_that_do_not_divide_the_probe(group_size: int) -> None:
    assert kept_by(method_config("dbllm", {"group_size": group_size}), torch.float32).of_weight == pytest.approx(4, rel=0.02)
    kept = kept_by(method_config("sign", {"group_size": group_size}), torch.float32) if group_size != 100 else None
    assert kept is None or kept.of_signs == kept.of_signs_alone == 4


def test_a_pass_by_itself_keeps_no_signs_that_it_can_make_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bimos.training.probing.tables_pay", lambda latent, _: True)
    assert kept_by(method_config("binarymos"), torch.float32).of_signs_alone == 1  # tiles
    assert kept_by(method_config("binarymos"), torch.bfloat16, on_cpu=False).of_signs_alone == 0
    assert kept_by(method_config("sign", {"group_size": 64}), torch.bfloat16, on_cpu=False).of_signs_alone == 2


def test_a_weight_that_is_made_counts_for_every_lane() -> None:
    kept = kept_by(method_config("dbllm"), torch.float32)
    assert kept.of_weight == pytest.approx(4, abs=0.01) and kept.planes == 0
    assert kept.bytes_a_token(256, 512) == 0


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("sign", {}, 0),
        ("sign", {"group_size": 64}, 1),
        ("binarymos", {"planes": 2}, 0),
        ("binarymos", {"planes": 2, "group_size": 64}, 2),
        ("billm", {}, 1),
        ("dbllm", {}, 0),
    ],
)
def test_signs_that_are_multiplied_as_values_count_as_such(
    name: str, options: dict[str, int], values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_by(method_config(name, options), torch.float32).of_signs == 4 * kept_by(method_config(name, options), torch.float32).planes
    monkeypatch.setattr("bimos.training.probing.tables_pay", lambda latent, _: latent.dim() == 2)
    kept = kept_by(method_config(name, options), torch.float32)
    assert kept.of_signs == 4 * values + (kept.planes - values)
