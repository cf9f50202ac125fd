"""The forward kernel's arithmetic on one warpgroup's rows: online softmax, masses of documents.

Axes: M = 64 query rows of a warpgroup, N keys of a tile, D head dim, in parts D0 and D1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.attention.fused.hopper.pieces import HIDDEN, lane_sums, of_lanes, products, visible


@gluon.jit
def soften(
    x_MN, sum_M4, top_M, spread_M4, first_M, i_M, j0, n_N, start_M, stop_M, factor, masked,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, MEASURE: gl.constexpr, ENTROPY: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: (p_MN, rescale_M, sum_M4, top_M, spread_M4, first_M)."""
    if masked:
        seen_MN = visible(
            i_M[:, None], (j0 + n_N)[None, :], start_M[:, None], stop_M[:, None], CAUSAL, PINNED
        )
        x_MN = gl.where(seen_MN, x_MN, HIDDEN)
    # Not one condition: a static one must stand alone.
    if MEASURE:  # noqa: SIM102
        if j0 == 0:
            first_M = gl.sum(gl.where(n_N[None, :] == 0, x_MN, 0.0), 1)
    new_top_M = gl.maximum(top_M, gl.max(x_MN, 1))
    rescale_M = gl.exp2((top_M - new_top_M) * factor)
    x_MN = x_MN * factor - (new_top_M * factor)[:, None]
    p_MN = gl.exp2(x_MN)
    rescale_M4 = of_lanes(rescale_M, sum_M4)
    if ENTROPY:
        spread_M4 += of_lanes((top_M - new_top_M) * factor, sum_M4) * sum_M4
        spread_M4 = spread_M4 * rescale_M4 + lane_sums(p_MN * x_MN)
    sum_M4 = sum_M4 * rescale_M4 + lane_sums(p_MN)
    return p_MN, rescale_M, sum_M4, new_top_M, spread_M4, first_M


@gluon.jit
def document_masses(
    q0_s, q1_s, k_ptr, k_stride, document_ptr, start_ptr, stop_ptr,
    i_M, log_sum_M, num_tokens, factor,
    CAUSAL: gl.constexpr, PINNED: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
):  # fmt: skip
    """What each query pays to its document's first token: a dot product each."""
    exists_M = i_M < num_tokens
    start_M, stop_M = i_M, i_M
    if not CAUSAL:
        start_M = gl.load(start_ptr + i_M, mask=exists_M, other=0)
        stop_M = gl.load(stop_ptr + i_M, mask=exists_M, other=0)
    key_M = gl.load(document_ptr + i_M, mask=exists_M, other=-1)
    sees_M = (key_M >= 0) & visible(i_M, key_M, start_M, stop_M, CAUSAL, PINNED)

    L0: gl.constexpr = products(D0)
    offset_M = gl.maximum(key_M, 0).to(gl.int64) * k_stride
    d = gl.arange(0, D0, layout=gl.SliceLayout(0, L0))
    k_MD = gl.load(k_ptr + offset_M[:, None] + d[None, :])
    x_M = gl.sum(q0_s.load(L0).to(gl.float32) * k_MD.to(gl.float32), 1)
    if D1 > 0:
        L1: gl.constexpr = products(D1)
        offset_M1 = gl.convert_layout(offset_M, gl.SliceLayout(1, L1))
        d = D0 + gl.arange(0, D1, layout=gl.SliceLayout(0, L1))
        k_MD = gl.load(k_ptr + offset_M1[:, None] + d[None, :])
        more_M = gl.sum(q1_s.load(L1).to(gl.float32) * k_MD.to(gl.float32), 1)
        x_M += gl.convert_layout(more_M, gl.SliceLayout(1, L0))
    return gl.where(sees_M, gl.exp2(x_M * factor - log_sum_M), 0.0)
