"""GLSCL (Zhang et al. 2024): a parameter-free global score and learned queries shared by both modalities."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import margin_ranking_loss, normalize, relu

from xclip_lab.aosm.formula import masked_softmax
from xclip_lab.blocks import added_linear
from xclip_lab.errors import ConfigError
from xclip_lab.heads.base import HEADS, Head, HeadOutput, Tap, masked_frame_mean
from xclip_lab.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from xclip_lab.tokens import TokenSet

if TYPE_CHECKING:
    from xclip_lab.config import TemporalConfig
    from xclip_lab.temporal import AggModule

DECODER_HEADS, FEED_FORWARD, DROPOUT = 8, 2048, 0.1
MARGIN = 0.1
"""Between the similarity of a query with itself and with another one (intra-diversity)."""
OVERLAP = 0.75
"""What inter-consistency wants the summed similarity of matching queries to be (ledger 18)."""
_TINY = 1e-12  # what is shorter counts as so long, as torch's `normalize` has it
QUERIES = "queries"
"""The name of the attended queries in `TokenSet.extra`."""
GRAM = "gram"
"""The name of the frames' products with each other `[V, F, F]` in `TokenSet.extra`."""


@dataclass(frozen=True)
class GlsclConfig:
    """GLSCL's settings.

    `queries` is Q, `layers` those of the decoder in which they attend. `query_share` and `cross_att_share`:
    whether texts and videos share queries and decoder. `temp` is the softmax temperature of the global score,
    `loss2_weight` weighs the local score, `alpha` the intra-diversity loss, `beta` a part of the
    inter-consistency loss (its MSR-VTT script has 0.02, its README 0.005: ledger 17). `feed_forward` is the
    decoder's inner width. `overlap_per_pair` takes the mean over the batch where the released code divides
    its sum by Q (ledger 18). `mask_padding` hides padded words and frames from the queries and the global
    weights; officially they take part (ledger 14).
    """

    name: str = "glscl"
    queries: PositiveInt = 8
    layers: PositiveInt = 3
    query_share: bool = True
    cross_att_share: bool = True
    temp: PositiveFloat = 3.0
    alpha: NonNegativeFloat = 1e-4
    beta: NonNegativeFloat = 0.005
    loss2_weight: NonNegativeFloat = 0.5
    feed_forward: PositiveInt = FEED_FORWARD
    overlap_per_pair: bool = False
    mask_padding: bool = False


@HEADS.register("glscl")
class GlsclHead(Head):
    """The head. Similarity carries no CLIP scale, the cross entropy does.

    `weight_fc` and the decoder templates are in the official checkpoints and have no effect: the released
    code computes a result of `weight_fc` for every pair and throws it away; here it is loaded and never
    computed.
    """

    config_class = GlsclConfig
    family = "glscl"
    official = MappingProxyType({"towers.mask_padded_words": True, "towers.freeze_conv1": True})
    scaled_similarity = False

    def __init__(self, config: GlsclConfig, width: int, max_words: int, max_frames: int) -> None:
        super().__init__(config, width, max_words, max_frames)
        self.noun_queries = nn.Parameter(torch.rand(config.queries, width))
        self.spatial_queries = nn.Parameter(torch.rand(config.queries, width))
        self.weight_fc = nn.Sequential(
            added_linear(2 * width, 4 * width), nn.ReLU(), added_linear(4 * width, 1)
        )
        self.decoder_layer_noun = QueryLayer(width, config.feed_forward)
        self.transformer_decoder_noun = QueryDecoder(self.decoder_layer_noun, config.layers)
        self.decoder_layer_spatial = QueryLayer(width, config.feed_forward)
        self.transformer_decoder_spatial = QueryDecoder(self.decoder_layer_spatial, config.layers)
        self.frame_softmax = Tap("[T, V, F]: over frames, for each sentence")
        self.global_score = Tap("[T, V]")
        self.query_score = Tap("[T, V]")

    @classmethod
    def check(cls, config: Any, temporal: TemporalConfig, width: int | None) -> None:
        """The decoder has 8 attention heads."""
        if width and width % DECODER_HEADS:
            raise ConfigError(
                f"towers.architecture.embed_dim: {width} is not allowed with head.name=glscl, whose decoder "
                f"has {DECODER_HEADS} attention heads (a multiple of {DECODER_HEADS} is)"
            )

    def no_weight_decay(self) -> set[str]:
        """The queries are positions of a kind."""
        return {"noun_queries", "spatial_queries"}

    def encode_text(self, text: TokenSet) -> TokenSet:
        """Adds the queries after they attended to the words, `[T, Q, D]`, normalised."""
        queries = self.spatial_queries if self.config.query_share else self.noun_queries
        attended = self.transformer_decoder_noun(queries, text.tokens, self._mask(text.mask))
        return TokenSet(text.pooled, text.tokens, text.mask, {QUERIES: normalize(attended, dim=-1)})

    def encode_video(self, frames: Tensor, mask: Tensor, temporal: AggModule) -> TokenSet:
        """Adds the queries after they attended to the frames, `[V, Q, D]`, normalised, and Gram matrices."""
        tokens = temporal(frames, mask)
        decoder = (
            self.transformer_decoder_noun if self.config.cross_att_share else self.transformer_decoder_spatial
        )
        attended = normalize(decoder(self.spatial_queries, tokens, self._mask(mask)), dim=-1)
        extra = {QUERIES: attended, GRAM: tokens @ tokens.mT}
        return TokenSet(masked_frame_mean(tokens, mask), tokens, mask, extra)

    def _mask(self, mask: Tensor) -> Tensor | None:
        return mask if self.config.mask_padding else None

    def forward(self, text: TokenSet, video: TokenSet) -> HeadOutput:
        """Global plus weighted local score; the auxiliary losses where texts and videos are pairs."""
        of_texts, of_videos = text.extra[QUERIES], video.extra[QUERIES]
        local = self.query_score(of_texts.flatten(1) @ of_videos.flatten(1).T / self.config.queries)
        logits = self.global_score(self._global(text, video)) + self.config.loss2_weight * local
        if len(text) != len(video):
            return HeadOutput(logits)
        return HeadOutput(
            logits,
            aux={
                "inter_consistency_loss": inter_consistency(
                    of_texts, of_videos, self.config.beta, self.config.overlap_per_pair
                ),
                "intra_diversity_loss": self.config.alpha * intra_diversity(of_videos),
            },
        )

    def _global(self, text: TokenSet, video: TokenSet) -> Tensor:
        """Cosine of a sentence with the frames as it weighs them (GLSCL 3.2), `[T, V]`.

        The weights are multiplied by the mask after a softmax in which padded frames took part, and not made
        to sum to 1 again: a cosine does not mind.
        """
        frames = video.tokens
        scores = torch.einsum("td,vfd->tvf", text.pooled, frames)
        weights = masked_softmax(scores / self.config.temp, self._mask(video.mask), -1)
        weights = self.frame_softmax(weights) * video.mask
        # The pooled video [T, V, D] itself is never needed: with the frames' Gram matrix G its length is
        # sqrt(w^T G w), and its product with the sentence the weighted sum of the frames'.
        across = torch.einsum("tvf,vfe->tve", weights, video.extra[GRAM])
        length = (across * weights).sum(-1).clamp(min=_TINY**2).sqrt()
        own_length = text.pooled.norm(dim=-1, keepdim=True).clamp(min=_TINY)
        return (weights * scores).sum(-1) / own_length / length


