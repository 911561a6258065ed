"""The Triton programs behind `kernels.py`: one tile of texts x videos each, forward and backward.

A tile's scores `[BT, WP, BV, FP]` (texts, words, videos, frames) are one product on the tensor cores and
never leave the chip; WP and FP are W and F padded. Both softmaxes take the exact maximum of their column or
row, so that no temperature and no distance overflows. The matrices come as `C = M - I`: what a product
rounds is the correction alone. Both directions are the same along one axis of the tile or another, `AXIS` 1
(the words) or 3 (the frames).
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
def _rows(x, AXIS: tl.constexpr):
    """`x [BT, WP, BV, FP]` as a matrix whose columns are its `AXIS`."""
    if AXIS == 1:
        x = tl.permute(x, (0, 2, 3, 1))
    return tl.reshape(x, (x.shape[0] * x.shape[1] * x.shape[2], x.shape[3]))


@triton.jit
def _mix(x, matrix, AXIS: tl.constexpr):
    """`x [BT, WP, BV, FP]` times `matrix` along `AXIS`."""
    product = tl.dot(_rows(x, AXIS), matrix, input_precision="tf32x3")
    if AXIS == 1:
        product = tl.reshape(product, (x.shape[0], x.shape[2], x.shape[3], x.shape[1]))
        product = tl.permute(product, (0, 3, 1, 2))
    return tl.reshape(product, (x.shape[0], x.shape[1], x.shape[2], x.shape[3]))


@triton.jit
def _pairs(x, AXIS: tl.constexpr):
    """`x [BT, WP, BV, FP]`, of length 1 along `AXIS`, as `[BT * BV, the other]`."""
    if AXIS == 3:
        x = tl.permute(x, (0, 3, 2, 1))
    return tl.reshape(x, (x.shape[0] * x.shape[2], x.shape[3]))


@triton.jit
def _unpairs(x, AXIS: tl.constexpr, BT: tl.constexpr):
    """Undoes `_pairs`."""
    x = tl.reshape(x, (BT, 1, x.shape[0] // BT, x.shape[1]))
    if AXIS == 3:
        x = tl.permute(x, (0, 3, 2, 1))
    return x


@triton.jit
def _times(x, matrix):
    """`x [ROWS, N]` times `matrix [N, N]`; a product on the tensor cores takes 16 rows."""
    if x.shape[0] >= 16:
        product = tl.dot(x, matrix, input_precision="tf32x3")
    else:
        product = tl.sum(x[:, :, None] * matrix[None, :, :], axis=1)
    return product


@triton.jit
def _powers(x, real, scale, axis: tl.constexpr, HOLES: tl.constexpr):
    """exp of `x / tau` less its maximum along `axis`, 0 where not real; `scale` = log2(e) / tau."""
    if HOLES:
        x = tl.where(real, x, float("-inf"))
    return tl.exp2((x - tl.max(x, axis, keep_dims=True)) * scale)


@triton.jit
def _first(scores, real, corrections, scale, AXIS: tl.constexpr, N: tl.constexpr, HOLES: tl.constexpr,
           MIX: tl.constexpr):  # fmt: skip
    """The first stage along `AXIS`: the scores mixed, the softmax's numerators and sums, and the result."""
    mixed = scores
    if MIX:
        mixed = scores + _mix(scores, tl.trans(_correction(corrections, 0, N, scores.shape[AXIS])), AXIS)
    powers = _powers(scores, real, scale, AXIS, HOLES)
    sums = tl.sum(powers, AXIS, keep_dims=True)
    return mixed, powers, sums, tl.sum(powers * mixed, AXIS, keep_dims=True) / sums


@triton.jit
def _second(x, real, corrections, scale, N: tl.constexpr, HOLES: tl.constexpr, MIX: tl.constexpr):
    """The second over `x [ROWS, NP]`: x without padding, x mixed, the weights, and the result `[ROWS]`."""
    if HOLES:
        x = tl.where(real, x, 0.0)
    mixed = x
    if MIX:
        mixed = x + _times(x, tl.trans(_correction(corrections, 1, N, x.shape[1])))
    powers = _powers(x, real, scale, 1, HOLES)
    weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    return x, mixed, weights, tl.sum(weights * mixed, axis=1)


