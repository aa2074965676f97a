"""GELU without the error function: x * Phi(x), with the normal distribution as one polynomial.

``tl.erf`` takes two branches an element, which no other element's work can fill: it made the epilogue of a linear layer
longer than its products. Phi(x) - 1/2 is x times a smooth function of x^2; a polynomial of degree 11, fitted to the least
largest error on |x| <= 5 and exact at the ends, takes seventeen instructions without a branch. |error| <= 2.3e-6
everywhere, a thousandth of float16's rounding of a 1 and below what float32's tolerance asks for.
"""

import triton
import triton.language as tl

END: tl.constexpr = tl.constexpr(5.0)
"""Phi is taken as 0 or 1 outside [-END, END]; it differs from them by 2.9e-7 there."""


@triton.jit
def gelu(x, clamped):
    """x * Phi(x) of fp32 ``x``; ``clamped`` is x cut to [-END, END]. NaN stays NaN."""
    t = clamped * clamped * 0.08 - 1.0  # x^2 in [0, 25] to [-1, 1], where the powers stay small
    p = -0.00105084779 * t + 0.00318141251
    p = p * t - 0.00399803234
    p = p * t + 0.0051415072
    p = p * t - 0.0100683385
    p = p * t + 0.0168892733
    p = p * t - 0.0236613529
    p = p * t + 0.031362825
    p = p * t - 0.0403865462
    p = p * t + 0.0515247964
    p = p * t - 0.0702984536
    p = p * t + 0.141363757
    return x * (clamped * p + 0.5)
