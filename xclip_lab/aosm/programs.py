"""The Triton programs behind `kernels.py`: one tile of texts x videos each, forward and backward.

A tile's scores `[BT, WP, BV, FP]` (texts, words, videos, frames) are one product on the tensor cores and
never leave the chip; WP and FP are W and F padded. Both softmaxes take the exact maximum of their column or
row, so that no temperature and no distance overflows. The matrices come as `C = M - I`: what a product
rounds is the correction alone. a, b are the first stage over words and over frames, alpha, beta the weights
of the second, x, y its results.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(texts, videos, BT: tl.constexpr, BV: tl.constexpr):
    """First text and first video of this program: sixteen text tiles at a time walk along the videos, so that
    programs that run together share what they read through the L2 cache."""
    program = tl.program_id(0)
    across, down = tl.cdiv(videos, BV), tl.cdiv(texts, BT)
    first = program // (16 * across) * 16
    height = tl.minimum(down - first, 16)
    inside = program % (16 * across)
    return (first + inside % height) * BT, inside // height * BV


@triton.jit
def _real(mask, first, count, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr):
    """`[BLOCK, NP]`: which tokens take part. Rows beyond the last are whole, so that they stay finite."""
    row, slot = first + tl.arange(0, BLOCK)[:, None], tl.arange(0, NP)[None, :]
    real = tl.broadcast_to(slot < N, (BLOCK, NP))
    if mask is not None:
        at = mask + row.to(tl.int64) * N + slot
        real = real & (tl.load(at, mask=real & (row < count), other=1) != 0)
    return real


@triton.jit
def _places(tokens, first, count, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """`[BLOCK * NP]`: where each token's features begin, and whether there is such a token."""
    place = tl.arange(0, BLOCK * NP)
    row, slot = first + place // NP, place % NP
    return tokens + (row.to(tl.int64) * N + slot) * D, (row < count) & (slot < N)


