"""Log-likelihoods of continuations: what lm_eval asks of a model, with what requests share read once (`prefixes.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bimos.evaluation.perplexity import LOGIT_ELEMENTS, plain_head
from bimos.evaluation.prefixes import Scored, Tree, plant
from bimos.lanes import Lanes

Answer = tuple[float, bool]  # summed log-probability of a continuation, and whether greedy decoding would give it
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # configs' names of how far attention sees
COMPARED = 8  # last tokens of a path


class Scorer:
    """Scores requests with a causal language model of transformers that is in evaluation mode.

    Whether the model reads trees as it reads their paths is asked of it, with the largest of them, instead of looked up by architecture;
    what does not gets chains alone. Only what a window of attention hides has to be looked up: no tree is larger than one.

    Args:
        batch_tokens: of a forward pass, padding included.
    """

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        config = model.config.get_text_config()
        self.vocab = config.vocab_size
        # Flash attention takes no such masks, and on a GPU does not fail in a way that one recovers from.
        takes_masks = "flash" not in str(getattr(config, "_attn_implementation", ""))
        windows = [window for window in (getattr(config, name, None) for name in WINDOWS) if window]
        self.limit = min([batch_tokens, *windows]) if takes_masks else 0
        with torch.no_grad():
            self.head = plain_head(model, torch.arange(min(4, self.vocab), device=model.device).unsqueeze(0))

    def __call__(self, requests: Sequence[Scored], progress: Callable[[int], None] | None = None) -> list[Answer]:
        """An answer for every request, in order.

        Args:
            progress: called after every batch with the number of requests in it.
        """
        trees = plant(requests, self.limit)
        largest = next((tree for tree, _ in trees if not tree.is_chain), None)
        if largest is not None and not self.reads(largest):
            trees = plant(requests, 0)
        batches: list[list[tuple[Tree, list[int]]]] = []
        while trees:
            count = max(1, self.batch_tokens // len(trees[0][0].tokens))
            batches.append(trees[:count])
            trees = trees[count:]
        answers: dict[int, Answer] = {}

        @torch.no_grad()
        def score(batch: list[tuple[Tree, list[int]]]) -> dict[int, Answer]:
            members = [index for _, indices in batch for index in indices]
            return dict(zip(members, self._answers([tree for tree, _ in batch], [requests[index] for index in members]), strict=True))

        # All logits of a batch at a time are more than one should hold of two.
        with Lanes(1 if self.head is None else len(batches), self.model.device) as lanes:
            for first in range(0, len(batches), lanes.count):
                for found in lanes.map(score, batches[first : first + lanes.count]):
                    answers |= found
                    if progress is not None:
                        progress(len(found))
        return [answers[index] for index in range(len(requests))]

    @torch.no_grad()
    def reads(self, tree: Tree) -> bool:
        """Whether log-probabilities at the ends of its paths are those of each path by itself."""
        ends = [path[-COMPARED:] for path in tree.paths]
        try:
            rows = self._states([tree], ends)
            seen = (rows if self.head is None else self.head(rows)).float().log_softmax(-1)
        except Exception:  # whatever a model says that takes no masks or positions
            return False
        alone = []
        for path, end in zip(tree.paths, ends, strict=True):
            ids = torch.tensor([[tree.tokens[node] for node in path]], device=self.model.device)
            alone.append(self.model(input_ids=ids, use_cache=False).logits[0, -len(end) :].float().log_softmax(-1))
        wanted = torch.cat(alone)
        tolerance = 0.003 if self.model.dtype == torch.float32 else 0.1  # for rounding, of the spread between tokens
        return bool((seen - wanted).norm() <= tolerance * (wanted - wanted.mean(0)).norm())

    def _answers(self, trees: list[Tree], requests: list[Scored]) -> list[Answer]:
        """Of the trees' paths, one after another; `requests` are theirs."""
        paths = [path for tree in trees for path in tree.paths]
        ends = [path[-len(request.targets) :] for path, request in zip(paths, requests, strict=True)]
        rows = self._states(trees, ends)
        targets = torch.tensor([target for request in requests for target in request.targets])
        chunk = max(1, LOGIT_ELEMENTS // self.vocab)
        found, greedy = [], []
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
            logits = (part if self.head is None else self.head(part)).float()  # rounded to bfloat16 their sums can tie
            place = target.to(logits.device)
            found.append(logits.log_softmax(-1).gather(1, place.unsqueeze(1)).squeeze(1))
            greedy.append(logits.argmax(-1) == place)
        sizes = [len(end) for end in ends]
        sums = [float(part.sum()) for part in torch.cat(found).split(sizes)]
        return list(zip(sums, [bool(part.all()) for part in torch.cat(greedy).split(sizes)], strict=True))

    def _states(self, trees: list[Tree], nodes: list[list[int]]) -> Tensor:
        """What the head takes, or logits where it is not plain, at `nodes` of every path in turn: `[nodes, *]`."""
        size = max(len(tree.tokens) for tree in trees)
        given = {"input_ids": torch.tensor([tree.tokens + [0] * (size - len(tree.tokens)) for tree in trees])}
        if not all(tree.is_chain for tree in trees):  # else padding, which is behind them, needs no mask either
            given["position_ids"] = torch.tensor([tree.positions + [0] * (size - len(tree.tokens)) for tree in trees])
            masked = ~torch.stack([tree.mask(size) for tree in trees]).unsqueeze(1)
            dtype = self.model.dtype
            given["attention_mask"] = torch.zeros(masked.shape, dtype=dtype).masked_fill_(masked, torch.finfo(dtype).min)
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        if self.head is None:
            rows = self.model(**given, use_cache=False).logits
        else:
            rows = self.model.base_model(**given, use_cache=False).last_hidden_state
        row = [number for number, tree in enumerate(trees) for _ in tree.paths]
        flat = [number * size + node for number, path in zip(row, nodes, strict=True) for node in path]
        return rows.flatten(0, 1)[torch.tensor(flat, device=rows.device)]
