"""What `--methods` means, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bimos.comparison.rows import parse_rows
from bimos.errors import BimosError

BASE: dict[str, Any] = {"sequence_length": 32, "distill": {"lr_scale": 0.5}}
SHARED: dict[str, Any] = {"data": "river.txt", "tokens": 512, "minutes": None, "seed": 3, "embedding_bits": 8}


def rows(*specifications: str, shared: dict[str, Any] = SHARED) -> list[Any]:
    return parse_rows(specifications, BASE, shared)


def test_options_of_the_method_and_of_the_run() -> None:
    plain, changed = rows("binarymos", "binarymos:num_experts=8:distill.lr_latent=1e-3")
    assert (plain.name, plain.config.options, plain.config.distill.lr_scale, plain.config.sequence_length) == ("binarymos", {}, 0.5, 32)
    assert changed.name == "binarymos:num_experts=8:distill.lr_latent=1e-3" and "/" not in changed.slug and ":" not in changed.slug
    assert changed.config.options == {"num_experts": 8}
    assert (changed.config.distill.lr_latent, changed.config.distill.lr_scale) == (1e-3, 0.5)
    assert {row.config.seed for row in (plain, changed)} == {3} and {row.config.tokens for row in (plain, changed)} == {512}


def test_the_teacher_has_no_config() -> None:
    (row,) = rows("fp16")
    assert row.config is None


@pytest.mark.parametrize(("tokens", "minutes", "expected"), [(512, None, 60.0), (None, 5.0, 5.0)])
def test_a_row_without_training_has_no_tokens_for_it(tokens: int | None, minutes: float | None, expected: float) -> None:
    (row,) = rows("sign:untrained", shared=SHARED | {"tokens": tokens, "minutes": minutes})
    assert (row.config.blocks.enabled, row.config.distill.enabled) == (False, False)
    assert (row.config.tokens, row.config.minutes) == (None, expected)


def test_a_recipe_keeps_all_that_rows_do_not_share(tmp_path: Path) -> None:
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text("method: onebit\noptions: {iterations: 0}\ndata: c4\nseed: 9\nsequence_length: 64\ntokens: 196000000\n")
    row, changed = rows(str(recipe), f"{recipe}:iterations=2")
    assert (row.name, changed.name) == ("theirs", "theirs:iterations=2")
    assert (row.config.method, row.config.options, row.config.sequence_length) == ("onebit", {"iterations": 0}, 64)
    assert (row.config.data, row.config.seed, row.config.tokens) == ("river.txt", 3, 512)
    assert row.config.distill.lr_scale != 0.5  # what rows of methods start from is not theirs


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ([], ["no rows", "--methods"]),
        (["binarymoss"], ["unknown method 'binarymoss'", "fp16", "onebit"]),
        (["binarymos:num_expert=8"], ["no option 'num_expert'", "num_experts"]),
        (["binarymos:num_experts=many"], ["num_experts", "many"]),
        (["binarymos:num_experts=0"], ["num_experts=0"]),
        (["binarymos:distill.lr=1"], ["distill.lr"]),
        (["binarymos:eight"], ["'eight'", "key=value"]),
        (["fp16:x=1"], ["no options"]),
        (["no-such.yaml"], ["no-such.yaml"]),
        (["sign", "fp16", "sign"], ["'sign' is given twice"]),
        (["binarymos", "binarymos:num_experts=4"], ["'binarymos'", "'binarymos:num_experts=4'", "same run"]),
    ],
)
def test_refusals(given: list[str], fragments: list[str]) -> None:
    with pytest.raises(BimosError) as caught:
        rows(*given)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)