@triton.jit
def _gradient(scores, here, real, half, own, other, k, scale, AXIS: tl.constexpr, N: tl.constexpr,
              M: tl.constexpr, HOLES: tl.constexpr, OTHER_HOLES: tl.constexpr, MIX: tl.constexpr,
              OTHER_MIX: tl.constexpr):  # fmt: skip
    """Of the scores, by the way over `AXIS` and then the other axis, for the gradient `half [ROWS]` of its
    result. Beside it what the matrices' gradients are products of: the scores with the second, the last two
    with each other, each pair's row by row.

    `own [2, N, N]` are the corrections along `AXIS`, which is `here`, `other [2, M, M]` along the other,
    which is `real`."""
    mixed, powers, sums, value = _first(scores, here, own, scale, AXIS, N, HOLES, MIX)
    x, x_mixed, weights, result = _second(_pairs(value, AXIS), real, other, scale, M, OTHER_HOLES, OTHER_MIX)
    of_x = weights + k * weights * (x_mixed - result[:, None])
    if OTHER_MIX:
        of_x += _times(weights, _correction(other, 1, M, x.shape[1]))
    if OTHER_HOLES:
        of_x = tl.where(real, of_x, 0.0)
    weighted = powers * (_unpairs(half[:, None] * of_x, AXIS, scores.shape[0]) / sums)
    gradient = weighted + k * weighted * (mixed - value)
    if MIX:
        gradient += _mix(weighted, _correction(own, 0, N, scores.shape[AXIS]), AXIS)
    return gradient, weighted, half[:, None] * weights, x


