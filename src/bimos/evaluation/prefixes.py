"""Requests with a common beginning as a tree of tokens, so that one row of a batch holds them all.

The answers to a question begin with the same text. Every token attends to its ancestors alone and has their number as its position:
each path reads as if it stood by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

SHARED = 0.25  # of a request's tokens, at least, for it to join a tree: below, it would pay for attention to what it masks


@dataclasses.dataclass(frozen=True)
class Scored:
    """A continuation to be scored.

    Attributes:
        tokens: context and continuation, but for its last token.
        targets: the continuation, at most as many.
    """

    tokens: list[int]
    targets: list[int]

    def __post_init__(self) -> None:
        if not 0 < len(self.targets) <= len(self.tokens):
            raise ValueError(f"a continuation of {len(self.targets)} tokens behind {len(self.tokens)}: needs a context, and room for both")


class Tree:
    """Tokens of requests, each shared prefix once.

    Attributes:
        tokens, positions: of every node.
        paths: for every request that was added the nodes of its tokens.
        is_chain: no path turns off another.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.paths: list[list[int]] = []
        self.is_chain = True

    def add(self, tokens: list[int], shared: int) -> None:
        """A path whose first `shared` tokens are those of the path before it."""
        first, new = len(self.tokens), tokens[shared:]
        self.is_chain = self.is_chain and (shared == first or not new)
        self.tokens += new
        self.positions += range(shared, len(tokens))
        self.paths.append([*(self.paths[-1][:shared] if shared else ()), *range(first, first + len(new))])

    def mask(self, size: int) -> Tensor:
        """Which nodes a node attends to, bool `[size, size]`; padding attends to itself, for something it must."""
        mask = torch.eye(size, dtype=torch.bool)
        first = 0
        for path in self.paths:
            last = path[-1] + 1
            if last > first:  # nodes of its own, one behind the other
                mask[first:last, path[: first - last]] = True
                mask[first:last, first:last].logical_or_(torch.ones(last - first, last - first, dtype=torch.bool).tril())
                first = last
        return mask


def plant(requests: Sequence[Scored], limit: int) -> list[tuple[Tree, list[int]]]:
    """Trees of all requests, the largest first, and for each of its paths which request that is.

    Args:
        limit: nodes of a tree that is no chain.
    """
    trees: list[tuple[Tree, list[int]]] = []
    before: list[int] = []
    for index in sorted(range(len(requests)), key=lambda index: requests[index].tokens):
        tokens = requests[index].tokens
        shared = _common(before, tokens)
        before = tokens
        if not trees or not _belongs(tokens, shared, trees[-1][0], limit):
            trees.append((Tree(), []))
            shared = 0
        trees[-1][0].add(tokens, shared)
        trees[-1][1].append(index)
    return sorted(trees, key=lambda tree: -len(tree[0].tokens))


def _belongs(tokens: list[int], shared: int, tree: Tree, limit: int) -> bool:
    """Whether a path of `tokens`, of which the first are those of the tree's last path, goes to that tree."""
    if tree.is_chain and shared == len(tree.tokens):  # and stays one
        return True
    return shared >= SHARED * len(tokens) and len(tree.tokens) + len(tokens) - shared <= limit


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
