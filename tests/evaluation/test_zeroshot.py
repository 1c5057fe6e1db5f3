"""Zero-shot tasks on a task file of the test's own, against accuracies computed by hand, and on the real six where they are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bimos.datafolder import data_directory
from bimos.errors import BimosError
from bimos.evaluation.likelihoods import Scorer
from bimos.evaluation.zeroshot import ZEROSHOT6, _mean, zero_shot

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"question": "Is water wet", "choices": ["yes", "no, never"], "answer": 0},
    {"question": "Two and two", "choices": ["five or six or so", "four"], "answer": 1},
    {"question": "The sky", "choices": ["is blue", "x"], "answer": 0},
    {"question": "A cat", "choices": ["barks at the moon", "meows"], "answer": 1},
    {"question": "Snow", "choices": ["warm", "cold"], "answer": 1},
]
BASE = """\
task: base
dataset_path: json
dataset_kwargs:
  data_files:
    test: documents/questions.jsonl
output_type: multiple_choice
test_split: test
process_docs: !function helpers.unchanged
doc_to_text: "{{question}}:"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/questions.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    tasks = tmp_path / "lm_eval_tasks"
    tasks.mkdir()
    (tasks / "helpers.py").write_text("def unchanged(dataset):\n    return dataset\n")
    (tasks / "base.yaml").write_text(BASE)
    (tasks / "local_tiny.yaml").write_text("include: base.yaml\ntask: local_tiny\n")
    lost = "include: base.yaml\ntask: local_lost\ndataset_kwargs: {data_files: {test: documents/no.jsonl}}\n"
    (tasks / "local_lost.yaml").write_text(lost)
    return tasks


def by_hand(model, tokenizer, documents):
    """acc and acc_norm: the choice of largest log-likelihood, whole or by character."""
    right = [0, 0]
    for document in documents:
        whole, normed = [], []
        for choice in document["choices"]:
            prompt = tokenizer(document["question"] + ":")["input_ids"]
            answer = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            likelihood = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            whole.append(likelihood)
            normed.append(likelihood / len(choice))
        right[0] += whole.index(max(whole)) == document["answer"]
        right[1] += normed.index(max(normed)) == document["answer"]
    return right[0] / len(documents), right[1] / len(documents)


def test_accuracies_are_those_computed_by_hand(make_model, tokenizer, folder):
    model = make_model()
    here = os.getcwd()
    scores = zero_shot(model, tokenizer, ["tiny"], folder=folder)
    acc, acc_norm = by_hand(model, tokenizer, DOCUMENTS)
    assert acc != acc_norm  # else this test could not tell them apart
    assert list(scores) == ["tiny"]
    assert scores["tiny"]["acc"] == pytest.approx(acc) and scores["tiny"]["acc_norm"] == pytest.approx(acc_norm)
    assert scores["tiny"]["stderr"] == pytest.approx((acc * (1 - acc) / 4) ** 0.5)
    assert scores["tiny"]["n"] == 5
    assert os.getcwd() == here and tokenizer.pad_token is None


def test_limit_takes_the_first_documents_and_the_folder_comes_from_the_data_directory(make_model, tokenizer, folder, monkeypatch):
    monkeypatch.setenv("BIMOS_DATA", str(folder.parent))
    model = make_model().train()
    scores = zero_shot(model, tokenizer, ["tiny"], limit=2)["tiny"]
    assert scores["n"] == 2
    assert model.training
    assert scores["acc"] == pytest.approx(by_hand(model.eval(), tokenizer, DOCUMENTS[:2])[0])


def test_tokens_of_requests_are_kept(make_model, tokenizer, folder, tmp_path, monkeypatch):
    from bimos.evaluation.harness import Harness

    model, encoded = make_model(), []
    encode = Harness.tok_encode
    monkeypatch.setattr(
        Harness, "tok_encode", lambda self, text, *more, **options: encoded.append(text) or encode(self, text, *more, **options)
    )
    first = zero_shot(model, tokenizer, ["tiny"], folder=folder, cache=tmp_path / "cache")["tiny"]
    assert len(encoded) >= 2 * 10  # two choices of five documents, with and without their question
    encoded.clear()
    again = zero_shot(model, tokenizer, ["tiny"], folder=folder, cache=tmp_path / "cache")["tiny"]
    assert not encoded
    assert {key: again[key] for key in again if key != "seconds"} == {key: first[key] for key in first if key != "seconds"}
    (tmp_path / "cache/tiny.json").write_text("{")  # a damaged file costs time, nothing else
    assert zero_shot(model, tokenizer, ["tiny"], folder=folder, cache=tmp_path / "cache")["tiny"]["acc"] == first["acc"]
    assert encoded


