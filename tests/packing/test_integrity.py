"""Whatever happens to a checkpoint's files: one clear line, never a model with wrong weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing.integrity import METADATA_KEY, checksum, is_packed, verify, weight_files

Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def single(packed: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("single")
    packed("llama", embedding_bits=8).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sharded(packed: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    packed("llama", embedding_bits=8).save_pretrained(directory, max_shard_size="5KB")
    return directory


@pytest.fixture
def copied(single: Path, sharded: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda which: Path(shutil.copytree({"single": single, "sharded": sharded}[which], tmp_path / which))


def assert_refused(directory: Path, message: str) -> None:
    for load in (verify, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BimosError, match=message) as error:
            load(directory)
        assert "\n" not in str(error.value)


def test_a_good_checkpoint_passes(single: Path, sharded: Path) -> None:
    verify(single)
    verify(sharded)
    assert len(weight_files(sharded)) > 2 and is_packed(single)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.3, 0.9, 0.9999])
def test_truncated(keep: float, copied: Callable[[str], Path]) -> None:
    file = copied("single") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    assert_refused(file.parent, "truncated or corrupt")


def test_any_flipped_bit_of_a_tensor(copied: Callable[[str], Path]) -> None:
    file = copied("single") / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(0)
    for position in [header, len(data) - 1, *(chance.randrange(header, len(data)) for _ in range(20))]:
        bit = 1 << chance.randrange(8)
        data[position] ^= bit
        file.write_bytes(data)
        with pytest.raises(BimosError, match=r"'.*model\.safetensors' is corrupt: the checksum of '.*' does not match"):
            verify(file.parent)
        data[position] ^= bit
    file.write_bytes(data)
    verify(file.parent)


def test_any_flipped_bit_of_the_header(copied: Callable[[str], Path]) -> None:
    file = copied("single") / "model.safetensors"
    good = load_file(file)
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(1)
    refused = 0
    for position in [0, 8, *(chance.randrange(header) for _ in range(40))]:
        bit = 1 << chance.randrange(8)
        data[position] ^= bit
        file.write_bytes(data)
        try:
            verify(file.parent)
        except BimosError:
            refused += 1
        else:  # then it changed nothing that counts, such as the word "format"
            assert {k: v.tolist() for k, v in load_file(file).items()} == {k: v.tolist() for k, v in good.items()}
        data[position] ^= bit
    assert refused >= 38


def test_loading_checks_the_sums(copied: Callable[[str], Path]) -> None:
    file = copied("sharded") / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert_refused(file.parent, "model-00002-of-00003.safetensors' is corrupt: the checksum of")


def test_missing_shard(copied: Callable[[str], Path]) -> None:
    directory = copied("sharded")
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert_refused(directory, "model-00002-of-00003.safetensors' is missing")


def test_shard_missing_from_the_index_too(copied: Callable[[str], Path]) -> None:
    directory = copied("sharded")
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {name: file for name, file in values["weight_map"].items() if "00002" not in file}
    index.write_text(json.dumps(values))
    assert_refused(directory, r"holds \d+ tensors where 63 were saved")


def test_shard_of_another_save(copied: Callable[[str], Path], packed: Make, tmp_path: Path) -> None:
    directory = copied("sharded")
    packed("llama", embedding_bits=8, seed=1).save_pretrained(tmp_path / "other", max_shard_size="5KB")
    shutil.copy(tmp_path / "other/model-00002-of-00003.safetensors", directory)
    assert_refused(directory, "does not belong to the files beside it")


def test_no_weights_and_broken_json(copied: Callable[[str], Path]) -> None:
    directory = copied("single")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    with pytest.raises(BimosError, match=r"has no model\.safetensors"):
        verify(directory)
    directory = copied("sharded")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(BimosError, match=r"index\.json' is corrupt"):
        verify(directory)
    for text in ('{"quantization_config": ', "[1]"):
        (directory / "config.json").write_text(text)
        with pytest.raises(BimosError, match=r"config\.json' is corrupt"):
            verify(directory)
    (directory / "config.json").unlink()
    with pytest.raises(BimosError, match=r"no config\.json"):
        verify(directory)
    with pytest.raises(BimosError, match="no such model directory"):
        verify(directory / "nowhere")


def test_newer_format(copied: Callable[[str], Path]) -> None:
    directory = copied("single")
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"]["format_version"] = 7
    (directory / "config.json").write_text(json.dumps(values))
    assert_refused(directory, "format_version 7 and this bimos reads up to 2; upgrade")


def test_weights_without_checksums(copied: Callable[[str], Path]) -> None:
    directory = copied("single")
    save_file(load_file(directory / "model.safetensors"), directory / "model.safetensors", metadata={"format": "pt"})
    assert_refused(directory, "carries no checksums")


def test_dense_models_are_not_packed(dense: Make, tmp_path: Path) -> None:
    dense("opt").save_pretrained(tmp_path)
    assert not is_packed(tmp_path)
    with pytest.raises(BimosError, match="not a packed checkpoint"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        ("b", torch.arange(6.0).reshape(2, 3)),
        ("a", torch.arange(6.0).reshape(3, 2)),
        ("a", torch.arange(6.0).reshape(2, 3).view(torch.int32)),
        ("a", torch.arange(6.0).reshape(2, 3) * -1.0),
    ],
)
def test_checksum_covers_name_shape_dtype_and_bytes(other: tuple[str, Tensor]) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert checksum("a", tensor) == checksum("a", tensor.T.contiguous().T)
    assert checksum("a", tensor) != checksum(*other)
    assert len(checksum("a", torch.tensor(1.5))) == 8 and len(checksum("a", torch.zeros(0))) == 8
    assert METADATA_KEY == "bimos.crc32"
