"""The engine: packed models of the Llama family decoded in C++ (`csrc/engine/`), without Python between layers.

    engine = Engine.from_pretrained("smollm2-1bit")
    print(engine.generate("The lighthouse"))
    for piece in engine.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)

Llama, SmolLM, Mistral, Qwen2 and Qwen3; what it does not cover `refusal` says, and `transformers` runs. Everything is float32 but keys
and values (bfloat16, or int8 where asked for) and the tables of the products (16 bits), whatever the checkpoint's dtype.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bimos.errors import BimosError
from bimos.generation import Sampling, Streamer
from bimos.kernels import native
from bimos.packing import mapped
from bimos.packing.embedding import Int8Embedding, Int8Head, TiedInt8Head, quantize_rows
from bimos.packing.family import MODEL_TYPES, Unknown
from bimos.packing.groups import product_form
from bimos.packing.linear import ACTIVATIONS, PackedLinear
from bimos.tokens import load_tokenizer

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length
SETTINGS = (  # of transformers' generate, that change what is said and that the engine does not have
    *("no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "min_new_tokens", "min_length", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "encoder_repetition_penalty", "exponential_decay_length_penalty"),
)
PARTS = ("products", "tables", "scales", "router", "attention", "head", "rest", "waiting")  # csrc/spent.h
KEPT = 4  # sequences whose beginnings later prompts may share
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def refusal(model: Any) -> str | None:
    """Why the engine cannot run a loaded model; None if it can."""
    config = model.config
    if native.isa() is None:
        return f"no C++ kernels ({native.problem})"
    if config.model_type not in MODEL_TYPES:
        return f"architecture {config.model_type}"
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in (config.max_position_embeddings, config.vocab_size)):
        return f"max_position_embeddings {config.max_position_embeddings!r}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope not in ROTARY_TYPES:
        return f"rotary embedding {rope}"
    for block in model.model.layers:
        for name in _LINEARS:
            layer = block.get_submodule(name)
            if not isinstance(layer, PackedLinear):
                return f"{name} is not packed"
            if layer.salient is not None or layer.sparse_mask is not None:
                return "salient weights beside the planes"
            if any(t.dtype != torch.float16 for n, t in layer.tensors().items() if n not in ("weight", "bias")):
                return "scales that are not float16"
            if layer.group_size is not None and layer.group_size % 32:
                return "groups that are no multiple of 32"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "a head with a bias"
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return "a device other than the CPU"
    for setting in SETTINGS:
        if getattr(model.generation_config, setting, None):
            return f"generation_config.json asks for {setting}"
    return None


def is_engine_model(model: Any) -> bool:
    """Whether the engine runs a loaded model."""
    return refusal(model) is None


def load(directory: str | Path) -> Any:
    """What `Engine` takes, out of a checkpoint directory: mapped where its config is in the form that bimos writes, else loaded.

    Raises:
        BimosError: no such checkpoint, or a corrupt one.
    """
    path = Path(directory).expanduser()
    if (path / "config.json").is_file():
        with suppress(Unknown):
            return mapped.load(path)
    from bimos.models import load_model

    return load_model(directory)


def check_options(head_bits: int | None, cache_bits: int, activation: str) -> None:
    """Raises BimosError: what an engine's head, cache or products cannot have."""
    if head_bits not in (None, 8, 4):
        raise BimosError(f"--head-bits {head_bits}: must be 8 or 4")
    if cache_bits not in (16, 8):
        raise BimosError(f"--cache-bits {cache_bits}: must be 16 or 8")
    if activation not in ACTIVATIONS:
        raise BimosError(f"activation '{activation}' is not known; known: {', '.join(ACTIVATIONS)}")


def refuse_bits(head_bits: int | None, cache_bits: int, why: str) -> None:
    """Raises BimosError: bits that only the engine has, asked for a model that it does not run."""
    if head_bits is not None or cache_bits != 16:
        raise BimosError(f"--head-bits and --cache-bits are the engine's, and it does not run this model ({why}): leave them out")


