"""lm_eval's view of a model that is loaded: shared prefixes read once, batches of like volume, and tokens kept between runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from bimos.evaluation.prefixes import Answer, Scorer
from bimos.evaluation.prefixes import Request as Scored
from bimos.evaluation.versions import write_text

Request = tuple[tuple[str, str], list[int], list[int]]  # context and continuation as text, and the tokens of each


class Harness(HFLM):
    """As lm_eval's own, but for what goes through the model at once: trees of requests where it can read them, else like many tokens.

    Args:
        batch_tokens: of a batch, padding included: few long requests or many short ones, so that memory and speed stay the same.
        cache: folder for the tokens of requests, which depend on the tokenizer alone; a folder for every tokenizer. None: none are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, cache: Path | None) -> None:
        # A copy, because it sets a padding token. Log-probabilities in float32: rounded to bfloat16 their sums can tie.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size="auto", softmax_dtype=torch.float32)
        self._batch_tokens, self._cache = batch_tokens, cache
        self._known: dict[str, list[list[int]]] = {}
        self._sizes: tuple[Any, list[int]] = (None, [])  # the requests, and for each how many share its batch
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
        if not self._scorer.covers(max((len(request.tokens) for request in scored), default=0)):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            answers = self._scorer(scored, bar.update)
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Request]) -> int:
        """How many requests are in the batch of request `pos`; they come sorted, the longest first."""
        requests = n_reordered_requests
        if self._sizes[0] is not requests:
            sizes: list[int] = []
            while len(sizes) < len(requests):
                _, context, continuation = requests[len(sizes)]
                count = self._fitting(min(len(context) + len(continuation) - 1, self.max_length))
                sizes += [count] * count
            self._sizes = (requests, sizes)
        return self._sizes[1][pos]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return self._fitting(self.max_length)  # what asks has windows of that length; lm_eval would try out what memory holds

    def _fitting(self, length: int) -> int:
        return max(1, self._batch_tokens // max(1, length))


def _read(path: Path) -> dict[str, list[list[int]]]:
    """What is remembered, nothing where the file is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
