"""Fixtures: a tokenizer, a teacher and texts small enough that a test takes a second, and no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads it once
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: Triton kernels then run on the CPU

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bimos.kernels import native
from levels import LEVELS

pytest_plugins = ["tiny_models", "commands"]

SENTENCES = [
    "The river is wide and slow, and in spring it covers the meadows.",
    "Nobody in the village remembers when the bridge was built.",
    "A ferry crosses twice a day, in the morning and at dusk.",
    "The harbour has a lighthouse, two piers and a market for fish.",
    "In winter the wind comes from the north and the boats stay on land.",
    "She wrote three books about birds and one about the stars.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices: threads cost more than they do


@pytest.fixture(params=[1, 4], ids=["one thread", "two lanes"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whatever the machine has: work on one thread, and on so many that batches are divided between two lanes."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


MULTIPLIES_BFLOAT16 = native._multiplies_bfloat16


@pytest.fixture(autouse=True)
def multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are those of a processor that does, whichever it is that tests run on."""
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: True)


@pytest.fixture
def this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, for what is compared with the work of other processes."""
    monkeypatch.setattr(native, "_multiplies_bfloat16", MULTIPLIES_BFLOAT16)


@pytest.fixture
def avx2_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work as on a processor that has AVX2 and no AVX-512: in float32, by tables."""
    highest = native.isa()
    if highest not in ("avx2", "avx512", "amx"):
        pytest.skip("this processor, or this build, has no AVX2")
    native.use_isa("avx2")
    monkeypatch.setattr(native, "_multiplies_bfloat16", lambda: False)
    yield
    native.use_isa(highest)


@pytest.fixture
def exact_kernels() -> Iterator[None]:
    """Kernels that are exact to float32 rounding, for what is compared that closely."""
    level = native.isa()
    if level:
        native.use_isa("scalar")
    yield
    if level:
        native.use_isa(level)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Work at every level that this processor has, and in plain torch where a test asks for `reference`."""
    highest = native.isa()
    if request.param == "reference":
        monkeypatch.setattr(native, "isa", lambda: None)
    else:
        native.use_isa(request.param)
    yield request.param
    if highest:
        native.use_isa(highest)


@pytest.fixture(scope="session")
def text() -> str:
    """Some twenty thousand characters of running text, the same every time."""
    return "\n".join(" ".join(SENTENCES[(i * k) % len(SENTENCES)] for k in (1, 5, 7)) for i in range(100))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens, `<s>`, `</s>` and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of two blocks with grouped-query attention and tied embeddings, saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**(sizes | more | {"pad_token_id": 1} | changes))).eval()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("texts") / "river.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_directory: Path, text_file: Path) -> tuple[dict[str, Any], Path]:
    """A run that went well: its result and its directory. Tests leave it as it is."""
    from bimos.quantize import run
    from running import config

    output = tmp_path_factory.mktemp("finished") / "model"
    return run(str(teacher_directory), output, config(text_file, tokens=4096), evaluate=[str(text_file)]), output
