"""X-CLIP and the official recipe written down once more, plainly. Nothing here imports the package: the tests
hold it against this.

Weights are a dict `p` by official names. Masks are 1 for real; `hide` is added to attention scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

Weights = dict[str, Tensor]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def linear(x: Tensor, p: Weights, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(x: Tensor, p: Weights, name: str, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def attention(queries: Tensor, tokens: Tensor, p: Weights, name: str, heads: int, hide: Tensor) -> Tensor:
    """`queries [B, Q, D]` gather from `tokens [B, N, D]`; `hide` is broadcastable to `[B, heads, Q, N]`."""
    of_query, of_key, of_value = p[f"{name}.in_proj_weight"].chunk(3)
    bias_query, bias_key, bias_value = p[f"{name}.in_proj_bias"].chunk(3)
    query = queries @ of_query.T + bias_query
    key, value = tokens @ of_key.T + bias_key, tokens @ of_value.T + bias_value
    size = query.shape[-1] // heads
    hide = hide.expand(len(query), heads, query.shape[1], key.shape[1])
    gathered = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size) + hide[:, head]
        gathered.append(scores.softmax(-1) @ value[..., part])
    return linear(torch.cat(gathered, -1), p, f"{name}.out_proj")


def transformer(
    x: Tensor, p: Weights, name: str, layers: int, heads: int, hide: Tensor, eps: float
) -> Tensor:
    """Pre-norm blocks with QuickGELU."""
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}"
        inner = norm(x, p, f"{block}.ln_1", eps)
        x = x + attention(inner, inner, p, f"{block}.attn", heads, hide)
        inner = linear(norm(x, p, f"{block}.ln_2", eps), p, f"{block}.mlp.c_fc")
        x = x + linear(quick_gelu(inner), p, f"{block}.mlp.c_proj")
    return x


def added(x: Tensor, mask: Tensor, p: Weights, name: str, layers: int, mixed: bool = False) -> Tensor:
    """Blocks added to the towers: a head for each 64 of the width, -1e6 on padded keys, epsilon 1e-12.

    `mixed`: head h of row b takes the mask of row (b * heads + h) mod B.
    """
    batch, heads = len(x), max(1, x.shape[-1] // 64)
    hide = [[mask[(b * heads + h) % batch if mixed else b] for h in range(heads)] for b in range(batch)]
    hidden = -1e6 * (1 - torch.stack([torch.stack(row) for row in hide]).float())
    return transformer(x, p, name, layers, heads, hidden[:, :, None], 1e-12)


def text_tower(
    ids: Tensor, p: Weights, layers: int, heads: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sentences `[B, D]` and words `[B, W, D]`. `mask`: GLSCL also hides padded words."""
    length = ids.shape[1]
    x = p["clip.token_embedding.weight"][ids] + p["clip.positional_embedding"][:length]
    hide = torch.full((length, length), -math.inf).triu(1)[None, None]
    if mask is not None:
        hide = hide + torch.zeros(mask.shape).masked_fill(mask == 0, -math.inf)[:, None, None]
    x = transformer(x, p, "clip.transformer", layers, heads, hide, 1e-5)
    words = norm(x, p, "clip.ln_final", 1e-5) @ p["clip.text_projection"]
    return torch.stack([words[row, ids[row].argmax()] for row in range(len(ids))]), words


