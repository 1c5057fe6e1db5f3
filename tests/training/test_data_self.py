"""`--data self`: text sampled from a tiny teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from bimos.errors import BimosError
from bimos.training import selfdata
from bimos.training.data import TokenStream
from bimos.training.selfdata import SelfSamples, _draw, chat_turns, teacher_digest

LENGTH = 48
BOS, EOS = 0, 1


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfdata, "MAX_BATCH", 4)


@pytest.fixture
def teacher(teacher_directory: Path) -> LlamaForCausalLM:
    """The tiny Llama, its logits spread so that likeliest and sampled tokens differ but the text is no noise."""
    model = AutoModelForCausalLM.from_pretrained(teacher_directory)
    model.model.norm.weight.data *= 6
    return model.eval()


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")


def samples(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0, batch: int = 0) -> torch.Tensor:
    tokens, cursor = SelfSamples(teacher, tokenizer, LENGTH, seed, 320).produce({"batch": batch})
    assert cursor == {"batch": batch + 1}
    return torch.from_numpy(tokens).view(4, LENGTH)


def test_deterministic_from_the_seed_and_resumable(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = TokenStream("self", tokenizer, LENGTH, 3, tmp_path / "one", teacher).batch(0, 12)
    torch.rand(5)  # the global generator has no part in it
    again = TokenStream("self", tokenizer, LENGTH, 3, tmp_path / "two", teacher)
    calls: list[tuple[int, int]] = []
    again.prepare(3, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (3 * LENGTH, 3 * LENGTH)
    assert torch.equal(TokenStream("self", tokenizer, LENGTH, 3, tmp_path / "two", teacher).batch(0, 12), expected)
    assert torch.equal(again.batch(4, 4), samples(teacher, tokenizer, 3, 1))
    assert not torch.equal(TokenStream("self", tokenizer, LENGTH, 4, tmp_path / "two", teacher).batch(0, 4), expected[:4])
    assert len({tuple(window.tolist()) for window in expected}) == 12


def test_what_is_cached_is_not_sampled_again(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = TokenStream("self", tokenizer, LENGTH, 0, tmp_path, teacher).batch(0, 4)
    teacher.forward = None
    assert torch.equal(TokenStream("self", tokenizer, LENGTH, 0, tmp_path, teacher).batch(0, 4), expected)


def test_another_teacher_gives_another_cache(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = TokenStream("self", tokenizer, LENGTH, 0, tmp_path, teacher)
    before = teacher_digest(teacher)
    teacher.model.layers[1].mlp.up_proj.weight.data *= 1.5
    assert teacher_digest(teacher) != before
    assert TokenStream("self", tokenizer, LENGTH, 0, tmp_path, teacher).fingerprint != first.fingerprint


def test_plain_samples_are_greedy_first_and_follow_the_teacher(teacher: LlamaForCausalLM, plain: PreTrainedTokenizerFast) -> None:
    """Rerun without a cache, one sequence at a time: the first 3 to 5 chosen tokens are the likeliest, later ones often not."""
    tokens = torch.cat([samples(teacher, plain, seed) for seed in range(6)])
    agree = []
    for row in tokens:
        with torch.no_grad():
            likeliest = teacher(row[None]).logits[0, :-1].argmax(-1)
        agree.append(likeliest == row[1:])
    hits = torch.stack(agree)
    assert hits[:, :3].all()
    unbroken = [int(row.long().cumprod(0).sum()) for row in hits]
    assert min(unbroken) == 3 and hits[:, 8:].float().mean() < 0.9
    assert len(set(tokens[:, 0].tolist())) > 15 and not {BOS, EOS} & set(tokens[:, 0].tolist())


def test_sampled_tokens_have_the_teacher_s_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = _draw(probabilities.log().expand(20_000, 5), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / 20_000
    assert (share - probabilities).abs().max() < 0.02 and share[1] == share[4] == 0


def test_after_an_end_a_new_text_begins_that_sees_nothing_before(
    teacher: LlamaForCausalLM, plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = teacher.lm_head.weight.data.clone()
    teacher.lm_head.weight = torch.nn.Parameter(head)
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(320))
    teacher.lm_head.bias.data[EOS] = 8.0  # texts end often
    tokens = samples(teacher, plain)
    ends = (tokens[:, :-8] == EOS).nonzero()
    assert len(ends) > 4
    for row, end in ends.tolist():
        text = tokens[row, end + 1 : end + 6]  # a random token, then at least three greedy ones unless the text ends again
        with torch.no_grad():
            likeliest = teacher(text[None]).logits[0].argmax(-1)
        for position in range(3):
            assert text[position + 1] == likeliest[position]
            if text[position + 1] == EOS:
                break


def test_every_other_sample_is_a_chat(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    opening, between, again = chat_turns(tokenizer, {EOS}) or []
    assert tokenizer.decode(opening) == tokenizer.decode(again) == "<|user|>" and tokenizer.decode(between) == "<|assistant|>"
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.data.clone())
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(320))
    teacher.lm_head.bias.data[EOS] = 8.0
    tokens = samples(teacher, tokenizer)
    texts = [tokenizer.decode(row) for row in tokens]
    assert all("<|user|>" not in text for text in texts[::2])
    for text in texts[1::2]:
        assert text.startswith("<|user|>") and "</s><|assistant|>" in text
        turns = [turn for turn in text.split("</s>") if turn][:-1]  # the last may be cut off
        starts = ["<|user|>", "<|assistant|>"]
        assert all(turn.startswith(starts[number % 2]) for number, turn in enumerate(turns)) and len(turns) > 1


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}", ["<user>", "\n<assistant>", "\n<user>"]),
        ("{% for m in messages %}{{ '[Q]' if m.role == 'user' else '[A]' }}{{ m.content }}{% endfor %}</s>", ["[Q]", "[Q]"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_chat_turns_of_other_templates(template: str, texts: list[str] | None, plain: PreTrainedTokenizerFast) -> None:
    assert chat_turns(plain, {EOS}) is None
    plain.chat_template = template
    turns = chat_turns(plain, {EOS})
    assert (turns and [plain.decode(turn) for turn in turns]) == texts


def test_padded_vocabulary_is_never_sampled(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, _ = SelfSamples(teacher, tokenizer, LENGTH, 0, 200).produce({})
    assert tokens.max() < 320 and (torch.from_numpy(tokens).view(4, LENGTH)[::2] < 200).all()


def test_the_teacher_stays_as_it_was_and_must_see_the_length(teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher.train()
    samples(teacher, tokenizer)
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(BimosError, match="sees only 256 tokens"):
        SelfSamples(teacher, tokenizer, 257, 0, 320)


def test_batches_shrink_with_the_cache_they_need(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_sequence = 2 * 2 * 2 * 16 * 2 * LENGTH  # keys and values, blocks, heads, width, bytes, tokens
    monkeypatch.setattr(selfdata, "KEY_VALUE_BYTES", 3 * per_sequence)
    assert SelfSamples(teacher, tokenizer, LENGTH, 0, 320).batch == 3
    monkeypatch.setattr(selfdata, "KEY_VALUE_BYTES", 1)
    assert SelfSamples(teacher, tokenizer, LENGTH, 0, 320).batch == 1
