"""Log-likelihoods of continuations, with what they share read once.

The answers to a question begin with the same text. Requests that do so become a tree of tokens, which is one row of a batch: every
token attends to its ancestors alone and has their number as its position, so that each path reads as if it stood by itself. Logits
are computed only where a continuation is scored. Of the six tasks' tokens that leaves 56 %, and of their logits a fifth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bimos.evaluation.perplexity import LOGIT_ELEMENTS, plain_head
from bimos.lanes import Lanes

Answer = tuple[float, bool]  # summed log-probability of a continuation, and whether greedy decoding would give it
SHARED = 0.25  # of a request's tokens, at least, for it to join a tree: below, it would pay for attention to what it masks
TOLERANCE = 0.03  # relative, of logits: rounding in 16 bits stays below; what ignores a mask or positions does not


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to be scored.

    Attributes:
        tokens: context and continuation, but for its last token.
        targets: the continuation, at most as many.
    """

    tokens: list[int]
    targets: list[int]


class Tree:
    """Tokens of requests, each shared prefix once.

    Attributes:
        tokens, positions: of every node.
        paths: for every request that was added the nodes of its tokens.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.paths: list[list[int]] = []

    def add(self, tokens: list[int], shared: int) -> None:
        """A path whose first `shared` tokens are those of the path before it."""
        first, new = len(self.tokens), tokens[shared:]
        self.tokens += new
        self.positions += range(shared, len(tokens))
        self.paths.append([*(self.paths[-1][:shared] if shared else ()), *range(first, first + len(new))])

    def mask(self, size: int) -> Tensor:
        """Which nodes a node attends to, bool `[size, size]`; padding attends to itself, for something it must."""
        mask = torch.eye(size, dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            mask[nodes.unsqueeze(1), nodes] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return mask


def plant(requests: Sequence[Request], limit: int) -> list[tuple[Tree, list[int]]]:
    """Trees of all requests, the largest first, and for each of its paths which request that is.

    Args:
        limit: nodes of a tree, where it has more than one path.
    """
    trees: list[tuple[Tree, list[int]]] = []
    before: list[int] = []
    for index in sorted(range(len(requests)), key=lambda index: requests[index].tokens):
        tokens = requests[index].tokens
        shared = _common(before, tokens)
        before = tokens
        if not trees or shared < SHARED * len(tokens) or len(trees[-1][0].tokens) + len(tokens) - shared > limit:
            trees.append((Tree(), []))
            shared = 0
        trees[-1][0].add(tokens, shared)
        trees[-1][1].append(index)
    return sorted(trees, key=lambda tree: -len(tree[0].tokens))


class Scorer:
    """Scores requests with a model of transformers that is in evaluation mode.

    Args:
        batch_tokens: of a forward pass, padding included.
    """

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.vocab = model.config.get_text_config().vocab_size
        with torch.no_grad():
            self.head = plain_head(model, torch.arange(min(4, self.vocab), device=model.device).unsqueeze(0))

    def covers(self, longest: int) -> bool:
        """Whether answers on trees are those on their paths, for requests of up to `longest` tokens.

        Asked of the model instead of looked up by architecture. Only what a window of attention hides has to be looked up.
        """
        config = self.model.config.get_text_config()
        for name in ("sliding_window", "attention_chunk_size"):
            if longest > (getattr(config, name, None) or longest):
                return False
        generator = torch.Generator().manual_seed(0)
        stem, *branches = (torch.randint(self.vocab, (length,), generator=generator).tolist() for length in (6, 9, 9, 5))
        (tree, _), *others = plant([Request(stem + branch, branch) for branch in branches], 64)
        assert not others
        try:
            with torch.no_grad():
                seen = self._logits([tree], [path for path in tree.paths])
                path = [self.model(input_ids=self._ids([tree.tokens[node] for node in path])).logits[0] for path in tree.paths]
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            return False  # a model that takes no masks or positions
        alone = torch.cat(path).float()
        return bool((seen.float() - alone).norm() <= TOLERANCE * alone.norm())

    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Answer]:
        """An answer for every request, in order.

        Args:
            progress: called after every batch with the number of requests in it.
        """
        trees = plant(requests, self.batch_tokens)
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

        with Lanes(len(batches), self.model.device) as lanes:
            for first in range(0, len(batches), lanes.count):
                for found in lanes.map(score, batches[first : first + lanes.count]):
                    answers |= found
                    if progress is not None:
                        progress(len(found))
        return [answers[index] for index in range(len(requests))]

    def _answers(self, trees: list[Tree], requests: list[Request]) -> list[Answer]:
        """Of the trees' paths, one after another; `requests` are theirs."""
        paths = [path for tree in trees for path in tree.paths]
        ends = [path[-len(request.targets) :] for path, request in zip(paths, requests, strict=True)]
        rows = self._hidden(trees, ends)
        targets = torch.tensor([target for request in requests for target in request.targets], device=rows.device)
        chunk = max(1, LOGIT_ELEMENTS // self.vocab)
        found, greedy = [], []
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
            logits = (part if self.head is None else self.head(part)).float()  # rounded to bfloat16 their sums can tie
            found.append(logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1))
            greedy.append(logits.argmax(-1) == target)
        sizes = [len(end) for end in ends]
        sums = [float(part.sum()) for part in torch.cat(found).split(sizes)]
        return list(zip(sums, [bool(part.all()) for part in torch.cat(greedy).split(sizes)], strict=True))

    def _logits(self, trees: list[Tree], nodes: list[list[int]]) -> Tensor:
        rows = self._hidden(trees, nodes)
        return rows if self.head is None else self.head(rows)

    def _hidden(self, trees: list[Tree], nodes: list[list[int]]) -> Tensor:
        """What the head takes, or logits where it is not plain, at `nodes` of every path in turn: `[nodes, *]`."""
        size = max(len(tree.tokens) for tree in trees)
        ids = torch.tensor([tree.tokens + [0] * (size - len(tree.tokens)) for tree in trees])
        positions = torch.tensor([tree.positions + [0] * (size - len(tree.tokens)) for tree in trees])
        dtype = self.model.dtype
        hidden = ~torch.stack([tree.mask(size) for tree in trees]).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        if self.head is None:
            rows = self.model(**given, use_cache=False).logits
        else:
            rows = self.model.base_model(**given, use_cache=False).last_hidden_state
        row = [number for number, tree in enumerate(trees) for _ in tree.paths]
        flat = [number * size + node for number, path in zip(row, nodes, strict=True) for node in path]
        return rows.flatten(0, 1)[torch.tensor(flat, device=rows.device)]

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
