"""Hub data sets, streamed: a local file stands in for the Hub, behind the same classes of `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerFast

from bimos.errors import BimosError
from bimos.training import hubdata
from bimos.training.data import TokenStream

LENGTH = 32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Serves 100 documents in shards of 30 as `who/data:en`. Gives the list of what was asked for."""
    documents = [f"Document {i} of the stream." for i in range(100)]
    pq.write_table(pa.table({"text": documents}), tmp_path / "hub.parquet", row_group_size=30)
    asked: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    def stand_in(name: str, config: str | None, *, revision: str, split: str, streaming: bool) -> Any:
        asked.append((name, config, revision, split, streaming))
        return load("parquet", data_files=str(tmp_path / "hub.parquet"), split=split, streaming=streaming, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    monkeypatch.setattr(hubdata, "_revision", lambda name: "c0ffee")
    monkeypatch.setattr(hubdata, "BLOCK_ROWS", 16)
    return asked


def stream(tokenizer: PreTrainedTokenizerFast, cache: Path, spec: str = "who/data:en", seed: int = 0) -> TokenStream:
    return TokenStream(spec, tokenizer, LENGTH, seed, cache)


def test_the_stream_is_shuffled_complete_and_repeats(hub: list, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"Document {i} of the stream." for i in range(100)]
    epoch = sum(len(tokenizer(text).input_ids) + 1 for text in documents)
    tokens = stream(tokenizer, tmp_path / "cache").batch(0, 2 * epoch // LENGTH + 1).flatten().tolist()
    orders = [tokenizer.decode(tokens[start : start + epoch]).split("</s>")[:-1] for start in (0, epoch)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(documents)
    assert orders[0] != documents and orders[0] != orders[1]
    assert hub[0] == ("who/data", "en", "c0ffee", "train", True) and len(hub) == 3


def test_a_later_process_goes_on_where_the_stream_was(
    hub: list, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stream(tokenizer, tmp_path / "at once").batch(0, 150)
    monkeypatch.setattr(hubdata, "_revision", lambda name: "another")  # the cache keeps to the revision that it began with
    for upto in (2, 3, 40, 90, 150):
        assert torch.equal(stream(tokenizer, tmp_path / "cache").batch(0, upto), expected[:upto])
        monkeypatch.setattr(hubdata, "_revision", None)
    assert {revision for _, _, revision, _, _ in hub[3:]} == {"another"}


def test_what_is_cached_needs_no_hub(
    hub: list, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stream(tokenizer, tmp_path).batch(0, 5)
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert torch.equal(stream(tokenizer, tmp_path).batch(0, 5), expected)


def test_offline_is_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BimosError, match=r"^cannot reach the Hub for data 'allenai/c4' \(.*\); give a local file or folder$"):
        stream(tokenizer, tmp_path, "allenai/c4:en").window(0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("no route"), "cannot reach the Hub"),
        (RuntimeError("Dataset scripts are no\nlonger supported"), "Dataset scripts are no longer supported"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("BuilderConfig 'xx' not found. Available: ['en']"), "Available: ['en']; write its config as who/data:CONFIG"),
        (HFValidationError("bad name"), "neither a file or folder here nor on the Hub"),
    ],
)
def test_whatever_the_hub_fails_with_is_one_line(
    error: Exception, words: str, hub: list, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(BimosError, match=r"^[^\n]*$") as caught:
        stream(tokenizer, tmp_path / "cache").window(0)
    assert words in str(caught.value) and "who/data" in str(caught.value)


@pytest.mark.parametrize(("column", "words"), [("question", "its fields: question"), ("text", "holds no text")])
def test_a_data_set_without_text(column: str, words: str, hub: list, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pq.write_table(pa.table({column: [" "] * 40}), tmp_path / "hub.parquet")
    with pytest.raises(BimosError) as caught:
        stream(tokenizer, tmp_path / "cache").window(0)
    assert words in str(caught.value)
