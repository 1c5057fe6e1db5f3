"""Saves are whole or not at all, whatever happens in the middle of one."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bimos.errors import BimosError
from bimos.packing import checkpoint
from bimos.packing.checkpoint import check_output, save_packed, written_aside
from bimos.packing.integrity import verify

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.name != "test_everything_is_flushed_before_it_is_renamed":
        monkeypatch.setattr(os, "fsync", lambda handle: None)


CARD: dict[str, Any] = {
    "base_model": "someone/SmallLM",
    "recipe": {"stage": {"tokens": 5}, "lr": 0.001},
    "budget": "1000 tokens",
    "perplexity": {"wikitext2": {"value": 12.345678, "stderr": 0.1}},
    "commit": "abc123",
}


def test_saves_everything(packed: Make, tokenizer: Any, ids: Tensor, tmp_path: Path) -> None:
    model = packed("llama", embedding_bits=8)
    save_packed(model, tokenizer, tmp_path / "new/model", card=CARD)
    directory = tmp_path / "new/model"
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"} <= names
    assert [path.name for path in directory.parent.iterdir()] == ["model"]
    verify(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(directory)("river").input_ids == tokenizer("river").input_ids
    save_packed(loaded, None, tmp_path / "again")  # the facts travel in config.json
    again, first = ((path / "README.md").read_text().replace(",", "") for path in (tmp_path / "again", directory))
    assert sorted(again.split()) == sorted(first.split())  # config.json sorts its keys


def test_model_card(packed: Make, tmp_path: Path) -> None:
    save_packed(packed("llama"), None, tmp_path / "a", card=CARD)
    text = (tmp_path / "a/README.md").read_text()
    for expected in (
        "base_model: someone/SmallLM",
        "library_name: transformers",
        "| wikitext2 | value 12.35, stderr 0.1 |",
        "| lr | 0.001 |",
        "1000 tokens",
        "per body weight",
        "per parameter of the whole model",
        "| commit | abc123 |",
        f"| torch | {torch.__version__} |",
        "| bimos | ",
    ):
        assert expected in text, expected
    card = {"base_model": str(tmp_path / "a")}
    save_packed(packed("llama"), None, tmp_path / "b", card=card)
    text = (tmp_path / "b/README.md").read_text()
    assert str(tmp_path) not in text and "base_model" not in text and "Not measured" in text


def test_a_plain_save_has_a_card(packed: Make, tmp_path: Path) -> None:
    packed("llama", card=CARD).save_pretrained(tmp_path / "a")
    text = (tmp_path / "a/README.md").read_text()
    assert "base_model: someone/SmallLM" in text and "per body weight" in text
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))
    again.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b/README.md").exists()
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/README.md").read_text().splitlines()[-12:] == text.splitlines()[-12:]
    AutoModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "base")
    assert "per body weight" in (tmp_path / "base/README.md").read_text()


def test_a_card_is_replaced_and_a_readme_is_not(packed: Make, tmp_path: Path) -> None:
    save_packed(packed("llama"), None, tmp_path / "a", card=CARD)
    assert "| wikitext2 |" in (tmp_path / "a/README.md").read_text()
    packed("llama", experts=1).save_pretrained(tmp_path / "a")
    text = (tmp_path / "a/README.md").read_text()
    assert "| wikitext2 |" not in text and "Not measured" in text
    (tmp_path / "a/README.md").write_text("My own.")
    packed("llama").save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "My own."
    verify(tmp_path / "a")


def test_what_cannot_have_a_card_is_saved_all_the_same(packed: Make, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path / "a", variant="other")
    assert (tmp_path / "a/model.other.safetensors").exists() and not (tmp_path / "a/README.md").exists()


def test_a_packed_model_ends_with_its_last_reference(packed: Make, tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path / "a")
    model = pickle.loads(pickle.dumps(copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))))
    model.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/README.md").exists()
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_refuses_to_overwrite(packed: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BimosError, match="is not empty; use another or --overwrite"):
        save_packed(packed("llama"), None, tmp_path)
    with pytest.raises(BimosError, match="is a file; name a directory"):
        check_output(tmp_path / "notes.txt", overwrite=True)
    with pytest.raises(BimosError, match="mount point"):
        check_output("/", overwrite=True)
    assert check_output(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    save_packed(packed("llama"), None, tmp_path / "empty")
    verify(tmp_path / "empty")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_dense_model_is_not_packed(dense: Make, tmp_path: Path) -> None:
    with pytest.raises(BimosError, match="not a packed model"):
        save_packed(dense("llama"), None, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("atomic", [True, False])
def test_overwriting_keeps_what_is_no_checkpoint(atomic: bool, packed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    save_packed(packed("llama"), None, tmp_path / "a", max_shard_size="5KB")
    (tmp_path / "a/state").mkdir()
    (tmp_path / "a/state/step.json").write_text("3")
    (tmp_path / "a/train.log").write_text("line")
    save_packed(packed("llama", seed=1), None, tmp_path / "a", overwrite=True)
    verify(tmp_path / "a")
    assert (tmp_path / "a/state/step.json").read_text() == "3" and (tmp_path / "a/train.log").read_text() == "line"
    assert not list((tmp_path / "a").glob("model-*")) and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on the disk while saving"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left on the disk"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "cannot save '.*': Permission denied"),
        (SafetensorError("something else"), "cannot save '.*': something else"),
    ],
    ids=["full", "full-safetensors", "permission", "other"],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_save_that_fails_changes_nothing(
    error: Exception, message: str, overwrite: bool, packed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed("llama")
    before = {}
    if overwrite:
        save_packed(model, None, tmp_path / "a")
        before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def fail(tensors: Any, filename: str, **kwargs: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(BimosError, match=message) as caught:
        save_packed(packed("llama", seed=1), None, tmp_path / "a", overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if overwrite else [])
    assert before == ({path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} if overwrite else {})


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a handle is")
def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda h: (events.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    with written_aside(tmp_path / "a") as aside:
        (aside / "sub").mkdir()
        (aside / "sub/file").write_text("x")
    where = events.index("rename")
    assert {str(aside / "sub/file"), str(aside / "sub"), str(aside)} <= set(events[:where])
    assert events[where + 1 :] == [str(tmp_path)]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    for error in (RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), written_aside(tmp_path / "a") as aside:
            (aside / "config.json").write_text("{}")
            raise error
    assert not list(tmp_path.iterdir())


# Forks a child for every step of a save over an old checkpoint, and kills it there.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import bimos
from bimos.packing import card, checkpoint
from bimos.packing.checkpoint import save_packed
from bimos.packing.integrity import verify
directory, other, together = sys.argv[1:]
if together == "two":
    checkpoint._exchange = lambda a, b: False
model = AutoModelForCausalLM.from_pretrained(other)

def same(saved, path):  # tensors, not bytes: the order of metadata in a safetensors file is random
    tensors = load_file(path)
    return tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in tensors)

def save(kill_at):
    steps = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    os.fsync = lambda handle: None  # a step, but no time: a kill loses nothing that the system has
    steps_of = ((os, "fsync"), (os, "rename"), (checkpoint, "_exchange"), (card, "size_report"), (checkpoint.shutil, "rmtree"))
    for holder, name in steps_of:
        setattr(holder, name, counted(getattr(holder, name)))
    save_packed(model, None, directory, overwrite=True)

for kill_at in range(1, 100):
    child = os.fork()
    if child == 0:
        save(kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    checkpoint.recover(Path(directory))
    verify(directory)
    saved = load_file(Path(directory) / "model.safetensors")
    print(kill_at, os.WTERMSIG(status), "old" if same(saved, Path(directory + ".copy")) else
          "new" if same(saved, Path(other) / "model.safetensors") else "neither",
          sorted(p.name for p in Path(directory).iterdir()) == sorted(p.name for p in Path(other).iterdir()), flush=True)
    if os.WIFEXITED(status):
        break
"""


