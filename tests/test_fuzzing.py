"""A few hundred damaged checkpoints, the same every time; `make fuzz` goes on from there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bimos.kernels import native
from fuzzing import load_both, make_seeds, one
from mutations import Checkpoint

pytestmark = pytest.mark.skipif(native.isa() is None, reason=f"no C++ kernels: {native.problem}")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def test_the_seeds_are_good(seeds: list[Path], tmp_path: Path) -> None:
    for number, seed in enumerate(seeds):
        Checkpoint(seed).write(tmp_path)
        assert load_both(tmp_path) == 2, number


@pytest.mark.parametrize(("seed", "count", "ordinary"), [(0, 300, False), (1, 120, True)], ids=["mapped", "both"])
def test_damaged_checkpoints_are_told(seed: int, count: int, ordinary: bool, seeds: list[Path], tmp_path: Path) -> None:
    chance = random.Random(seed)
    good = 0
    for number in range(count):
        data = chance.randbytes(80)
        try:
            good += one(data, seeds, tmp_path / "aside", ordinary)
        except Exception as error:
            raise AssertionError(f"checkpoint {number}, {data.hex()}") from error
    assert 0.02 * count < good < 0.6 * count * (1 + ordinary)  # some damage is none, most is
