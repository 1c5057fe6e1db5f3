"""Trees of requests: what their paths read, what their nodes attend to, and what goes together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimos.evaluation.prefixes import Scored, plant

STEM = [7, 3, 9, 4, 11, 60, 2, 8]


def planted(sequences, limit):
    return [tree for tree, _ in plant([Scored(tokens, tokens[-1:]) for tokens in sequences], limit)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(0, 40))
def test_paths_read_the_requests_and_nodes_are_attended_to_by_their_descendants(sequences, limit):
    trees = plant([Scored(tokens, tokens[-1:]) for tokens in sequences], limit)
    seen = []
    for tree, members in trees:
        mask = tree.mask(len(tree.tokens) + 1)
        for path, index in zip(tree.paths, members, strict=True):
            assert [tree.tokens[node] for node in path] == sequences[index]
            assert [tree.positions[node] for node in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert mask[node].nonzero().flatten().tolist() == sorted(path[: depth + 1])
        assert mask[-1].nonzero().tolist() == [[len(tree.tokens)]]  # padding
        assert tree.is_chain == any(len(path) == len(tree.tokens) for path in tree.paths)
        assert tree.is_chain or len(tree.tokens) <= limit
        seen += members
    assert sorted(seen) == list(range(len(sequences)))
    assert [len(tree.tokens) for tree, _ in trees] == sorted((len(tree.tokens) for tree, _ in trees), reverse=True)


def test_what_is_shared_is_read_once():
    little = [STEM[:2] + [50 + i] * 9 for i in range(2)]  # too little shared
    trees = planted([[*STEM, 5, 6], [*STEM, 5, 8, 2], [*STEM, 1], STEM, *little], 100)
    assert [(len(tree.tokens), len(tree.paths), tree.is_chain) for tree in trees] == [
        (8 + 1 + 1 + 2 + 1, 4, False),
        (11, 1, True),
        (11, 1, True),
    ]


def test_what_stays_a_chain_may_be_of_any_length():
    (tree,) = planted([STEM, [*STEM, 1], [*STEM, 1], [*STEM, 1, 2]], 0)
    assert tree.is_chain and len(tree.tokens) == 10 and len(tree.paths) == 4
    assert len(planted([[*STEM, 1], [*STEM, 2]], 9)) == 2


@pytest.mark.parametrize(("tokens", "targets"), [([1], []), ([], [1]), ([1], [1, 2])])
def test_a_continuation_needs_a_context_and_room(tokens, targets):
    with pytest.raises(ValueError, match="needs a context, and room"):
        Scored(tokens, targets)
