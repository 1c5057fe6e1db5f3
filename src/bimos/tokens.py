"""Tokenizers that start at once: the `tokenizers` library on `tokenizer.json`, without `transformers`, whose import takes seconds.

Only where both say the same: files that `transformers` takes as they are. Everything else gets its `AutoTokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bimos.errors import BimosError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_KNOWN = {*_SPECIAL, "backend", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_max_length", "tokenizer_class"}
_AS_THEY_ARE = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that add nothing to tokenizer.json
_LARGEST = 100_000  # above, transformers looks for a wrong regular expression and mends it


def load_tokenizer(directory: str | Path) -> Any:
    """A tokenizer with what text in, text out and conversations need; quick where that is the same.

    Raises:
        BimosError: there is none, or it is damaged.
    """
    quick = FileTokenizer.of(Path(directory).expanduser())
    if quick is not None:
        return quick
    from bimos.models import load_tokenizer as load

    return load(directory)


class FileTokenizer:
    """`tokenizer(text)["input_ids"]`, `decode`, `apply_chat_template`: results are those of the `AutoTokenizer` of the directory."""

    def __init__(self, tokenizer: Any, special: dict[str, str], template: str | None) -> None:
        self._tokenizer, self._special, self.chat_template = tokenizer, special, template
        for name in _SPECIAL:
            setattr(self, name, special.get(name))
            setattr(self, f"{name}_id", tokenizer.token_to_id(special[name]) if name in special else None)

    @classmethod
    def of(cls, directory: Path) -> FileTokenizer | None:
        """None where `transformers` might read more, or something else, out of the files."""
        from tokenizers import Tokenizer

        try:
            settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            kind = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
            special = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
            if kind != "llama" or settings.get("tokenizer_class") not in _AS_THEY_ARE or settings.get("clean_up_tokenization_spaces"):
                return None
            if not set(settings) <= _KNOWN or not all(isinstance(token, str) for token in special.values()):
                return None
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            template = directory / "chat_template.jinja"
            text = template.read_text(encoding="utf-8") if template.is_file() else None
        except Exception:  # bare ones of the tokenizers library, too: transformers' loader then says what is wrong
            return None
        if (directory / "additional_chat_templates").exists() or not (text is None or _is_plain(text)):
            return None
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        plain = tokenizer.post_processor is not None and tokenizer.padding is None and tokenizer.truncation is None
        if not plain or not set(special.values()) <= added or tokenizer.get_vocab_size() > _LARGEST:
            return None
        return cls(tokenizer, special, text)

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> dict[str, Any]:
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if return_tensors is None:
            return {"input_ids": ids}
        import torch

        return {"input_ids": torch.tensor([ids], dtype=torch.int64)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False) -> str:
        """The conversation as text; `tokenize` must be False.

        Raises:
            BimosError: the model has no template, or it refuses these messages.
        """
        import jinja2

        if self.chat_template is None or tokenize:
            raise BimosError("this model has no chat template; give it text to continue")
        try:
            rendered = _environment().from_string(self.chat_template)
            return rendered.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._special
            )
        except jinja2.exceptions.TemplateError as error:
            raise BimosError(f"the model's chat template refuses this conversation: {' '.join(str(error).split())}") from None


def _is_plain(template: str) -> bool:
    """Whether a template uses only what `_environment` has, too."""
    return not any(word in template for word in ("generation %}", "generation -%}", "namespace", "dict(", "reasoning", "thinking"))


def _environment() -> Any:
    """As `transformers` sets it up, templates being untrusted code."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