@pytest.mark.parametrize("trees", [True, False])
def test_batches_hold_like_many_tokens_and_results_do_not_depend_on_them(make_model, tokenizer, folder, trees, monkeypatch):
    model, shapes = make_model(), []
    monkeypatch.setattr(Scorer, "reads", lambda *_: trees)
    hook = model.model.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    wide = zero_shot(model, tokenizer, ["tiny"], folder=folder, batch_tokens=10_000)["tiny"]
    assert len(shapes) == 2 + 1  # of the head, and whether it is a plain one
    shapes.clear()
    narrow = zero_shot(model, tokenizer, ["tiny"], folder=folder, batch_tokens=60)["tiny"]
    hook.remove()
    del shapes[:2]
    assert max(rows * length for rows, length in shapes) <= 60 and max(rows for rows, _ in shapes) > 1
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert sum(rows for rows, _ in shapes) == (5 if trees else 9)  # two choices of five documents; one begins the other
    assert (wide["acc"], wide["acc_norm"]) == (narrow["acc"], narrow["acc_norm"])
    assert wide["seconds"] > 0


def test_scores_are_told_task_by_task(make_model, tokenizer, folder):
    (folder / "local_small.yaml").write_text("include: base.yaml\ntask: local_small\n")
    told = []
    scores = zero_shot(make_model(), tokenizer, ["tiny", "small"], folder=folder, done=lambda name, found: told.append((name, found)))
    assert told == list(scores.items()) and [name for name, _ in told] == ["tiny", "small"]


def test_missing_documents_are_one_line(make_model, tokenizer, folder):
    with pytest.raises(BimosError, match="'lost'") as caught:
        zero_shot(make_model(), tokenizer, ["lost"], folder=folder)
    assert "\n" not in str(caught.value)


def test_bad_requests_are_refused(make_model, tokenizer, folder):
    with pytest.raises(BimosError, match="limit=0"):
        zero_shot(None, None, ["tiny"], limit=0, folder=folder)
    with pytest.raises(BimosError, match="no folder"):
        zero_shot(None, None, ["tiny"], folder=folder / "no")
    with pytest.raises(BimosError, match="no zero-shot task"):
        zero_shot(None, None, [])


def test_unknown_task_is_refused_before_the_model_is_touched(folder, monkeypatch):
    import lm_eval.tasks

    index = lm_eval.tasks.TaskManager  # without its own thousands of files, which take ten seconds to index
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: index(None, include_path, False))
    with pytest.raises(BimosError, match="unknown zero-shot task 'boolqq'"):
        zero_shot(None, None, ["boolqq"], folder=folder)


def test_without_lm_eval_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BimosError, match="pip install"):
        zero_shot(None, None)


def test_mean_uses_acc_where_there_is_no_acc_norm():
    scores = [
        {"acc": 0.5, "acc_norm": None, "stderr": 0.03, "acc_norm_stderr": None, "n": 10, "seconds": 2.0},
        {"acc": 0.2, "acc_norm": 0.4, "stderr": 0.04, "acc_norm_stderr": 0.04, "n": 20, "seconds": 3.0},
    ]
    mean = _mean(scores)
    assert mean == pytest.approx({"acc": 0.35, "acc_norm": 0.45, "stderr": 0.025, "acc_norm_stderr": 0.025, "n": 30, "seconds": 5.0})


def test_the_real_tasks_run_without_network(make_model, tokenizer, monkeypatch):
    data = data_directory()
    if data is None or not (data / "lm_eval_tasks").is_dir():
        pytest.skip("no evaluation data: set BIMOS_DATA")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("tried the network"))
    scores = zero_shot(make_model(max_position_embeddings=4096), tokenizer, ["zeroshot6", "lambada"], limit=2)
    assert set(scores) == {*ZEROSHOT6, "lambada_openai", "zeroshot6"}
    assert scores["zeroshot6"]["n"] == 12
    assert scores["zeroshot6"]["acc"] == pytest.approx(sum(scores[name]["acc"] for name in ZEROSHOT6) / 6)
    assert scores["boolq"]["acc_norm"] is None and scores["piqa"]["acc_norm"] is not None