@triton.jit
def _tokens(
    word_mask, frame_mask, text, video, texts, videos,
    W: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """Which words and frames are real, as they stand in a tile and, pair by pair, in the second stage."""
    words = _real(word_mask, text, texts, W, WP, BT)[:, :, None]
    frames = _real(frame_mask, video, videos, F, FP, BV)[None, :, :]
    word_pairs = tl.reshape(tl.permute(tl.broadcast_to(words, (BT, WP, BV)), (0, 2, 1)), (BT * BV, WP))
    frame_pairs = tl.reshape(tl.broadcast_to(frames, (BT, BV, FP)), (BT * BV, FP))
    return words[:, :, :, None], frames[:, None, :, :], word_pairs, frame_pairs


@triton.jit
def _without(scores, word_mask, frame_mask, words, frames):
    """0 where a mask says padding."""
    if word_mask is not None:
        scores = tl.where(words, scores, 0.0)
    if frame_mask is not None:
        scores = tl.where(frames, scores, 0.0)
    return scores


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
    words, frames, word_pairs, frame_pairs = _tokens(
        word_mask, frame_mask, text, video, texts, videos, W, F, BT, BV, WP, FP
    )
    scores = _without(scores, word_mask, frame_mask, words, frames)
    _mixed, _powers, _sums, a = _first(scores, words, word_corrections, scale, 1, W, word_holes, MIX_WORDS)
    _mixed, _powers, _sums, b = _first(
        scores, frames, frame_corrections, scale, 3, F, frame_holes, MIX_FRAMES
    )
    a, b = _pairs(a, 1), _pairs(b, 3)
    _a, _mixed, _alpha, x = _second(a, frame_pairs, frame_corrections, scale, F, frame_holes, MIX_FRAMES)
    _b, _mixed, _beta, y = _second(b, word_pairs, word_corrections, scale, W, word_holes, MIX_WORDS)
    pair = tl.arange(0, BT * BV)
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


@triton.jit
def _store_tile(
    x, out, text, video, texts, videos,
    W: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr,
):  # fmt: skip
    """`x [BT, WP, BV, FP]` into `out [texts, W, videos, F]`."""
    row, column = tl.arange(0, BT * WP), tl.arange(0, BV * FP)
    t, w, v, f = text + row // WP, row % WP, video + column // FP, column % FP
    place = (t.to(tl.int64) * W + w)[:, None] * videos * F + (v * F + f)[None, :]
    inside = ((t < texts) & (w < W))[:, None] & ((v < videos) & (f < F))[None, :]
    tl.store(out + place, tl.reshape(x, (BT * WP, BV * FP)), mask=inside)


@triton.jit
def _store_pairs(x, out, t, v, texts, videos, N: tl.constexpr):
    """`x [ROWS, NP]` of the pairs `t, v [ROWS]` into `out [texts, videos, N]`."""
    slot = tl.arange(0, x.shape[1])[None, :]
    inside = ((t < texts) & (v < videos))[:, None] & (slot < N)
    tl.store(out + (t.to(tl.int64) * videos + v)[:, None] * N + slot, x, mask=inside)


# Part of the texts a time: the part decides on the alignment of what is read by the text, and each alignment
# would be compiled anew.
@triton.jit(do_not_specialize=["texts", "videos"], do_not_specialize_on_alignment=["word_mask", "grad"])
def backward(
    words, frames, word_mask, frame_mask, word_corrections, frame_corrections, grad,
    of_scores, tiles, of_words, of_frames, texts, videos, k, scale,
    W: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, WP: tl.constexpr, FP: tl.constexpr, BD: tl.constexpr,
    MIX_WORDS: tl.constexpr, MIX_FRAMES: tl.constexpr,
):  # fmt: skip
    """For `grad [texts, videos]`: `of_scores [texts, W, videos, F]`.

    And, unless they are None, what the gradients of the matrices are products of, row by row: `tiles`
    [3, texts, W, videos, F], the first with the second along the words and with the third along the frames;
    `of_words [2, texts, videos, W]` and `of_frames [2, texts, videos, F]`, for the second stage."""
    word_holes: tl.constexpr = W < WP or word_mask is not None
    frame_holes: tl.constexpr = F < FP or frame_mask is not None
    text, video = _tile(texts, videos, BT, BV)
    real_words, real_frames, word_pairs, frame_pairs = _tokens(
        word_mask, frame_mask, text, video, texts, videos, W, F, BT, BV, WP, FP
    )
    pair = tl.arange(0, BT * BV)
    t, v = text + pair // BV, video + pair % BV
    half = tl.load(grad + t.to(tl.int64) * videos + v, mask=(t < texts) & (v < videos), other=0.0) / 2
    scores, _ = _scores(words, frames, text, video, texts, videos, W, F, D, BT, BV, WP, FP, BD, False)
    scores = _without(scores, word_mask, frame_mask, real_words, real_frames)
    plane = texts.to(tl.int64) * videos
    if tiles is not None:
        _store_tile(scores, tiles, text, video, texts, videos, W, F, BT, BV, WP, FP)

    gradient, weighted, weights, a = _gradient(
        scores, real_words, frame_pairs, half, word_corrections, frame_corrections, k, scale, 1, W, F,
        word_holes, frame_holes, MIX_WORDS, MIX_FRAMES,
    )  # fmt: skip
    if tiles is not None:
        _store_tile(weighted, tiles + plane * W * F, text, video, texts, videos, W, F, BT, BV, WP, FP)
        _store_pairs(weights, of_frames, t, v, texts, videos, F)
        _store_pairs(a, of_frames + plane * F, t, v, texts, videos, F)
    more, weighted, weights, b = _gradient(
        scores, real_frames, word_pairs, half, frame_corrections, word_corrections, k, scale, 3, F, W,
        frame_holes, word_holes, MIX_FRAMES, MIX_WORDS,
    )  # fmt: skip
    if tiles is not None:
        _store_tile(weighted, tiles + plane * 2 * W * F, text, video, texts, videos, W, F, BT, BV, WP, FP)
        _store_pairs(weights, of_words, t, v, texts, videos, W)
        _store_pairs(b, of_words + plane * W, t, v, texts, videos, W)
    gradient = _without(gradient + more, word_mask, frame_mask, real_words, real_frames)
    _store_tile(gradient, of_scores, text, video, texts, videos, W, F, BT, BV, WP, FP)
