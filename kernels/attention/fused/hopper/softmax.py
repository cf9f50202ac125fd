"""The forward kernel's arithmetic on one warpgroup's rows.

Axes: M = 64 query rows of a warpgroup, N keys of a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.fused.blocks import HIDDEN
from kernels.attention.fused.hopper.pieces import lane_sums, of_lanes, visible


@gluon.jit
def soften(
    x_MN, sum_M4, top_M, spread_M4, first_M4, own_M4, i_M, j0, n_N, start_M, stop_M, document_M,
    earliest, latest, factor, masked,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, MEASURE: gl.constexpr, ENTROPY: gl.constexpr,
    ONE_DOCUMENT: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax.

    Returns p_MN, rescale_M, and renewed sum_M4, top_M, spread_M4, which mean what the portable
    forward kernel's do, and lane sums that hold one score: first_M4 key 0's, own_M4 that of
    document_M, the first token of the query's document, which lies between earliest and latest.
    """
    if masked:
        seen_MN = visible(
            i_M[:, None], (j0 + n_N)[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
        )
        x_MN = gl.where(seen_MN, x_MN, HIDDEN)
    # Not one condition: a static one must stand alone.
    if MEASURE:
        if j0 == 0:
            first_M4 = lane_sums(gl.where(n_N[None, :] == 0, x_MN, 0.0))
        if not ONE_DOCUMENT:  # noqa: SIM102
            if (j0 + x_MN.shape[1] > earliest) & (j0 <= latest):
                own_MN = gl.where(n_N[None, :] == (document_M - j0)[:, None], x_MN, 0.0)
                own_M4 += lane_sums(own_MN)
    new_top_M = gl.maximum(top_M, gl.max(x_MN, 1))
    rescale_M = gl.exp2((top_M - new_top_M) * factor)
    x_MN = x_MN * factor - (new_top_M * factor)[:, None]
    p_MN = gl.exp2(x_MN)
    rescale_M4 = of_lanes(rescale_M, sum_M4)
    if ENTROPY:
        spread_M4 += of_lanes((top_M - new_top_M) * factor, sum_M4) * sum_M4
        spread_M4 = spread_M4 * rescale_M4 + lane_sums(p_MN * x_MN)
    sum_M4 = sum_M4 * rescale_M4 + lane_sums(p_MN)
    return p_MN, rescale_M, sum_M4, new_top_M, spread_M4, first_M4, own_M4
