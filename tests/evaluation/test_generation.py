"""Samples of teacher and student."""

from __future__ import annotations

import torch

from bimos.evaluation.generation import compare_samples, complete


def test_greedy_continuation_without_the_prompt(make_model, tokenizer):
    model = make_model().train()
    tokens = tokenizer("Once upon", return_tensors="pt").input_ids
    expected = []
    for _ in range(12):  # the definition of greedy decoding, one token at a time and no cache
        with torch.no_grad():
            token = model.eval()(tokens).logits[0, -1].argmax()
        if token.item() in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
        expected.append(token.item())
        tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
    model.train()
    text = complete(model, tokenizer, "Once upon", max_new_tokens=12, repetition_penalty=1.0)
    assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(expected) > 3 and model.training


def test_chat_template_is_used_where_there_is_one(make_model, tokenizer):
    model = make_model()
    seen = []
    model.register_forward_pre_hook(lambda _, args, options: seen.append(options["input_ids"]), with_kwargs=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    complete(model, tokenizer, "Hi", max_new_tokens=1)
    complete(model, tokenizer, "Hi", max_new_tokens=1, chat=False)
    assert [tokenizer.decode(ids[0]) for ids in seen] == ["[user]Hi[a]", "Hi"]


def test_compare_samples_pairs_both_models(make_model, tokenizer):
    teacher, student = make_model(), make_model("gemma2")
    samples = compare_samples(teacher, student, tokenizer, ["a", "b"], max_new_tokens=4)
    assert [sample["prompt"] for sample in samples] == ["a", "b"]
    for name, model in (("teacher", teacher), ("student", student)):
        assert samples[1][name] == complete(model, tokenizer, "b", max_new_tokens=4)
    assert any(sample["teacher"] != sample["student"] for sample in samples)
