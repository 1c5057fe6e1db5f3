"""From files to pieces of text: formats, cutting, chats, and files that hold no text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bimos.errors import BimosError
from bimos.training.documents import PIECE_CHARACTERS, FilePieces, cut, join_lines
from bimos.training.sources import parse_sources

CHAT = [{"role": "user", "content": "How wide is it?"}, {"role": "assistant", "content": "A mile."}]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, columns: dict[str, list], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def one_epoch(path: Path, tokenizer: PreTrainedTokenizerFast, cache: Path, seed: int = 0) -> list[str]:
    pieces = FilePieces(parse_sources(str(path))[0], tokenizer, seed, cache)
    cursor: dict[str, Any] = {}
    texts = []
    while cursor.get("epoch", 0) == 0:
        more, cursor = pieces.texts(cursor)
        texts += more
    return texts


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_every_row_once_in_a_seeded_order(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"Document {i}." for i in range(300)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet(path, {"title": documents, "text": documents}, row_group_size=70)
    else:
        data = lines(*({"id": i, "text": text} for i, text in enumerate(documents)))
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    first, other = (one_epoch(path, tokenizer, tmp_path, seed) for seed in (0, 1))
    assert sorted(first) == sorted(other) == sorted(documents)
    assert first != other and first != documents
    assert first == one_epoch(path, tokenizer, tmp_path / "another cache")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_cut_in_pieces_without_loss(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    book = "\N{BOM}" + text * 8 + "Naïve café."
    path = tmp_path / f"book{suffix}"
    path.write_bytes(gzip.compress(book.encode()) if suffix.endswith(".gz") else book.encode())
    pieces = one_epoch(path, tokenizer, tmp_path)
    assert len(pieces) > len(book) / PIECE_CHARACTERS and max(map(len, pieces)) <= PIECE_CHARACTERS
    assert sum(map(len, pieces)) == len(book) - 1  # the byte order mark is no text
    assert sorted(word for piece in pieces for word in piece.split()) == sorted(book[1:].split())  # and no word is torn


def test_a_folder_is_all_its_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("From a text.")
    (folder / "b.jsonl").write_bytes(lines({"text": "From a line."}, {"text": ""}, {"text": None}, {"messages": []}))
    parquet(folder / "c.parquet", {"text": ["From a row.", " \n"]})
    (folder / "d.txt").touch()
    assert sorted(one_epoch(folder, tokenizer, tmp_path)) == ["From a line.", "From a row.", "From a text."]


def test_halves_of_surrogate_pairs_are_no_characters(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "scraped.jsonl"
    texts = ["A river\ud83d.", "\ud83d\ude00 \udc00café"]
    path.write_bytes(lines({"text": texts[0]}, {"text": texts[1]}, {"messages": [{"role": "user", "content": "wide\udfff"}]}))
    pieces = ["A river\ufffd.", "<|user|>wide\ufffd</s>", "\N{GRINNING FACE} \ufffdcafé"]
    assert sorted(one_epoch(path, tokenizer, tmp_path), key=len) == sorted(pieces, key=len)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_go_through_the_template(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / f"chat.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines({"messages": CHAT}))
    else:
        parquet(path, {"messages": [CHAT]})
    assert one_epoch(path, tokenizer, tmp_path) == ["<|user|>How wide is it?</s><|assistant|>A mile.</s>"]


def test_rows_that_are_lines_are_joined(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    wiki = ["", " = Title = \n", "", " First paragraph . \n", " Second paragraph . \n", ""]
    assert "".join(join_lines(wiki * 10)) == "\n = Title = \n\n First paragraph . \n Second paragraph . \n\n" * 10
    pages = [f"A page.\n Number {i}.\n" for i in range(300)] + [""] * 10
    assert list(join_lines(pages)) == pages
    path = parquet(tmp_path / "wiki.parquet", {"text": wiki * 1000})
    pieces = one_epoch(path, tokenizer, tmp_path)
    assert 0.9 * PIECE_CHARACTERS < max(map(len, pieces)) <= PIECE_CHARACTERS
    assert "".join(pieces).count(" First paragraph . \n Second paragraph . \n") == 1000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "\n", "x" * 3000, "é", "\n\n"]), max_size=60))
def test_cutting_loses_no_text(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = list(cut(text))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= PIECE_CHARACTERS for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("blank.txt", b" \n\n ", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("none.jsonl", lines({"text": ""}, {"text": "  "}), "holds no text"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("array.json", b'[\n{"text": "a"}\n]', "line 1 is not JSON"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deep"),
        ("numbers.jsonl", b"1\n2\n", "line 1 is not a JSON object"),
        ("fields.jsonl", lines({"question": "a", "answer": "b"}), "its fields: question, answer"),
        ("types.jsonl", lines({"text": 3}), "field 'text' holds int"),
        ("chat.jsonl", lines({"messages": "hello"}), "must be a list"),
        ("chat.jsonl", lines({"messages": [{"role": "user"}]}), "must be a list"),
        ("fake.txt.gz", b"no gzip", "not a complete gzip"),
        ("short.jsonl.gz", gzip.compress(lines({"text": "a" * 1000}), mtime=0)[:-9], "not a complete gzip"),
        ("fake.parquet", b"PAR1 no parquet", "not a complete parquet"),
    ],
)
def test_files_without_text_end_in_one_line(
    name: str, content: bytes, words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BimosError, match=r"^[^\n]*$") as caught:
        one_epoch(path, tokenizer, tmp_path)
    assert words in str(caught.value) and name in str(caught.value)
    assert not list(tmp_path.rglob("*.arrow*"))


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = parquet(tmp_path / "table.parquet", {"question": ["a"], "label": [1]})
    with pytest.raises(BimosError, match=r"neither a column 'text' nor 'messages'; its columns: question, label"):
        one_epoch(path, tokenizer, tmp_path)


def test_chats_need_a_template_that_takes_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines({"messages": CHAT}))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(BimosError, match=r"line 1 holds chat messages, but the model's tokenizer has no chat template"):
        one_epoch(path, bare, tmp_path)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BimosError, match=r"line 1: the tokenizer's chat template refuses the messages: roles must alternate"):
        one_epoch(path, bare, tmp_path)