def image_tower(pixels: Tensor, mask: Tensor, p: Weights, layers: int, heads: int) -> Tensor:
    """uint8 pixels `[B, F, 3, S, S]` to frames `[B, F, D]`; padded frames are zeros once normalised."""
    mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
    images = (pixels.float() / 255 - mean) / deviation * mask[:, :, None, None, None]
    kernel = p["clip.visual.conv1.weight"]
    side = kernel.shape[-1]
    rows = [
        images[..., top : top + side, left : left + side].flatten(2)
        for top in range(0, images.shape[-2], side)
        for left in range(0, images.shape[-1], side)
    ]
    patches = (torch.stack(rows, 2) @ kernel.flatten(1).T).flatten(0, 1)
    first = p["clip.visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], 1) + p["clip.visual.positional_embedding"]
    x = norm(x, p, "clip.visual.ln_pre", 1e-5)
    x = transformer(x, p, "clip.visual.transformer", layers, heads, torch.zeros(1, 1, 1, 1), 1e-5)
    frames = norm(x[:, 0], p, "clip.visual.ln_post", 1e-5) @ p["clip.visual.proj"]
    return frames.unflatten(0, pixels.shape[:2])


def seq_transf(frames: Tensor, mask: Tensor, p: Weights, layers: int) -> Tensor:
    positioned = frames + p["frame_position_embeddings.weight"][: frames.shape[1]]
    return added(positioned, mask, p, "transformerClip", layers) + frames


def pooled(frames: Tensor, mask: Tensor) -> Tensor:
    means = []
    for video, real in zip(frames, mask, strict=True):
        means.append(torch.stack([unit(f) for f, r in zip(video, real, strict=True) if r]).mean(0))
    return unit(torch.stack(means))


def xclip_scores(
    sentences: Tensor, words: Tensor, videos: Tensor, frames: Tensor, p: Weights, tau: float
) -> Tensor:
    """`[T, V]` before the scale; `frames` are those before the temporal module. Padding takes part."""

    def attended(x: Tensor, mixing: str) -> Tensor:
        return (x / tau).softmax(-1) @ p[mixing] @ x

    scores = []
    for sentence, tokens in zip(unit(sentences), unit(words), strict=True):
        for video, of_video in zip(videos, unit(frames), strict=True):
            matrix = (tokens @ p["local_mat_weight"]) @ of_video.T  # [W, F]
            by_frame = torch.stack([attended(column, "word_mat_weight") for column in matrix.T])
            by_word = torch.stack([attended(row, "frame_mat_weight") for row in matrix])
            fine = attended(by_frame, "frame_mat_weight2") + attended(by_word, "word_mat_weight2")
            coarse = sentence @ p["global_mat_weight"] @ video
            video_word = attended(tokens @ video, "word_logit_weight")
            sentence_frame = attended(of_video @ sentence, "frame_logit_weight")
            scores.append((coarse + video_word + sentence_frame + fine / 2) / 4)
    return torch.stack(scores).view(len(sentences), len(videos))


def contrastive(logits: Tensor) -> Tensor:
    """Mean of the cross entropies of rows and of columns, the right answers on the diagonal."""
    total = logits.new_zeros(())
    for right in range(len(logits)):
        row, column = logits[right], logits[:, right]
        total = total + row.logsumexp(0) + column.logsumexp(0) - 2 * logits[right, right]
    return total / (2 * len(logits))


def frozen(name: str) -> bool:
    """`freeze_layer_num=0`."""
    stems = ("token_embedding", "positional_embedding", "visual.class_embedding", "visual.conv1")
    stems += ("visual.positional_embedding", "visual.ln_pre")
    return name.startswith(tuple(f"clip.{stem}" for stem in stems))


class BertAdam:
    """With the global clip before it and the clamp of the scale after it.

    Args:
        p: what is trained. lr: of what is new; the towers' is `lr * coef_lr`. steps: where the cosine ends.
    """

    def __init__(self, p: Weights, lr: float, coef_lr: float, steps: int, warmup: float) -> None:
        self.p, self.lr, self.coef_lr, self.steps, self.warmup = p, lr, coef_lr, steps, warmup
        self.moments = {name: (torch.zeros_like(x), torch.zeros_like(x), 0) for name, x in p.items()}

    @torch.no_grad()
    def step(self, gradients: Weights) -> None:
        """One update; `gradients` holds those of the parameters that have one."""
        norm_of_all = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        share = min(1.0, 1.0 / (norm_of_all + 1e-6))
        for name, gradient in gradients.items():
            g = gradient * share
            g = g * min(1.0, 1.0 / (float(g.norm()) + 1e-6))
            first, second, done = self.moments[name]
            first, second = 0.9 * first + 0.1 * g, 0.98 * second + 0.02 * g * g
            self.moments[name] = (first, second, done + 1)
            update = first / (second.sqrt() + 1e-6)
            if "bias" not in name and "LayerNorm.weight" not in name:
                update = update + 0.2 * self.p[name]
            progress = done / self.steps
            if progress < self.warmup:
                factor = progress / self.warmup
            else:
                factor = 0.5 * (1 + math.cos(math.pi * progress))
            rate = self.lr * (self.coef_lr if name.startswith("clip.") else 1.0)
            self.p[name] -= rate * factor * update
        self.p["clip.logit_scale"].clamp_(max=math.log(100))
