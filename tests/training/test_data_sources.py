"""The syntax of data specs: what they name, what they weigh, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bimos.errors import BimosError
from bimos.training.sources import parse_sources


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some files; BIMOS_DATA names a folder `elsewhere` with one more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIMOS_DATA", str(tmp_path / "elsewhere"))
    for name in ("wiki.parquet", "chat.jsonl", "odd, name:0.5.txt", "books/b.txt", "books/deep/a.jsonl.gz", "books/cover.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.pdf").write_text("x")
    return tmp_path


def test_weights_are_normalised_and_optional() -> None:
    mix = parse_sources("wiki.parquet:3, chat.jsonl:1")
    assert [(source.name, source.weight) for source in mix] == [("wiki.parquet", 0.75), ("chat.jsonl", 0.25)]
    assert [source.weight for source in parse_sources("wiki.parquet,chat.jsonl,self,allenai/c4:en")] == [0.25] * 4
    assert parse_sources("wiki.parquet")[0].weight == 1.0


def test_files_folders_and_the_data_folder(folder: Path) -> None:
    assert parse_sources("wiki.parquet")[0].files == ((folder / "wiki.parquet").resolve(),)
    assert [file.name for file in parse_sources("books")[0].files] == ["b.txt", "a.jsonl.gz"]
    assert parse_sources("far.txt")[0].files == ((folder / "elsewhere" / "far.txt").resolve(),)
    odd = parse_sources("odd, name:0.5.txt")
    assert len(odd) == 1 and odd[0].files[0].name == "odd, name:0.5.txt" and odd[0].weight == 1.0


@pytest.mark.parametrize(
    ("spec", "name", "config"),
    [
        ("allenai/c4:en", "allenai/c4", "en"),
        ("Salesforce/wikitext:wikitext-2-raw-v1:0.2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("teknium/OpenHermes-2.5", "teknium/OpenHermes-2.5", None),
        ("imdb:2", "imdb", None),
    ],
)
def test_hub_names(spec: str, name: str, config: str | None) -> None:
    (source,) = parse_sources(spec)
    assert (source.kind, source.name, source.config, source.weight) == ("hub", name, config, 1.0)


def test_what_exists_on_disk_is_no_hub_name_and_self_is_no_file(folder: Path) -> None:
    (folder / "self").write_text("x")
    (folder / "imdb").mkdir()
    (folder / "imdb" / "x.txt").write_text("x")
    assert [source.kind for source in parse_sources("imdb,self")] == ["files", "self"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "no training data"),
        ("missing.parquet", "no such data file or folder: 'missing.parquet'"),
        ("./missing", "no such data file or folder"),
        ("books/missing.jsonl:0.5", "no such data file or folder: 'books/missing.jsonl'"),
        ("notes.pdf", "unknown kind '.pdf'"),
        ("empty.txt", "empty.txt' is empty"),
        ("nothing", "holds no file of a known kind"),
        ("wiki.parquet:0.7,", "empty source"),
        ("wiki.parquet:0.7,chat.jsonl", "'chat.jsonl' has no weight"),
        ("wiki.parquet:a lot", "'a lot' is not a weight"),
        ("wiki.parquet:", "'' is not a weight"),
        ("self:en", "'en' is not a weight"),
        ("missing.txt:much", "'much' is not a weight"),
        ("wiki.parquet:0", "must be a positive number"),
        ("wiki.parquet:-1,chat.jsonl:2", "must be a positive number"),
        ("wiki.parquet:nan", "must be a positive number"),
        ("wiki.parquet:inf", "must be a positive number"),
    ],
)
def test_what_is_refused(spec: str, words: str) -> None:
    with pytest.raises(BimosError, match=r"^[^\n]*$") as caught:
        parse_sources(spec)
    assert words in str(caught.value)
