"""The device side of `lcx.kernels.landmark`: forward, gradient of q, gradients of k and v.

A tile of M queries meets one block of keys at a time. All tokens of an earlier block are there at once, so its inner softmax
needs no running statistics; only the main softmax, over landmarks and own tokens, is accumulated as in FlashAttention.
Scores are kept in units of log 2. Tiles are padded: M queries, N >= B keys, P >= D columns, powers of two of 16 or more.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(base, stride, first, count, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr):
    """Rows first ... first + R of a matrix of D columns as [R, P]. Of them `count` exist (WHOLE: all), the rest is zero."""
    r, c = tl.arange(0, R), tl.arange(0, P)
    at = base + (first + r).to(tl.int64)[:, None] * stride + c[None, :]
    if WHOLE and D == P:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(r < count)[:, None] & (c < D)[None, :], other=0.0)
    return x


@triton.jit
def _store(base, stride, first, count, x, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, P)
    at = base + (first + r).to(tl.int64)[:, None] * stride + c[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(r < count)[:, None] & (c < D)[None, :])


@triton.jit
def _scores(q, k, pos, n, scale, B: tl.constexpr, N: tl.constexpr, NEAR: tl.constexpr, DOT: tl.constexpr):
    """Queries q [M, P] at pos [M] on block n, k [N, P]: exp2(score - top) [M, N], zero at the landmark; its sum; top; the landmark's score.

    NEAR: n may be the own block of some queries, or later than it. Otherwise it is earlier than all.
    """
    col = tl.arange(0, N)
    s = tl.dot(q, tl.trans(k), input_precision=DOT) * scale
    gate = tl.sum(tl.where((col == B - 1)[None, :], s, 0.0), 1)
    seen = (col < B - 1)[None, :]
    if NEAR:
        seen = seen & ((n * B + col)[None, :] <= pos[:, None])
    s = tl.where(seen, s, float("-inf"))
    top = tl.max(s, 1)
    if NEAR:
        top = tl.maximum(top, -3.0e38)  # a block that is all future: -inf - -inf would be NaN
    e = tl.exp2(s - top[:, None])
    return e, tl.sum(e, 1), top, gate


@triton.jit
def _main(total, top, gate, pos, n, B: tl.constexpr, NEAR: tl.constexpr):
    """What block n brings to the main softmax: an earlier block its landmark's score, the own block its tokens' (here: their top)."""
    if NEAR:
        main = tl.where(n < pos // B, gate, tl.where(total > 0, top, float("-inf")))
    else:
        main = gate
    return main


@triton.jit
def forward(
    Q, K, V, Out, Lse,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2,
    heads, group, queries, keys, scale,
    B: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out and the log of the main denominator, of M queries of one head. Grid: (batch * heads, tiles), longest first."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    q = _load(Q + b.to(tl.int64) * q0 + h.to(tl.int64) * q1, q2, first, queries - first, D, M, P, False)
    K += b.to(tl.int64) * k0 + (h // group).to(tl.int64) * k1
    V += b.to(tl.int64) * v0 + (h // group).to(tl.int64) * v1
    start = keys - queries + first
    pos = start + tl.arange(0, M)
    far = start // B  # blocks before it are earlier for every query of the tile
    near = (tl.minimum(start + M, keys) - 1) // B + 1 - far

    top = tl.full([M], float("-inf"), tl.float32)
    den = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, P], tl.float32)
    for n in range(0, far):
        k = _load(K, k2, n * B, B, D, N, P, N == B)
        e, total, _, gate = _scores(q, k, pos, n, scale * LOG2E, B, N, False, DOT)
        new = tl.maximum(top, gate)
        share, keep = tl.exp2(gate - new), tl.exp2(top - new)
        v = _load(V, v2, n * B, B, D, N, P, N == B)
        acc = tl.dot((e * (share / total)[:, None]).to(v.dtype), v, acc * keep[:, None], input_precision=DOT)
        den = den * keep + share
        top = new
    for i in range(
        0, near
    ):  # not range(far, ...): some compilers fail on a lower bound known only at run time
        n = far + i
        k = _load(K, k2, n * B, tl.minimum(keys - n * B, B), D, N, P, False)
        e, total, most, gate = _scores(q, k, pos, n, scale * LOG2E, B, N, True, DOT)
        main = _main(total, most, gate, pos, n, B, True)
        new = tl.maximum(top, main)
        share, keep = tl.exp2(main - new), tl.exp2(top - new)
        earlier = n < pos // B
        weight = tl.where(earlier, share / tl.maximum(total, 1.0), share)
        v = _load(V, v2, n * B, tl.minimum(keys - n * B, B), D, N, P, False)
        acc = tl.dot((e * weight[:, None]).to(v.dtype), v, acc * keep[:, None], input_precision=DOT)
        den = den * keep + tl.where(earlier, share, share * total)
        top = new
    _store(
        Out + b.to(tl.int64) * o0 + h.to(tl.int64) * o1,
        o2,
        first,
        queries - first,
        acc / den[:, None],
        D,
        M,
        P,
    )
    rows = first + tl.arange(0, M)
    tl.store(
        Lse + tl.program_id(0).to(tl.int64) * queries + rows,
        (top + tl.log2(den)) / LOG2E,
        mask=rows < queries,
    )


@triton.jit
def _gradient(
    e, total, top, gate, dp, lse, delta, pos, n, B: tl.constexpr, N: tl.constexpr, NEAR: tl.constexpr
):
    """Weights [M, N] and the gradient of the scores [M, N], from dp, the gradient of the weights."""
    share = tl.exp2(_main(total, top, gate, pos, n, B, NEAR) - lse)
    # Of an earlier block, the softmax inside the block and the gate are two functions, each with its own mean.
    if NEAR:
        total = tl.maximum(total, 1.0)
        mean = tl.sum(e * dp, 1) / total
        earlier = n < pos // B
        weight = tl.where(earlier, share / total, share)
        at_landmark = tl.where(earlier, share * (mean - delta), 0.0)
        mean = tl.where(earlier, mean, delta)
    else:
        mean = tl.sum(e * dp, 1) / total
        weight = share / total
        at_landmark = share * (mean - delta)
    w = e * weight[:, None]
    ds = w * (dp - mean[:, None])
    return w, tl.where((tl.arange(0, N) == B - 1)[None, :], at_landmark[:, None], ds)


@triton.jit
def gradient_q(
    Q, K, V, Out, Lse, Grad, DQ, Delta,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2, g0, g1, g2, d0, d1, d2,
    heads, group, queries, keys, scale,
    B: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head, and delta = sum(out * gradient of out), which `gradient_kv` reads. Grid as in `forward`."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    left = queries - first
    q = _load(Q + b.to(tl.int64) * q0 + h.to(tl.int64) * q1, q2, first, left, D, M, P, False)
    out = _load(Out + b.to(tl.int64) * o0 + h.to(tl.int64) * o1, o2, first, left, D, M, P, False)
    grad = _load(Grad + b.to(tl.int64) * g0 + h.to(tl.int64) * g1, g2, first, left, D, M, P, False)
    rows = first + tl.arange(0, M)
    line = tl.program_id(0).to(tl.int64) * queries
    lse = tl.load(Lse + line + rows, mask=rows < queries, other=float("inf")) * LOG2E
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + line + rows, delta, mask=rows < queries)
    K += b.to(tl.int64) * k0 + (h // group).to(tl.int64) * k1
    V += b.to(tl.int64) * v0 + (h // group).to(tl.int64) * v1
    start = keys - queries + first
    pos = start + tl.arange(0, M)
    far = start // B
    near = (tl.minimum(start + M, keys) - 1) // B + 1 - far

    dq = tl.zeros([M, P], tl.float32)
    for n in range(0, far):
        k = _load(K, k2, n * B, B, D, N, P, N == B)
        v = _load(V, v2, n * B, B, D, N, P, N == B)
        e, total, top, gate = _scores(q, k, pos, n, scale * LOG2E, B, N, False, DOT)
        dp = tl.dot(grad, tl.trans(v), input_precision=DOT)
        _, ds = _gradient(e, total, top, gate, dp, lse, delta, pos, n, B, N, False)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)
    for i in range(0, near):
        n = far + i
        k = _load(K, k2, n * B, tl.minimum(keys - n * B, B), D, N, P, False)
        v = _load(V, v2, n * B, tl.minimum(keys - n * B, B), D, N, P, False)
        e, total, top, gate = _scores(q, k, pos, n, scale * LOG2E, B, N, True, DOT)
        dp = tl.dot(grad, tl.trans(v), input_precision=DOT)
        _, ds = _gradient(e, total, top, gate, dp, lse, delta, pos, n, B, N, True)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)
    _store(DQ + b.to(tl.int64) * d0 + h.to(tl.int64) * d1, d2, first, left, dq * scale, D, M, P)


@triton.jit
def _add_kv(
    dk, dv, k, v, Q, Grad, Lse, Delta, q2, g2, first, offset, n, queries, scale,
    B: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """dk and dv of block n with what queries first ... first + M add. Queries that do not exist weigh nothing: lse = inf."""
    rows = first + tl.arange(0, M)
    q = _load(Q, q2, first, queries - first, D, M, P, False)
    grad = _load(Grad, g2, first, queries - first, D, M, P, False)
    lse = tl.load(Lse + rows, mask=rows < queries, other=float("inf")) * LOG2E
    delta = tl.load(Delta + rows, mask=rows < queries, other=0.0)
    e, total, top, gate = _scores(q, k, offset + rows, n, scale * LOG2E, B, N, NEAR, DOT)
    dp = tl.dot(grad, tl.trans(v), input_precision=DOT)
    w, ds = _gradient(e, total, top, gate, dp, lse, delta, offset + rows, n, B, N, NEAR)
    dv = tl.dot(tl.trans(w.to(grad.dtype)), grad, dv, input_precision=DOT)
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=DOT)
    return dk, dv


@triton.jit
def gradient_kv(
    Q, K, V, Lse, Grad, DK, DV, Delta,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, d0, d1, d2,
    heads, group, queries, keys, scale,
    B: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of one key head, over all queries of its group. Grid: (batch * key heads, blocks), longest first."""
    count = heads // group
    b, hk = tl.program_id(0) // count, tl.program_id(0) % count
    n = tl.program_id(1)
    size = tl.minimum(keys - n * B, B)
    k = _load(K + b.to(tl.int64) * k0 + hk.to(tl.int64) * k1, k2, n * B, size, D, N, P, False)
    v = _load(V + b.to(tl.int64) * v0 + hk.to(tl.int64) * v1, v2, n * B, size, D, N, P, False)
    offset = keys - queries
    first = tl.maximum(n * B - offset, 0)  # the first query that sees the block
    own = tl.cdiv(tl.maximum((n + 1) * B - offset - first, 0), M)  # tiles with queries of the block itself
    tiles = tl.cdiv(queries - first, M)
    own = tl.minimum(own, tiles)

    dk = tl.zeros([N, P], tl.float32)
    dv = tl.zeros([N, P], tl.float32)
    for j in range(0, group):
        h = hk * group + j
        q = Q + b.to(tl.int64) * q0 + h.to(tl.int64) * q1
        g = Grad + b.to(tl.int64) * g0 + h.to(tl.int64) * g1
        line = (b * heads + h).to(tl.int64) * queries
        for i in range(0, own):
            dk, dv = _add_kv(
                dk, dv, k, v, q, g, Lse + line, Delta + line, q2, g2, first + i * M, offset, n, queries, scale,
                B, D, M, N, P, DOT, True,
            )  # fmt: skip
        for i in range(0, tiles - own):
            dk, dv = _add_kv(
                dk, dv, k, v, q, g, Lse + line, Delta + line, q2, g2, first + (own + i) * M, offset, n, queries,
                scale, B, D, M, N, P, DOT, False,
            )  # fmt: skip
    _store(DK + b.to(tl.int64) * d0 + hk.to(tl.int64) * d1, d2, n * B, size, dk * scale, D, N, P)
    _store(DV + b.to(tl.int64) * d0 + hk.to(tl.int64) * d1, d2, n * B, size, dv, D, N, P)
