"""lm_eval's view of a model that is loaded: shared beginnings read once, batches of like volume, and tokens kept between runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from bimos.evaluation.likelihoods import Answer, Scorer
from bimos.evaluation.prefixes import Scored
from bimos.evaluation.versions import write_text

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # context and continuation as text, and the tokens of each


class Harness(HFLM):
    """As lm_eval's own, but for how requests go through the model: shared beginnings once, and like many tokens at a time.

    Args:
        batch_tokens: of a forward pass, padding included: few long requests or many short ones, so that memory and speed stay the same.
        cache: folder for the tokens of requests, which depend on the tokenizer alone; a folder for every tokenizer. None: none are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, cache: Path | None) -> None:
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer))  # a copy, because it sets a padding token
        self.batch_size_per_gpu = max(1, batch_tokens // self.max_length)  # of rolling windows, and of what is generated
        self._cache = cache
        self._known: dict[str, list[list[int]]] = {}
        self._scorer = Scorer(model, batch_tokens)

    @contextmanager
    def remembering(self, task: str) -> Iterator[None]:
        """The task's requests are tokenised only where no run before has done so."""
        if self._cache is None:
            yield
            return
        path = self._cache / f"{task}.json"
        self._known = _read(path)
        before = len(self._known)
        yield
        if len(self._known) > before:
            write_text(path, json.dumps(self._known, separators=(",", ":")))
        self._known = {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._cache is None:
            return super()._encode_pair(context, continuation)
        key = hashlib.sha256(json.dumps([context, continuation]).encode()).hexdigest()[:32]
        if key not in self._known:
            self._known[key] = list(super()._encode_pair(context, continuation))
        first, second = self._known[key]
        return first, second

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None) -> list[Answer]:
        scored = [Scored((context + target)[-(self.max_length + 1) : -1], target) for _, context, target in requests]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            answers = self._scorer(scored, bar.update)
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:  # as it is for rolling windows
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers


def _read(path: Path) -> dict[str, list[list[int]]]:
    """What is remembered, nothing where the file is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
