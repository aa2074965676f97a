"""One permutation for several weights: the values of all that share it add."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tetris.errors import ShapeError, TetrisError
from tetris.joint_reordering import JointProblem, reorder_jointly
from tetris.permutation import expand
from tetris.pruning import block_sums
from tetris.reordering import reorder


def importance(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, shape, generator=generator).double()


def chain() -> list[JointProblem]:
    """A convolution, one that reads it, and a linear layer behind a flattened 2x2 image."""
    return [
        JointProblem(importance((24, 10), 0), (4, 5), 0.5, ("a", None)),
        JointProblem(importance((18, 24), 1), (3, 8), 0.6, ("b", "a")),
        JointProblem(importance((15, 18 * 4), 2), (5, 6), 0.7, (None, "b"), (1, 4)),
    ]


def kept(problem: JointProblem, mask: torch.Tensor, permutations: dict) -> float:
    """Kept importance of an explicitly permuted matrix."""
    matrix = problem.importance
    for dim, (key, repeats) in enumerate(zip(problem.groups, problem.repeats)):
        if key is not None:
            matrix = matrix.index_select(dim, expand(permutations[key], repeats))
    return float(block_sums(matrix, problem.block)[mask].sum() / problem.importance.sum())


def test_one_problem_alone_is_reorder():
    weight = importance((30, 24), 5)
    alone = reorder(weight, (6, 4), 0.6)
    joint = reorder_jointly([JointProblem(weight, (6, 4), 0.6, ("rows", "columns"))])
    assert torch.equal(joint.permutations["rows"], alone.permutations[0])
    assert torch.equal(joint.permutations["columns"], alone.permutations[1])
    assert torch.equal(joint.block_masks[0], alone.block_mask)
    assert joint.n_swaps == alone.n_swaps and joint.retained == pytest.approx([alone.retained])


@pytest.mark.parametrize("method", ["none", "sort", "paper", "batched", "exact", "annealed"])
def test_retained_is_what_the_permuted_weights_keep(method):
    problems = chain()
    r = reorder_jointly(problems, method, steps=4)
    assert {key: len(p) for key, p in r.permutations.items()} == {"a": 24, "b": 18}
    for permutation in r.permutations.values():
        assert torch.equal(permutation.sort().values, torch.arange(len(permutation)))
    for problem, mask, retained in zip(problems, r.block_masks, r.retained):
        assert kept(problem, mask, r.permutations) == pytest.approx(retained)


def apart() -> list[JointProblem]:
    """Three weights that share nothing, one of them reorderable along its columns only."""
    shapes = ((24, 18), (40, 24), (18, 32))
    groups = ((("a", 0), ("a", 1)), (("b", 0), ("b", 1)), (None, ("c", 1)))
    return [JointProblem(importance(s, i), (4, 6), 0.6, g) for i, (s, g) in enumerate(zip(shapes, groups))]


@pytest.mark.parametrize("method", ["sort", "paper", "batched", "exact", "annealed"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_that_share_nothing_are_searched_as_if_alone(method, where):
    problems = [dataclasses.replace(p, importance=p.importance.to(where)) for p in apart()]
    together = reorder_jointly(problems, method, steps=6, seed=4)
    swaps = 0
    for index, problem in enumerate(problems):
        alone = reorder_jointly([problem], method, steps=6, seed=4)
        assert together.retained[index] == pytest.approx(alone.retained[0], rel=1e-12)
        for key, permutation in alone.permutations.items():
            assert torch.equal(together.permutations[key], permutation)
        swaps += alone.n_swaps
    assert together.n_swaps == swaps


def test_progress_is_that_of_all_weights():
    seen: list[float] = []
    found = reorder_jointly(apart(), "paper", progress=lambda step, retained: seen.append(retained))
    assert seen == sorted(seen) and len(seen) > 2
    kept = sum(r * float(p.importance.sum()) for r, p in zip(found.retained, apart()))
    assert seen[-1] == pytest.approx(kept / sum(float(p.importance.sum()) for p in apart()))


def test_a_fixed_weight_among_others_counts():
    problems = [dataclasses.replace(apart()[0], groups=(None, None)), apart()[1]]
    seen: list[float] = []
    found = reorder_jointly(problems, "annealed", steps=3, progress=lambda step, retained: seen.append(retained))
    assert set(found.permutations) == {("b", 0), ("b", 1)} and 0 < seen[-1] < 1


def test_all_weights_together_gain():
    problems = chain()
    totals = [float(p.importance.sum()) for p in problems]

    def together(method):
        return sum(t * kept for t, kept in zip(totals, reorder_jointly(problems, method).retained))

    assert together("none") < together("paper") <= together("annealed")


def test_both_sides_of_a_weight_may_share():
    problem = JointProblem(importance((24, 24), 3), (4, 6), 0.6, ("a", "a"))
    before, after = (reorder_jointly([problem], method).retained[0] for method in ("none", "paper"))
    assert after > before


def test_a_start_is_not_lost():
    problems = chain()
    best = reorder_jointly(problems, "annealed")
    again = reorder_jointly(problems, "annealed", start=best.permutations, steps=3)
    totals = [float(p.importance.sum()) for p in problems]
    kept_before, kept_after = (sum(t * kept for t, kept in zip(totals, r.retained)) for r in (best, again))
    assert kept_after >= kept_before * (1 - 1e-9)


def test_bad_input_is_named():
    one = importance((8, 8), 0)
    with pytest.raises(TetrisError, match="at least one"):
        reorder_jointly([])
    with pytest.raises(ShapeError, match="group 'a'"):
        reorder_jointly([JointProblem(one, (4, 4), 0.5, ("a", None)), JointProblem(one[:6], (3, 4), 0.5, ("a", None))])
    with pytest.raises(ShapeError, match="3 features"):
        reorder_jointly([JointProblem(one, (4, 4), 0.5, ("a", None), (3, 1))])
    with pytest.raises(TetrisError, match="negative"):
        reorder_jointly([JointProblem(-one, (4, 4), 0.5, ("a", None))])
    with pytest.raises(ShapeError, match="matrix"):
        reorder_jointly([JointProblem(one[0], (4, 4), 0.5, ("a", None))])
    with pytest.raises(TetrisError, match="groups"):
        reorder_jointly([JointProblem(one, (4, 4), 0.5, ("a", None))], start={"z": torch.arange(8)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_importances_are_finite_and_not_negative(bad):
    matrix = importance((8, 8), 0)
    matrix[3, 4] = bad
    with pytest.raises(TetrisError, match="wanted finite importances >= 0"):
        reorder_jointly([JointProblem(matrix, (4, 4), 0.5, ("a", "b"))])
