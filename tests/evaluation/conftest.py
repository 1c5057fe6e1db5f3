"""A byte-level tokenizer and tiny random models: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Llama whose logits are the plain head's, or Gemma 2 whose logits are soft-capped; weights large enough to matter."""

    def make(architecture: str = "llama", **options: object) -> PreTrainedModel:
        torch.manual_seed(0)
        if architecture == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0, **({"sliding_window": 64} | options)))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)
        return model.eval()

    return make
