"""Which dataset a sample of the training order comes from: a pure function of the sample number.

A binary tree splits the samples between two groups of datasets at every node, by the rounded line
count(m) = floor(m * share + 1/2) (a Beatty sequence), until one dataset is left. The number of
samples that went the same way before is the place in the group: nothing is stored or replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

# Above this many datasets the tree is split in the middle instead of searched.
_SEARCHED_LEAVES = 8


@dataclass(frozen=True)
class _Node:
    weight: int
    dataset: int = -1
    left: _Node | None = None
    right: _Node | None = None


@dataclass(frozen=True)
class Blend:
    """Interleaves datasets in proportion to integer weights.

    After any number of samples the count of every dataset is within `bound` of its exact share
    (1 for up to 4 datasets, 1.1 for up to 8), and exact after multiples of the sum of the weights.
    """

    root: _Node
    bound: float

    @staticmethod
    def of(weights: Sequence[float]) -> Blend:
        """Weights need not sum to 1; they are taken as the decimal numbers they print as."""
        fractions = [Fraction(str(weight)) for weight in weights]
        assert min(fractions) > 0, weights
        scale = lcm(*(fraction.denominator for fraction in fractions))
        leaves = [_Node(int(share * scale), place) for place, share in enumerate(fractions)]
        leaves.sort(key=lambda leaf: (leaf.weight, leaf.dataset))
        bound, root = _best_tree(leaves, 0.0, float("inf"))
        return Blend(root, bound)

    def locate(self, index: int) -> tuple[int, int]:
        """Sample number -> (dataset, how many earlier samples came from it)."""
        node: _Node = self.root
        while node.left is not None and node.right is not None:
            before = _rounded_share(index, node)
            goes_left = _rounded_share(index + 1, node) > before
            index = before if goes_left else index - before
            node = node.left if goes_left else node.right
        return node.dataset, index

    def counts(self, num_samples: int) -> dict[int, int]:
        """Dataset -> how many of the first `num_samples` come from it; each only grows."""
        counts: dict[int, int] = {}
        pending = [(self.root, num_samples)]
        while pending:
            node, count = pending.pop()
            if node.left is None or node.right is None:
                counts[node.dataset] = count
                continue
            left = _rounded_share(count, node)
            pending += [(node.left, left), (node.right, count - left)]
        return counts


def _rounded_share(count: int, node: _Node) -> int:
    """How many of the first `count` samples of the node go left."""
    assert node.left is not None
    return (2 * count * node.left.weight + node.weight) // (2 * node.weight)


def _best_tree(leaves: list[_Node], error: float, limit: float) -> tuple[float, _Node]:
    """The tree over sorted leaves with the least bound on the error of any count.

    A group that is off by at most `error` and gets the share p of a split is off by at most
    p * error + 1/2 after it. Stops early where no tree can beat `limit`.
    """
    total = sum(leaf.weight for leaf in leaves)
    if len(leaves) == 1:
        return error, leaves[0]
    best_bound, best_node = limit, None
    for cut in _cuts(leaves, total):
        share = sum(leaf.weight for leaf in leaves[:cut]) / total
        left_bound, left = _best_tree(leaves[:cut], share * error + 0.5, best_bound)
        if left_bound >= best_bound:
            continue
        right_bound, right = _best_tree(leaves[cut:], (1 - share) * error + 0.5, best_bound)
        bound = max(left_bound, right_bound)
        if bound < best_bound:
            best_bound, best_node = bound, _Node(total, -1, left, right)
    return best_bound, best_node or leaves[0]


def _cuts(leaves: list[_Node], total: int) -> Sequence[int]:
    """Places at which to try to split the leaves in two."""
    if len(leaves) <= _SEARCHED_LEAVES:
        return range(1, len(leaves))
    weight, cut = 0, 0
    while cut < len(leaves) - 2 and 2 * (weight + leaves[cut].weight) <= total:
        weight += leaves[cut].weight
        cut += 1
    return [max(cut, 1)]