def inter_consistency(of_texts: Tensor, of_videos: Tensor, beta: float, per_pair: bool = False) -> Tensor:
    """The inter-consistency loss (GLSCL 3.4) of `[B, Q, D]` each; the released code calls it intra.

    The mean squared difference of the modalities' batch means, plus beta times, summed over queries, the
    squared difference of ((1/Q) * sum over the batch of <text query, video query>) from 0.75. The sum over
    the batch is divided by Q and not by B, so that it grows with the batch, unless `per_pair` (ledger 18).
    """
    means = (of_texts.mean(0) - of_videos.mean(0)).square().mean()
    batch, queries, _ = of_texts.shape
    matching = (of_texts * of_videos).sum((0, 2)) / (batch if per_pair else queries)
    return means + beta * (matching - OVERLAP).square().sum()


def intra_diversity(of_videos: Tensor) -> Tensor:
    """The intra-diversity loss (GLSCL 3.4) of `[B, Q, D]`: on the batch mean of the Gram matrices, a query is
    to be more like itself than like any other one, by a margin, along rows and along columns."""
    gram = torch.einsum("bqd,bpd->qp", of_videos, of_videos) / len(of_videos)
    count = len(gram)
    own = gram.diagonal()
    others = ~torch.eye(count, dtype=torch.bool, device=gram.device)
    rows, columns = own[:, None].expand_as(gram)[others], own[None].expand_as(gram)[others]
    ones = torch.ones_like(rows)
    lost = margin_ranking_loss(rows, gram[others], ones, MARGIN, reduction="sum")
    lost = lost + margin_ranking_loss(columns, gram[others], ones, MARGIN, reduction="sum")
    return lost / max(1, count * (count - 1))


class QueryAttention(nn.MultiheadAttention):
    """torch's attention with its parameters and their start, the weights on a tap and through a module."""

    def __init__(self, width: int, axes: str) -> None:
        super().__init__(width, DECODER_HEADS, batch_first=True)
        self.weights_softmax = Tap(axes)
        self.weights_dropout = nn.Dropout(DROPOUT)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`queries [B, Q, D]` gather from `tokens [B, N, D]`; `mask [B, N]`, 1 = real, or None."""
        to_query, to_key, to_value = self.in_proj_weight.chunk(3)
        of_query, of_key, of_value = self.in_proj_bias.chunk(3)
        query = self._split(queries @ to_query.T + of_query)
        key, value = self._split(tokens @ to_key.T + of_key), self._split(tokens @ to_value.T + of_value)
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5  # [B, H, Q, N]
        weights = masked_softmax(scores, None if mask is None else mask[:, None, None], -1)
        gathered = self.weights_dropout(self.weights_softmax(weights)) @ value
        return self.out_proj(gathered.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (DECODER_HEADS, self.head_dim)).transpose(1, 2)


class QueryLayer(nn.Module):
    """A layer in which queries attend to each other, then to tokens (post-norm, ReLU)."""

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        self.self_attn = QueryAttention(width, "[B, H, Q, Q]: over queries")
        self.multihead_attn = QueryAttention(width, "[B, H, Q, N]: over words or frames")
        self.linear1, self.linear2 = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(DROPOUT) for _ in range(4))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """`queries [B, Q, D]` after they saw each other and `tokens [B, N, D]`."""
        queries = self.norm1(queries + self.dropout1(self.self_attn(queries, queries)))
        queries = self.norm2(queries + self.dropout2(self.multihead_attn(queries, tokens, mask)))
        inner = self.dropout(relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout3(self.linear2(inner)))


class QueryDecoder(nn.Module):
    """Layers that start as copies of one, as officially."""

    def __init__(self, layer: QueryLayer, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """`queries [Q, D]`, the same for every row of `tokens [B, N, D]` -> `[B, Q, D]`."""
        x = queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            x = layer(x, tokens, mask)
        return x
