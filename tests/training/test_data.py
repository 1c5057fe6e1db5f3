"""The token stream: what windows hold, and that they depend on spec, tokenizer, seed and length alone."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from bimos.errors import BimosError
from bimos.training.data import DocumentTokens, TokenStream

LENGTH = 32


@pytest.fixture
def corpus(tmp_path: Path, text: str) -> Path:
    """A folder with `plain.jsonl` (100 documents), `other.jsonl` (40) and `book.txt` (80,000 characters)."""
    rows = text.split("\n")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"{i}: {row}"}) + "\n" for i, row in enumerate(rows)))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"Other {i}. {row}"}) + "\n" for i, row in enumerate(rows[:40])))
    (tmp_path / "book.txt").write_text(text * 4)
    return tmp_path


def stream(
    corpus: Path, spec: str, tokenizer: PreTrainedTokenizerFast, cache: str = "cache", seed: int = 0, length: int = LENGTH
) -> TokenStream:
    spec = ",".join(str(corpus / part) for part in spec.split(","))
    return TokenStream(spec, tokenizer, length, seed, corpus / cache)


def test_windows_are_the_documents_with_eos_between_epoch_after_epoch(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = stream(corpus, "plain.jsonl", tokenizer)
    documents = [json.loads(line)["text"] for line in (corpus / "plain.jsonl").open()]
    epoch = sum(len(tokenizer(text).input_ids) + 1 for text in documents)
    tokens = windows.batch(0, -(-2 * epoch // LENGTH)).flatten().tolist()
    orders = []
    for start in (0, epoch):
        *texts, rest = tokenizer.decode(tokens[start : start + epoch]).split("</s>")
        assert rest == "" and sorted(texts) == sorted(documents)
        orders.append(texts)
    assert orders[0] != orders[1] and orders[0] != documents


def test_how_often_windows_repeat_their_text(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Measured by what was read, whoever read it: windows that another run made of the same text change nothing."""
    windows = stream(corpus, "plain.jsonl", tokenizer)
    epoch = sum(len(tokenizer(json.loads(line)["text"]).input_ids) + 1 for line in (corpus / "plain.jsonl").open())
    count = -(-5 * epoch // LENGTH)
    for made in (count, 3 * count):
        windows.prepare(made)
        (rounds,) = windows.rounds(count).values()
        assert rounds == pytest.approx(5, abs=0.2)
    twice = stream(corpus, "plain.jsonl:0.5,plain.jsonl:0.5", tokenizer).rounds(count)
    assert list(twice.values()) == pytest.approx([5], abs=0.3)
    assert stream(corpus, "book.txt", tokenizer).rounds(0) == {str(corpus / "book.txt"): 0}
    assert set(stream(corpus, "plain.jsonl", tokenizer, "not yet").rounds(1).values()) == {0}


def test_shapes(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = stream(corpus, "plain.jsonl", tokenizer)
    assert windows.window(7).dtype == torch.int64 and windows.window(7).shape == (LENGTH,)
    assert windows.batch(5, 3).shape == (3, LENGTH) and torch.equal(windows.batch(5, 3)[2], windows.window(7))
    with pytest.raises(IndexError):
        windows.window(-1)


@pytest.mark.parametrize("spec", ["book.txt", "plain.jsonl:0.6,other.jsonl:0.1,book.txt:0.3"])
def test_windows_do_not_depend_on_what_was_read_before(spec: str, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = stream(corpus, spec, tokenizer).batch(0, 300)
    backwards = stream(corpus, spec, tokenizer, "another cache")
    assert torch.equal(torch.stack([backwards.window(i) for i in range(299, -1, -1)]).flip(0), expected)
    assert torch.equal(stream(corpus, spec, tokenizer).batch(100, 50), expected[100:150])  # from the cache that is there


def test_windows_do_depend_on_seed_and_length(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    streams = [
        stream(corpus, "plain.jsonl:1,book.txt:1", tokenizer),
        stream(corpus, "plain.jsonl:1,book.txt:1", tokenizer, seed=-1),
        stream(corpus, "plain.jsonl:1,book.txt:2", tokenizer),
        stream(corpus, "plain.jsonl:1,book.txt:1", tokenizer, length=16),
    ]
    assert len({s.fingerprint for s in streams}) == 4
    assert streams[0].fingerprint == stream(corpus, "plain.jsonl:2,book.txt:2", tokenizer, "elsewhere").fingerprint
    assert not torch.equal(streams[0].batch(0, 8), streams[1].batch(0, 8))
    assert torch.equal(stream(corpus, "book.txt", tokenizer).window(0)[:16], stream(corpus, "book.txt", tokenizer, length=16).window(0))


def test_a_changed_file_is_read_anew(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before = stream(corpus, "book.txt", tokenizer).window(0)
    (corpus / "book.txt").write_text("Quite another text. " * 1000)
    assert "another" in tokenizer.decode(stream(corpus, "book.txt", tokenizer).window(0))
    assert not torch.equal(before, stream(corpus, "book.txt", tokenizer).window(0))


def test_the_same_windows_in_another_process(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = "plain.jsonl:0.6,book.txt:0.4"
    tokenizer.save_pretrained(corpus / "tokenizer")
    code = """if True:
        import sys, torch
        from pathlib import Path
        from transformers import AutoTokenizer
        from bimos.training.data import TokenStream
        folder = Path(sys.argv[1])
        spec = ",".join(str(folder / part) for part in sys.argv[2].split(","))
        stream = TokenStream(spec, AutoTokenizer.from_pretrained(folder / "tokenizer"), 32, 0, folder / "there")
        print(stream.fingerprint)
        torch.save(stream.batch(0, 200), folder / "windows.pt")
    """
    there = subprocess.run([sys.executable, "-c", code, corpus, spec], check=True, capture_output=True, text=True).stdout
    here = stream(corpus, spec, tokenizer)
    assert there.strip() == here.fingerprint
    assert torch.equal(torch.load(corpus / "windows.pt"), here.batch(0, 200))


def test_weights_are_shares_of_the_windows(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = stream(corpus, "plain.jsonl:0.7,other.jsonl:0.1,book.txt:0.2", tokenizer)
    count = 40_000
    places = [windows._locate(index) for index in range(9000)]
    assert np.abs(windows._counts(count) / count - [0.7, 0.1, 0.2]).max() < 4 * np.sqrt(0.25 / count)
    seen: Counter[int] = Counter()
    for source, position in places:  # no window of a source is skipped or given twice
        assert position == seen[source]
        seen[source] += 1
    assert [seen[source] for source in range(3)] == windows._counts(9000).tolist()


def test_a_mix_gives_each_source_s_windows_in_their_order(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    mixed = stream(corpus, "plain.jsonl:0.5,other.jsonl:0.5", tokenizer)
    alone = [stream(corpus, name, tokenizer) for name in ("plain.jsonl", "other.jsonl")]
    seen = [0, 0]
    for index in range(60):
        source = mixed._locate(index)[0]
        assert torch.equal(mixed.window(index), alone[source].window(seen[source]))
        seen[source] += 1
    assert min(seen) > 15


def test_only_what_is_asked_for_is_tokenised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text(text * 150)  # 3 MB
    handed: list[int] = []
    produce = DocumentTokens.produce

    def counting(self: DocumentTokens, cursor: dict) -> tuple:
        handed.append(sum(map(len, self.pieces.texts(cursor)[0])))
        return produce(self, cursor)

    monkeypatch.setattr(DocumentTokens, "produce", counting)
    windows = stream(tmp_path, "long.txt", tokenizer)
    assert handed == []
    windows.window(0)
    assert sum(handed) < 0.1 * 150 * len(text)
    windows.batch(0, 50)
    assert len(handed) == 1


def test_a_data_loader_reads_it_with_and_without_workers(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = stream(corpus, "plain.jsonl:0.5,book.txt:0.5", tokenizer)
    expected = stream(corpus, "plain.jsonl:0.5,book.txt:0.5", tokenizer, "another").batch(10, 24)
    dataset = windows.as_dataset(10, 24)
    assert len(dataset) == 24 and len(list(dataset)) == 24
    for workers in (0, 2):
        loaded = torch.cat([batch["input_ids"] for batch in DataLoader(dataset, batch_size=4, num_workers=workers)])
        assert torch.equal(loaded, expected)
    assert torch.equal(pickle.loads(pickle.dumps(windows)).batch(10, 24), expected)
    with pytest.raises(IndexError):
        dataset[24]


def test_prepare_reports_its_progress(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    windows = stream(corpus, "plain.jsonl:0.5,book.txt:0.5", tokenizer)
    calls: list[tuple[int, int]] = []
    windows.prepare(2000, lambda done, total: calls.append((done, total)))
    assert {total for _, total in calls} == {2000 * LENGTH} and calls[-1][0] == 2000 * LENGTH
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and len(calls) > 3


def test_bos_is_written_where_the_tokenizer_writes_it_and_never_twice(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(corpus / "tokenizer")
    with_bos = PreTrainedTokenizerFast.from_pretrained(corpus / "tokenizer")
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos.chat_template = "<s>{% for message in messages %}{{ message['content'] }}</s>\n{% endfor %}"
    (corpus / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "A mile."}]}) + "\n")
    chat = with_bos.decode(stream(corpus, "chat.jsonl", with_bos).window(0))
    assert chat.startswith("<s>A mile.</s>\n<s>A mile.</s>\n")  # nor is EOS, which the template wrote
    plain = with_bos.decode(stream(corpus, "plain.jsonl", with_bos, length=1000).window(0))
    assert plain.startswith("<s>") and plain.count("</s><s>") == plain.count("<s>") - 1 > 3


def test_large_vocabularies_are_kept_in_four_bytes(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(corpus / "tokenizer")
    large = PreTrainedTokenizerFast.from_pretrained(corpus / "tokenizer")
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    (corpus / "tokens.txt").write_text("<65535>" * 100)
    window = stream(corpus, "tokens.txt", large).window(0)
    assert set(window.tolist()) == {large.convert_tokens_to_ids("<65535>")} and window.max() > 2**16


def test_self_needs_a_teacher(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BimosError, match="sampled from the teacher"):
        TokenStream("self", tokenizer, LENGTH, 0, corpus)


@pytest.mark.parametrize("step", [1, 2, 4])  # the first file that takes its final name is the pieces', the others are progress
def test_killed_in_mid_extension(step: int, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = stream(corpus, "book.txt", tokenizer, "undisturbed").batch(0, 4000)

    def work() -> None:
        calls = itertools.count(1)

        def replace(source: Path, target: Path) -> None:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        real, os.replace = os.replace, replace
        stream(corpus, "book.txt", tokenizer).prepare(4000)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert torch.equal(stream(corpus, "book.txt", tokenizer).batch(0, 4000), expected)
