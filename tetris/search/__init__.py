"""Searches for good permutations: the compressed form of the paper's M-step and everything built on it.

A matrix of importances [rows, columns] is cut into R x C blocks of which K stay. All slices inside one block row see
the same mask, so the paper's S (eq. 9) has only R distinct columns: with the column groups fixed,

    values = group_sums(matrix) @ mask^T        # [rows, R]: importance that a slice keeps in each group

holds all that an M-step needs. Slices are then *assigned to groups*; the position inside a group does not matter.

    sums        group sums of a matrix, block sums, the values of an M-step
    greedy      Algorithm 1's swaps, in the same order (Section 4.2, compressed)
    batched     swaps on disjoint pairs of groups, applied together
    transport   the exact M-step with a certificate of optimality
    annealing   a soft mask that hardens: escapes the local optima of the alternation
    alternation the outer loop of E- and M-steps
    lanes, replay  independent weights side by side on a GPU, as branches of captured steps
    general     Algorithm 1 for any pruning method, with the paper's own n x n speedups
"""