@triton.jit
def _features(at, here, start, BD: tl.constexpr, D: tl.constexpr):
    """`[tokens, BD]`: their features from `start` on, 0 for padding."""
    d = start + tl.arange(0, BD)
    if D % BD == 0:
        return tl.load(at[:, None] + d[None, :], mask=here[:, None], other=0.0)
    return tl.load(at[:, None] + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _scores(
    words, frames, text, video, texts, videos,
    W: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr,
    TWICE: tl.constexpr,
):  # fmt: skip
    """`words frames^T` of BT texts with BV videos, `[BT, WP, BV, FP]` in float32, and with the BV videos
    after them where `TWICE`: one reading of the words then serves both. One product in TF32 would round
    float32 features like float16; the three of tf32x3 keep them."""
    words_at, words_here = _places(words, text, texts, W, WP, BT, D)
    frames_at, frames_here = _places(frames, video, videos, F, FP, BV, D)
    next_at, next_here = _places(frames, video + BV, videos, F, FP, BV, D)
    scores = tl.zeros((BT * WP, BV * FP), tl.float32)
    others = scores
    for start in range(0, D, BD):
        left = _features(words_at, words_here, start, BD, D)
        right = _features(frames_at, frames_here, start, BD, D)
        scores = tl.dot(left, tl.trans(right), scores, input_precision="tf32x3")
        if TWICE:
            right = _features(next_at, next_here, start, BD, D)
            others = tl.dot(left, tl.trans(right), others, input_precision="tf32x3")
    return tl.reshape(scores, (BT, WP, BV, FP)), tl.reshape(others, (BT, WP, BV, FP))


@triton.jit
def _correction(corrections, which, N: tl.constexpr, NP: tl.constexpr):
    """Matrix number `which` of `corrections [2, N, N]`, padded with zeros."""
    i, k = tl.arange(0, NP)[:, None], tl.arange(0, NP)[None, :]
    return tl.load(corrections + which * N * N + i * N + k, mask=(i < N) & (k < N), other=0.0)


@triton.jit
def _over_words(x, matrix, BT: tl.constexpr, WP: tl.constexpr, BV: tl.constexpr, FP: tl.constexpr):
    """`x` times `matrix` along the words."""
    rows = tl.reshape(tl.permute(x, (0, 2, 3, 1)), (BT * BV * FP, WP))
    product = tl.reshape(tl.dot(rows, matrix, input_precision="tf32x3"), (BT, BV, FP, WP))
    return tl.permute(product, (0, 3, 1, 2))


@triton.jit
def _over_frames(x, matrix, BT: tl.constexpr, WP: tl.constexpr, BV: tl.constexpr, FP: tl.constexpr):
    """`x` times `matrix` along the frames."""
    rows = tl.reshape(x, (BT * WP * BV, FP))
    return tl.reshape(tl.dot(rows, matrix, input_precision="tf32x3"), (BT, WP, BV, FP))


@triton.jit
def _times(x, matrix, ROWS: tl.constexpr):
    """`x [ROWS, N]` times `matrix [N, N]`; a product on the tensor cores takes 16 rows."""
    if ROWS >= 16:
        return tl.dot(x, matrix, input_precision="tf32x3")
    return tl.sum(x[:, :, None] * matrix[None, :, :], axis=1)


@triton.jit
def _outer(x, y, ROWS: tl.constexpr):
    """`x^T y` of `[ROWS, N]` each."""
    if ROWS >= 16:
        return tl.dot(tl.trans(x), y, input_precision="tf32x3")
    return tl.sum(x[:, :, None] * y[:, None, :], axis=0)


@triton.jit
def _powers(x, real, scale, axis: tl.constexpr, HOLES: tl.constexpr):
    """exp of `x / tau` less its maximum along `axis`, 0 where not real; `scale` = log2(e) / tau."""
    if HOLES:
        x = tl.where(real, x, float("-inf"))
    return tl.exp2((x - tl.max(x, axis, keep_dims=True)) * scale)


@triton.jit
def _second(x, real, corrections, scale, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr,
            HOLES: tl.constexpr, MIX: tl.constexpr):  # fmt: skip
    """`attend` over `x [ROWS, NP]`: x without padding, x mixed, the weights, and the result `[ROWS]`."""
    if HOLES:
        x = tl.where(real, x, 0.0)
    mixed = x
    if MIX:
        mixed = x + _times(x, tl.trans(_correction(corrections, 1, N, NP)), ROWS)
    powers = _powers(x, real, scale, 1, HOLES)
    weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    return x, mixed, weights, tl.sum(weights * mixed, axis=1)


@triton.jit
def _second_gradient(half, mixed, weights, value, real, corrections, k, N: tl.constexpr, NP: tl.constexpr,
                     ROWS: tl.constexpr, HOLES: tl.constexpr, MIX: tl.constexpr):  # fmt: skip
    """Of `x` in `_second`, `[ROWS, NP]`, for the gradient `half [ROWS]` of its result."""
    gradient = weights + k * weights * (mixed - value[:, None])
    if MIX:
        gradient += _times(weights, _correction(corrections, 1, N, NP), ROWS)
    if HOLES:
        gradient = tl.where(real, gradient, 0.0)
    return half[:, None] * gradient


@triton.jit
def _store_square(out, at, x, N: tl.constexpr, NP: tl.constexpr):
    """`x [NP, NP]` into square number `at` of `out [..., N, N]`."""
    i, k = tl.arange(0, NP)[:, None], tl.arange(0, NP)[None, :]
    tl.store(out + at.to(tl.int64) * N * N + i * N + k, x, mask=(i < N) & (k < N))


@triton.jit
def _write_scores(
    scores, out, word_mask, frame_mask, word_corrections, frame_corrections, text, video, texts, videos,
    scale,
    W: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr,
    MIX_WORDS: tl.constexpr, MIX_FRAMES: tl.constexpr,
):  # fmt: skip
    """From `scores [BT, WP, BV, FP]` to BT x BV numbers of `out`."""
    word_holes: tl.constexpr = W < WP or word_mask is not None
    frame_holes: tl.constexpr = F < FP or frame_mask is not None
    real_words = _real(word_mask, text, texts, W, WP, BT)  # [BT, WP]
    real_frames = _real(frame_mask, video, videos, F, FP, BV)  # [BV, FP]
    word_here, frame_here = real_words[:, :, None, None], real_frames[None, None, :, :]
    if word_mask is not None:
        scores = tl.where(word_here, scores, 0.0)
    if frame_mask is not None:
        scores = tl.where(frame_here, scores, 0.0)

    mixed = scores
    if MIX_WORDS:
        matrix = tl.trans(_correction(word_corrections, 0, W, WP))
        mixed = scores + _over_words(scores, matrix, BT, WP, BV, FP)
    powers = _powers(scores, word_here, scale, 1, word_holes)
    a = tl.sum(powers * mixed, axis=1) / tl.sum(powers, axis=1)  # [BT, BV, FP]
    mixed = scores
    if MIX_FRAMES:
        matrix = tl.trans(_correction(frame_corrections, 0, F, FP))
        mixed = scores + _over_frames(scores, matrix, BT, WP, BV, FP)
    powers = _powers(scores, frame_here, scale, 3, frame_holes)
    b = tl.sum(powers * mixed, axis=3) / tl.sum(powers, axis=3)  # [BT, WP, BV]

    ROWS: tl.constexpr = BT * BV
    a = tl.reshape(a, (ROWS, FP))
    b = tl.reshape(tl.permute(b, (0, 2, 1)), (ROWS, WP))
    frame_real = tl.reshape(tl.broadcast_to(real_frames[None, :, :], (BT, BV, FP)), (ROWS, FP))
    word_real = tl.reshape(tl.broadcast_to(real_words[:, None, :], (BT, BV, WP)), (ROWS, WP))
    _a, _n, _alpha, x = _second(a, frame_real, frame_corrections, scale, F, FP, ROWS, frame_holes, MIX_FRAMES)
    _b, _m, _beta, y = _second(b, word_real, word_corrections, scale, W, WP, ROWS, word_holes, MIX_WORDS)
    pair = tl.arange(0, ROWS)
    t, v = text + pair // BV, video + pair % BV
    tl.store(out + t.to(tl.int64) * videos + v, (x + y) / 2, mask=(t < texts) & (v < videos))


@triton.jit(do_not_specialize=["texts", "videos"])
def forward(
    words, frames, word_mask, frame_mask, word_corrections, frame_corrections, out, texts, videos, scale,
    W: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr,
    MIX_WORDS: tl.constexpr, MIX_FRAMES: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """`out [texts, videos]` of `words [texts, W, D]` and `frames [videos, F, D]`."""
    text, video = _tile(texts, videos, BT, BV * 2 if TWICE else BV)
    scores, others = _scores(words, frames, text, video, texts, videos, W, F, D, BT, BV, WP, FP, BD, TWICE)
    _write_scores(
        scores, out, word_mask, frame_mask, word_corrections, frame_corrections, text, video, texts, videos,
        scale,
        W, F, BT, BV, WP, FP, MIX_WORDS, MIX_FRAMES,
    )  # fmt: skip
    if TWICE:
        _write_scores(
            others, out, word_mask, frame_mask, word_corrections, frame_corrections, text, video + BV, texts,
            videos, scale, W, F, BT, BV, WP, FP, MIX_WORDS, MIX_FRAMES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["texts", "videos"])
def backward(
    words, frames, word_mask, frame_mask, word_corrections, frame_corrections, grad,
    of_scores, of_word_matrices, of_frame_matrices, texts, videos, k, scale,
    W: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr,
    MIX_WORDS: tl.constexpr, MIX_FRAMES: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """For `grad [texts, videos]`: `of_scores [texts * W, videos * F]`, and this program's own part of the
    gradients `of_word_matrices [programs, 2, W, W]` and `of_frame_matrices [programs, 2, F, F]` (or None)."""
    word_holes: tl.constexpr = W < WP or word_mask is not None
    frame_holes: tl.constexpr = F < FP or frame_mask is not None
    ROWS: tl.constexpr = BT * BV
    text, video = _tile(texts, videos, BT, BV)
    real_words = _real(word_mask, text, texts, W, WP, BT)
    real_frames = _real(frame_mask, video, videos, F, FP, BV)
    word_here, frame_here = real_words[:, :, None, None], real_frames[None, None, :, :]
    frame_real = tl.reshape(tl.broadcast_to(real_frames[None, :, :], (BT, BV, FP)), (ROWS, FP))
    word_real = tl.reshape(tl.broadcast_to(real_words[:, None, :], (BT, BV, WP)), (ROWS, WP))
    pair = tl.arange(0, ROWS)
    t, v = text + pair // BV, video + pair % BV
    half = tl.load(grad + t.to(tl.int64) * videos + v, mask=(t < texts) & (v < videos), other=0.0) / 2

    scores, _ = _scores(words, frames, text, video, texts, videos, W, F, D, BT, BV, WP, FP, BD, TWICE)
    if word_mask is not None:
        scores = tl.where(word_here, scores, 0.0)
    if frame_mask is not None:
        scores = tl.where(frame_here, scores, 0.0)

    # Over the words: a, and what comes back through it.
    mixed = scores
    if MIX_WORDS:
        mixed = scores + _over_words(
            scores, tl.trans(_correction(word_corrections, 0, W, WP)), BT, WP, BV, FP
        )
    powers = _powers(scores, word_here, scale, 1, word_holes)
    weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    a = tl.sum(weights * mixed, axis=1)  # [BT, BV, FP]
    first, n, alpha, x = _second(
        tl.reshape(a, (ROWS, FP)), frame_real, frame_corrections, scale, F, FP, ROWS, frame_holes, MIX_FRAMES
    )
    da = _second_gradient(
        half, n, alpha, x, frame_real, frame_corrections, k, F, FP, ROWS, frame_holes, MIX_FRAMES
    )
    A = weights * tl.reshape(da, (BT, 1, BV, FP))
    gradient = A + k * A * (mixed - a[:, None, :, :])
    if MIX_WORDS:
        gradient += _over_words(A, _correction(word_corrections, 0, W, WP), BT, WP, BV, FP)
    if of_word_matrices is not None:
        across = tl.reshape(tl.permute(A, (0, 2, 3, 1)), (ROWS * FP, WP))
        along = tl.reshape(tl.permute(scores, (0, 2, 3, 1)), (ROWS * FP, WP))
        _store_square(of_word_matrices, 2 * tl.program_id(0), _outer(across, along, ROWS * FP), W, WP)
    if of_frame_matrices is not None:
        at = 2 * tl.program_id(0) + 1
        _store_square(of_frame_matrices, at, _outer(half[:, None] * alpha, first, ROWS), F, FP)

    # Over the frames: b, likewise.
    mixed = scores
    if MIX_FRAMES:
        mixed = scores + _over_frames(
            scores, tl.trans(_correction(frame_corrections, 0, F, FP)), BT, WP, BV, FP
        )
    powers = _powers(scores, frame_here, scale, 3, frame_holes)
    weights = powers / tl.sum(powers, axis=3, keep_dims=True)
    b = tl.sum(weights * mixed, axis=3)  # [BT, WP, BV]
    first, n, beta, y = _second(
        tl.reshape(tl.permute(b, (0, 2, 1)), (ROWS, WP)),
        word_real, word_corrections, scale, W, WP, ROWS, word_holes, MIX_WORDS,
    )  # fmt: skip
    db = _second_gradient(
        half, n, beta, y, word_real, word_corrections, k, W, WP, ROWS, word_holes, MIX_WORDS
    )
    B = weights * tl.permute(tl.reshape(db, (BT, BV, WP)), (0, 2, 1))[:, :, :, None]
    gradient += B + k * B * (mixed - b[:, :, :, None])
    if MIX_FRAMES:
        gradient += _over_frames(B, _correction(frame_corrections, 0, F, FP), BT, WP, BV, FP)
    if of_frame_matrices is not None:
        across, along = tl.reshape(B, (ROWS * WP, FP)), tl.reshape(scores, (ROWS * WP, FP))
        _store_square(of_frame_matrices, 2 * tl.program_id(0), _outer(across, along, ROWS * WP), F, FP)
    if of_word_matrices is not None:
        at = 2 * tl.program_id(0) + 1
        _store_square(of_word_matrices, at, _outer(half[:, None] * beta, first, ROWS), W, WP)

    row, column = tl.arange(0, BT * WP), tl.arange(0, BV * FP)
    t, w, v, f = text + row // WP, row % WP, video + column // FP, column % FP
    if word_mask is not None:
        gradient = tl.where(word_here, gradient, 0.0)
    if frame_mask is not None:
        gradient = tl.where(frame_here, gradient, 0.0)
    place = (t.to(tl.int64) * W + w)[:, None] * videos * F + (v * F + f)[None, :]
    inside = ((t < texts) & (w < W))[:, None] & ((v < videos) & (f < F))[None, :]
    tl.store(of_scores + place, tl.reshape(gradient, (BT * WP, BV * FP)), mask=inside)
