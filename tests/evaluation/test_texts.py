"""Where evaluation texts come from: local folder, Hub, files."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bimos import datafolder
from bimos.datafolder import data_directory
from bimos.errors import BimosError
from bimos.evaluation.texts import available_texts, load_text, read_documents


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def data(tmp_path, monkeypatch):
    write_parquet(tmp_path / "wikitext2/wikitext-2-raw-v1.test.parquet", text=["", " = Title = \n", "A line.\n"])
    write_parquet(tmp_path / "wikitext2/wikitext-2-raw-v1.validation.parquet", text=["other"])
    write_parquet(tmp_path / "c4/c4_en_train_sample_b.parquet", text=[f"doc{i}" for i in range(1200)], source=["s"] * 1200)
    monkeypatch.setenv("BIMOS_DATA", str(tmp_path))
    return tmp_path


def test_wikitext_rows_are_joined_by_blank_lines_and_nothing_is_cleaned(data):
    text = load_text("wikitext2")
    assert (text.name, text.label, text.text) == ("wikitext2", "WikiText-2 test", "\n\n = Title = \n\n\nA line.\n")
    assert load_text("wikitext2-validation").text == "other"


def test_c4_is_labelled_as_what_it_is(data):
    text = load_text("c4")
    assert text.label == "C4 (train sample b)"
    assert text.text.split(" ") == [f"doc{i}" for i in range(1100)]
    assert text.max_tokens == 524288


def test_hub_is_asked_where_nothing_is_local(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMOS_DATA", str(tmp_path))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or {"text": ["a", "b"]})
    assert load_text("wikitext2").text == "a\n\nb"
    assert load_text("c4").text == "a b"
    assert "validation" in load_text("c4").label
    assert asked[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})
    assert asked[1][0] == ("allenai/c4",) and asked[1][1]["split"] == "validation[:1100]"


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("cannot reach the Hub\nmany lines")

    monkeypatch.setenv("BIMOS_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BimosError, match="BIMOS_DATA") as caught:
        load_text("wikitext2")
    assert "\n" not in str(caught.value) and "cannot reach the Hub" in str(caught.value)


def test_data_directory_must_exist_when_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMOS_DATA", str(tmp_path / "no"))
    with pytest.raises(BimosError, match="BIMOS_DATA"):
        data_directory()


def test_data_directory_in_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("BIMOS_DATA", "~/data")
    assert data_directory() == tmp_path / "data"


def test_data_directory_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("BIMOS_DATA", raising=False)
    monkeypatch.setattr(datafolder, "__file__", str(tmp_path / "repo/src/bimos/datafolder.py"))
    assert data_directory() is None
    (tmp_path / "shared/data").mkdir(parents=True)
    assert data_directory() == tmp_path / "shared/data"


def test_local_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("héllo\n", encoding="utf-8")
    rows = "\n".join(json.dumps({"id": i, "text": f"row {i}\u2028x"}, ensure_ascii=False) for i in range(3)) + "\n"
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"page": "only string column", "n": 1}\n'))
    write_parquet(tmp_path / "d.parquet", title=["t", "u"], text=["one", None])
    assert load_text(str(tmp_path / "a.txt")).text == "héllo\n"
    assert load_text(str(tmp_path / "a.txt")).name == "a.txt"
    assert read_documents(tmp_path / "b.jsonl") == [f"row {i}\u2028x" for i in range(3)]
    assert load_text(str(tmp_path / "b.jsonl")).text.count("\n\n") == 2
    (tmp_path / "halves.jsonl").write_bytes(b'{"text": "a\\ud800b"}')
    assert read_documents(tmp_path / "halves.jsonl") == ["a\ufffdb"]
    assert read_documents(tmp_path / "c.jsonl.gz") == ["only string column"]
    assert read_documents(tmp_path / "d.parquet") == ["one", ""]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b" \n", "empty"),
        ("latin.txt", b"\xe9\xff", "not a readable txt"),
        ("bad.jsonl", b'{"text": "a"\n', "not a readable jsonl"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a readable jsonl.*too deep"),
        ("list.jsonl", b"[1]\n", "no JSON objects"),
        ("none.jsonl", b'{"a": "x", "b": "y"}\n', "no column 'text'"),
        ("bad.parquet", b"PAR1 not really", "not a readable parquet"),
        ("bad.jsonl.gz", b"not gzip", "cannot read"),
        ("half.jsonl.gz", gzip.compress(b'{"text": "a line"}\n' * 99, mtime=0)[:-12], "not a readable jsonl"),
        ("flipped.jsonl.gz", gzip.compress(b"abc" * 99, mtime=0)[:12] + b"\xff" * 20, "not a readable jsonl"),
        ("picture.png", b"1234", "cannot read files of this kind"),
    ],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BimosError, match=complaint) as caught:
        load_text(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "complaint"), [("wikitext3", "unknown"), ("no/such.txt", "not a file")])
def test_unknown_names_list_the_known_ones(name, complaint):
    with pytest.raises(BimosError, match=complaint) as caught:
        load_text(name)
    assert all(known in str(caught.value) for known in available_texts())


def test_the_real_wikitext2_has_every_character(monkeypatch):
    folder = data_directory()
    if folder is None or not (folder / "wikitext2").is_dir():
        pytest.skip("no evaluation data: set BIMOS_DATA")
    text = load_text("wikitext2").text
    assert len(text) == 1_285_622 + 2 * (4_358 - 1)  # the split's published characters, and the separators
    assert "<unk>" not in text
