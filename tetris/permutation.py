"""Permutations of channels as index tensors: ``x[p]`` puts channel ``p[j]`` at position ``j``.

One convention everywhere: a permutation is a LongTensor of *sources*, so that reordering is plain indexing and
``inverse`` undoes it. The paper's alpha (inputs) and beta (outputs) of eqs. 2 and 3 are such index vectors.
"""

from __future__ import annotations

import torch

from tetris.errors import ShapeError, describe


def identity(size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The permutation that changes nothing; int64 of shape (size,)."""
    return torch.arange(size, device=device)


def is_identity(permutation: torch.Tensor | None) -> bool:
    """Whether applying it is a no-op; ``None`` stands for the identity."""
    return permutation is None or bool((permutation == identity(len(permutation), permutation.device)).all())


def validate(permutation: torch.Tensor, size: int, name: str = "permutation") -> torch.Tensor:
    """Return it as int64 after checking that it is a bijection of 0..size-1; raises ShapeError otherwise."""
    if permutation.dim() != 1 or len(permutation) != size:
        raise ShapeError(f"{name}: wanted {size} indices; got {describe(permutation)}")
    permutation = permutation.long()
    if not torch.equal(permutation.sort().values, identity(size, permutation.device)):
        raise ShapeError(f"{name}: wanted every index of 0..{size - 1} exactly once; got repeated or missing indices")
    return permutation


def inverse(permutation: torch.Tensor) -> torch.Tensor:
    """The permutation q with ``x[p][q] == x``."""
    result = torch.empty_like(permutation)
    result[permutation] = identity(len(permutation), permutation.device)
    return result


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The single permutation that equals applying ``first`` and then ``second``: ``x[first][second]``."""
    return first[second]


def apply(tensor: torch.Tensor, permutations: dict[int, torch.Tensor]) -> torch.Tensor:
    """``tensor`` reordered along each dimension of ``permutations``."""
    for dim, permutation in permutations.items():
        tensor = tensor.index_select(dim, permutation.to(tensor.device))
    return tensor


def expand(permutation: torch.Tensor, repeats: int) -> torch.Tensor:
    """The permutation of ``repeats`` consecutive features a channel, as flattening after a convolution makes them."""
    offsets = identity(repeats, permutation.device)
    return (permutation[:, None] * repeats + offsets).reshape(-1)


def group_size(permutation: torch.Tensor) -> int:
    """The largest power of two g such that it moves whole groups of g channels that lie next to each other; 1 = none.

    A group begins at a multiple of g before and after. At most 64; cost O(size log size) on the CPU.
    """
    permutation = permutation.cpu()
    for size in (64, 32, 16, 8, 4, 2):
        if len(permutation) % size == 0:
            groups = permutation.view(-1, size)
            if bool((groups[:, :1] % size == 0).all() and (groups - groups[:, :1] == identity(size)).all()):
                return size
    return 1