class Engine:
    """A packed model ready to decode. Several threads may use it: their calls take turns."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        threads: int | None = None,
        head_bits: int | None = None,
        cache_bits: int = 16,
        activation: str = "exact",
    ) -> None:
        """Takes what it needs out of a model that transformers or `load` loaded.

        Args:
            head_bits: 8 or 4 bits a weight of the head, whatever the checkpoint has; None: as it is there. The embedding stays as it is.
            cache_bits: of keys and values: 16 (bfloat16) or 8 (int8 with a scale for every position of a head).
            activation: "exact", or "int8": see `bimos.kernels.packed_linear`.

        Raises:
            BimosError: the engine does not cover this model.
        """
        reason = refusal(model)
        if reason:
            raise BimosError(f"the engine does not run this model ({reason}); use transformers' generate")
        if threads is not None and not 1 <= threads <= 1024:
            raise BimosError(f"threads={threads}: must be from 1 to 1024")
        check_options(head_bits, cache_bits, activation)
        self.tokenizer = tokenizer
        self.config = model.config
        stop = model.generation_config.eos_token_id
        self.stop = set(stop if isinstance(stop, list) else [] if stop is None else [stop])
        tensors, numbers = _weights(model, head_bits)
        epsilon, scale = float(model.config.rms_norm_eps), float(getattr(model.model.rotary_emb, "attention_scaling", 1.0))
        options = threads or torch.get_num_threads(), cache_bits, activation == "int8", head_bits == 4
        try:
            self._id = torch.ops.bimos.engine_new(tensors, numbers, epsilon, scale, *options)
        except RuntimeError as error:  # sizes that no model of `refusal` has
            raise BimosError(f"the engine does not take this model: {str(error).splitlines()[0]}") from None
        weakref.finalize(self, torch.ops.bimos.engine_free, self._id)
        if head_bits == 4:
            self._quantize_head(model.get_output_embeddings())
        self._kept: list[int] = []
        self._choosing = threading.Lock()

    @classmethod
    def from_pretrained(cls, directory: str | Path, threads: int | None = None, **options: Any) -> Self:
        """An engine for a packed checkpoint, whose files are mapped: nothing but what decoding reads in another order is copied.

        `options` are `head_bits`, `cache_bits` and `activation`.

        Raises:
            BimosError: no such checkpoint, a corrupt one, or one that the engine does not cover.
        """
        return cls(load(directory), load_tokenizer(directory), threads, **options)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits `[len(ids), vocabulary]`, float32, behind every token of a text.

        Raises:
            BimosError: a token that the model does not know, or too many.
        """
        self._check(ids)
        sequence = torch.ops.bimos.engine_open(self._id)
        try:
            logits: Tensor = torch.ops.bimos.engine_read(self._id, list(ids), [sequence] * len(ids), True)
            return logits
        finally:
            torch.ops.bimos.engine_close(self._id, sequence)

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: bool = True) -> Iterator[list[int | None]]:
        """Continue several prompts at once: at every step the next token of each, None where one has ended.

        What a prompt shares with an earlier one, or with one beside it, is not computed again.

        Args:
            prompts: token ids; none empty.
            sampling: prompt i has `sampling.seed + i`.
            stop: whether the model's end-of-text tokens end a sequence.

        Raises:
            BimosError: an empty prompt, or one that leaves no room for new tokens.
        """
        for prompt in prompts:
            if not prompt:
                raise BimosError("the prompt is empty: give some text to continue")
            self._check(prompt, sampling.max_new_tokens)
        seed = int(torch.randint(2**31, ())) if sampling.seed is None else sampling.seed
        options = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty]
        opened: list[int] = []
        try:
            for prompt in prompts:
                self._begin(list(prompt), opened)
            last = [prompt[-1] for prompt in prompts]
            active = list(range(len(prompts)))
            for _ in range(sampling.max_new_tokens):
                reading = [last[i] for i in active], [opened[i] for i in active]
                picked = torch.ops.bimos.engine_next(self._id, *reading, options, sampling.top_k, [seed + i for i in active])
                if -1 in picked:
                    raise BimosError("the model's logits are not finite: its weights are damaged; get the checkpoint again")
                step: list[int | None] = [None] * len(prompts)
                for i, token in zip(active, picked, strict=True):
                    if not (stop and token in self.stop):
                        step[i] = last[i] = token
                active = [i for i in active if step[i] is not None]
                if not active:
                    return
                yield step
        finally:
            self._keep(opened)

    def spent(self, go_on: bool) -> dict[str, float]:
        """Seconds that one of the engine's threads spent on every part of its work, counted since the last call that asked to `go_on`.

        Waiting is for other threads. Counting costs some hundredths of a step.
        """
        seconds = torch.ops.bimos.engine_spent(self._id, go_on)
        return dict(zip(PARTS, seconds, strict=True))

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Iterator[str]:
        """What follows `prompt`, piece by piece, each as soon as it forms whole words.

        Raises:
            BimosError: see `tokens`.
        """
        ids = self._ids(prompt) if isinstance(prompt, str) else list(prompt)
        pieces: list[str] = []
        streamer = Streamer(self.tokenizer, pieces.append)
        streamer.put(torch.tensor(ids))  # which it skips
        for (token,) in self.tokens([ids], sampling or Sampling()):
            streamer.put(torch.tensor([token]))
            yield from pieces
            pieces.clear()
        streamer.end()
        yield from pieces

    def generate(self, prompt: str | list[str], sampling: Sampling | None = None) -> str | list[str]:
        """What follows a prompt; or, of several, what follows each, decoded side by side.

        Raises:
            BimosError: see `tokens`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        continued: list[list[int]] = [[] for _ in prompts]
        for step in self.tokens([self._ids(text) for text in prompts], sampling or Sampling()):
            for ids, token in zip(continued, step, strict=True):
                if token is not None:
                    ids.append(token)
        texts: list[str] = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in continued]
        return texts[0] if isinstance(prompt, str) else texts

    def chat(self, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to a conversation `[{"role": ..., "content": ...}]` by the model's chat template, piece by piece."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.stream(self.tokenizer(text, add_special_tokens=False)["input_ids"], sampling)

    def _quantize_head(self, head: Any) -> None:
        """To 4 bits. A few of its inputs are much larger than the others whatever the text: tokens from all over the vocabulary tell."""
        ops, size = torch.ops.bimos, self.config.vocab_size
        ids = torch.linspace(0, size - 1, min(64, self.config.max_position_embeddings)).long().tolist()
        importance = ops.engine_squares(self._id, ids) if len(ids) > 1 else None
        weight, scale = _table(head, None)
        ops.engine_head(self._id, *native.quantize_int4(weight, scale if scale.numel() else None, importance))

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise BimosError("this engine has no tokenizer: give it one, or token ids instead of text")
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _check(self, ids: Sequence[int], more: int = 0) -> None:
        """Raises BimosError: a token that is not in the vocabulary, or more tokens than the model has positions."""
        limit, size = self.config.max_position_embeddings, self.config.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise BimosError(f"token {token} is not in the model's vocabulary of {size}: use the model's own tokenizer")
        if len(ids) + more > limit:
            follow = f", and {more} are to follow" if more else ""
            raise BimosError(f"the prompt has {len(ids)} tokens{follow}: the model has {limit} positions")

    def _begin(self, prompt: list[int], opened: list[int]) -> None:
        """Add to `opened` a sequence that has read all of `prompt` but its last token."""
        ops, wanted = torch.ops.bimos, prompt[:-1]
        with self._choosing:
            shared = {sequence: _common(ops.engine_tokens(self._id, sequence), wanted) for sequence in (*self._kept, *opened)}
            best = max(shared, key=lambda sequence: shared[sequence], default=None)
            known = shared[best] if best is not None else 0
            if known and best in self._kept:
                self._kept.remove(best)
                sequence = best
            else:
                sequence = ops.engine_open(self._id)
            opened.append(sequence)  # before it reads: whoever interrupts that finds it there
            if known:
                ops.engine_keep(self._id, sequence, best, known)
        rest = wanted[known:]
        if rest:
            ops.engine_read(self._id, rest, [sequence] * len(rest), False)

    def _keep(self, sequences: list[int]) -> None:
        with self._choosing:
            self._kept += sequences
            for old in self._kept[:-KEPT]:
                torch.ops.bimos.engine_close(self._id, old)
            del self._kept[:-KEPT]


def windows(config: Any) -> list[int]:
    """How many positions each block sees, the token's own included; 0: all."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) or 0
    slides = [
        kinds[index] == "sliding_attention" if index < len(kinds) else config.model_type == "mistral"
        for index in range(config.num_hidden_layers)
    ]
    return [window if sliding else 0 for sliding in slides]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _weights(model: Any, head_bits: int | None = None) -> tuple[list[Tensor], list[int]]:
    """Tensors and numbers in the order in which `csrc/engine/ops.cpp` takes them."""
    config, inner = model.config, model.model
    none = torch.empty(0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = [config.vocab_size, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head]
    numbers += [config.intermediate_size, config.max_position_embeddings, len(inner.layers)]
    tensors: list[Tensor] = []
    for table, bits in ((model.get_input_embeddings(), None), (model.get_output_embeddings(), head_bits)):
        tensors += _table(table, bits)
    tensors += [inner.norm.weight.detach().float(), inner.rotary_emb.inv_freq.float()]
    for block, window in zip(inner.layers, windows(config), strict=True):
        numbers.append(window)
        tensors += [block.input_layernorm.weight.detach().float(), block.post_attention_layernorm.weight.detach().float()]
        for name in ("q_norm", "k_norm"):
            norm = getattr(block.self_attn, name, None)
            tensors.append(none if norm is None else norm.weight.detach().float())
        for name in _LINEARS:
            layer = block.get_submodule(name)
            numbers += [1 if layer.router is None else layer.router.shape[0], layer.group_size or 0]
            group, offset = product_form(layer.tensors())
            tensors += [layer.weight, *(none if t is None else t for t in (layer.scale_in, layer.scale_out, layer.router))]
            tensors += [none if group is None else group, none if offset is None else offset.T.contiguous()]
            tensors.append(none if layer.bias is None else layer.bias)
    return tensors, numbers


def _table(table: Any, bits: int | None) -> tuple[Tensor, Tensor]:
    """Rows of an embedding or a head, int8 where `bits` is 8, and their scales, float32; empty where they have none."""
    weight, scale = table.weight.detach(), table.scale if isinstance(table, Int8Embedding | Int8Head | TiedInt8Head) else None
    if bits == 8 and scale is None:
        weight, scale = quantize_rows(weight)
    return weight, torch.empty(0) if scale is None else scale.flatten().float()