@pytest.mark.parametrize("steps", ["one", "two"])
def test_killed_at_every_step(steps: str, packed: Make, tmp_path: Path) -> None:
    """Whether directories can change places in one step or not."""
    save_packed(packed("llama"), None, tmp_path / "a")
    save_packed(packed("llama", seed=1), None, tmp_path / "b")
    (tmp_path / "a.copy").write_bytes((tmp_path / "a/model.safetensors").read_bytes())
    assert not torch.equal(*(load_file(tmp_path / f"{x}/model.safetensors")["model.norm.weight"] for x in "ab"))
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "a"), str(tmp_path / "b"), steps], capture_output=True, text=True, timeout=250
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) > 10, run.stderr
    assert all(line[1] == str(int(signal.SIGKILL)) for line in lines[:-1]) and lines[-1][1] == "0"
    found = [line[2] for line in lines]
    assert set(found) == {"old", "new"} and found == sorted(found, reverse=True)  # old until it is new, nothing between
    assert all(line[3] == "True" for line in lines)
    verify(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.copy", "b"]  # the last save cleaned up


def test_config_of_a_save_is_json_that_others_read(packed: Make, tmp_path: Path) -> None:
    save_packed(packed("qwen2", embedding_bits=8), None, tmp_path / "a", card=CARD)
    quantization = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert quantization["card"] == CARD and quantization["modules_to_not_convert"] == ["lm_head"]
