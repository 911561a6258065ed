"""CLIP's two towers through open_clip: token ids to sentence and words, pixels to frame vectors."""

from __future__ import annotations

import dataclasses

import open_clip
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from torch import Tensor, nn

from xclip_lab.blocks import first_positions
from xclip_lab.config import TowersConfig, TowerSizes
from xclip_lab.errors import ConfigError, InputError
from xclip_lab.pretrained import is_openai_archive, load_clip_weights, locate
from xclip_lab.registry import did_you_mean
from xclip_lab.tap import tap_attention


class Towers(CLIP):
    """open_clip's CLIP with the official parameter names, giving tokens as well as pooled features.

    Args:
        sizes: of both towers. half: keep matrices in fp16, as the official runs do.
        mask_padded_words: hide padded words from the text tower's attention, as GLSCL does.
    """

    def __init__(self, sizes: TowerSizes, half: bool = False, mask_padded_words: bool = False) -> None:
        super().__init__(
            sizes.embed_dim,
            {
                "image_size": sizes.image_size,
                "patch_size": sizes.patch_size,
                "width": sizes.vision_width,
                "layers": sizes.vision_layers,
                "head_width": sizes.vision_width // sizes.vision_heads,
            },
            {
                "context_length": sizes.context_length,
                "vocab_size": sizes.vocab_size,
                "width": sizes.text_width,
                "layers": sizes.text_layers,
                "heads": sizes.text_heads,
            },
            quick_gelu=sizes.quick_gelu,
            cast_dtype=torch.float16 if half else None,
        )
        self.sizes, self.mask_padded_words = sizes, mask_padded_words
        tap_attention(self.transformer)  # words; the visual one: the class token, then patches
        tap_attention(self.visual.transformer)

    def words(self, token_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sentence and word features (CLIP4Clip 3.2): every position through ln_final and the projection.

        The causal mask and the positions are cut to W. The sentence is the position of the largest token id.

        Args:
            token_ids: int64 `[B, W]`, W at most the context length.
            mask: `[B, W]`, 1 = real; used where `mask_padded_words` hides padded words from the attention.

        Returns:
            sentence `[B, D]`, words `[B, W, D]`, float32, not normalised.

        Raises:
            InputError: more words than positions, or (on the CPU) an id that is not in the vocabulary.
        """
        length = token_ids.shape[1]
        dtype = self.transformer.get_cast_dtype()
        positions = first_positions(self.positional_embedding, length, "words")
        try:
            x = self.token_embedding(token_ids).to(dtype) + positions.to(dtype)
        except IndexError as error:
            raise InputError(
                f"token_ids hold {token_ids.min()} to {token_ids.max()}: the vocabulary has 0 to "
                f"{self.sizes.vocab_size - 1}"
            ) from error
        attention = self.attn_mask[:length, :length]
        if self.mask_padded_words and mask is not None:
            hidden = torch.zeros_like(mask, dtype=attention.dtype).masked_fill(mask == 0, -torch.inf)
            attention = attention + hidden[:, None, :].repeat_interleave(self.sizes.text_heads, dim=0)
        x = self.ln_final(self.transformer(x, attn_mask=attention))
        words = (x @ self.text_projection).float()
        return words[torch.arange(len(words), device=words.device), sentence_places(token_ids)], words

    def frames(self, video: Tensor) -> Tensor:
        """One vector a frame, the class token after ln_post and proj.

        Args:
            video: `[B, F, 3, H, W]`, normalised pixels. Under the 3D patch each frame sees its neighbours.

        Returns:
            `[B, F, D]`, float32.
        """
        visual, shape = self.visual, video.shape[:2]
        video = video.to(visual.conv1.weight.dtype)
        if not hasattr(visual, "conv2"):
            return visual(video.flatten(0, 1)).float().unflatten(0, shape)
        patches = visual.conv2(video.transpose(1, 2)).transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        x = visual.transformer(visual.ln_pre(x))
        return (visual.ln_post(x[:, 0]) @ visual.proj).float().unflatten(0, shape)

    def add_3d_patch(self) -> None:
        """Embed patches over three frames (CLIP4Clip 3.1) by `conv2` in place of `conv1`, which stays unused.

        It starts as the 2D embedding: `conv1`'s weights at the middle frame, zeros at the others.
        """
        flat, patch = self.visual.conv1.weight, self.sizes.patch_size
        conv2 = nn.Conv3d(
            3,
            len(flat),
            (3, patch, patch),
            (1, patch, patch),
            padding=(1, 0, 0),
            bias=False,
            dtype=flat.dtype,
        )
        with torch.no_grad():
            conv2.weight.zero_()
            conv2.weight[:, :, 1] = flat
        self.visual.conv2 = conv2


def sentence_places(token_ids: Tensor) -> Tensor:
    """`[B]`, which of a caption's words stands for the sentence: the end mark, the largest id of all."""
    return token_ids.argmax(-1)


def build_towers(config: TowersConfig, load_pretrained: bool = True) -> Towers:
    """Towers as configured, with pretrained weights where the config names some.

    Raises:
        ConfigError: a name that open_clip does not know or that is no ViT; activation that does not fit the
            weights. CheckpointError: weights that are missing, unsafe or of other sizes.
    """
    sizes = config.architecture or sizes_of(str(config.name))
    _check_heads(sizes)
    half = config.precision == "fp16"
    towers = Towers(sizes, half, config.mask_padded_words)
    if config.pretrained and load_pretrained:
        path = locate(config.pretrained, config.name)
        if not sizes.quick_gelu and (config.pretrained == "openai" or is_openai_archive(path)):
            named = f"towers.name: {config.name!r} uses GELU", f"use {config.name}-quickgelu"
            told = "towers.architecture.quick_gelu: false is GELU", "set it to true"
            culprit, remedy = told if config.architecture else named
            raise ConfigError(f"{culprit} but OpenAI's weights were trained with QuickGELU; {remedy}")
        load_clip_weights(towers, path)
    if half:
        convert_weights_to_lp(towers, torch.float16)
    if config.linear_patch == "3d":
        towers.add_3d_patch()  # in the precision of the 2D patch
    towers.set_grad_checkpointing(config.gradient_checkpointing)
    towers.visual.conv1.weight.requires_grad_(not config.freeze_conv1)
    return towers


def sizes_of(name: str) -> TowerSizes:
    """The sizes of a ViT that open_clip knows by name.

    >>> sizes_of("ViT-B-32-quickgelu").patch_size
    32
    """
    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"towers.name: open_clip knows no model {name!r}{did_you_mean(name, known)}")
    spec = open_clip.get_model_config(name)
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    wanted_vision = {"image_size", "layers", "width", "patch_size", "head_width"}
    wanted_text = {"context_length", "vocab_size", "width", "heads", "layers"}
    if not (set(vision) <= wanted_vision and set(text) <= wanted_text and isinstance(vision["layers"], int)):
        raise ConfigError(
            f"towers.name: {name!r} is not a plain CLIP ViT (it needs more than sizes); use one such as "
            "ViT-B-32-quickgelu, ViT-B-16-quickgelu or ViT-L-14-quickgelu"
        )
    return TowerSizes(
        embed_dim=spec["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["width"] // vision.get("head_width", 64),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        quick_gelu=spec.get("quick_gelu", False),
    )


def _check_heads(sizes: TowerSizes) -> None:
    values = dataclasses.asdict(sizes)
    for tower in ("vision", "text"):
        width, heads = values[f"{tower}_width"], values[f"{tower}_heads"]
        if width % heads:
            raise ConfigError(
                f"towers.architecture.{tower}_heads: {heads} heads do not divide a width of {width}"
            )
    if sizes.image_size % sizes.patch_size:
        raise ConfigError(
            f"towers.architecture.patch_size: {sizes.patch_size} does not divide "
            f"image_size {sizes.image_size}"
        )
