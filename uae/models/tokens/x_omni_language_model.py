"""X-Omni's language model (arXiv 2507.22058): Qwen2 with a second vocabulary, and with layers that act on image tokens only.

Ids from ``vocab_size`` on are *multimodal*: the codes of images, then the marks around an image. The first and the last layers of
the network read all tokens, but change multimodal ones only. These have their own embeddings, final norm and output head, too. The
weights have the names of the released checkpoints. Import this file inside functions only, because it imports transformers.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm


class XOmniConfig(Qwen2Config):
    """The settings in ``config.json``: those of Qwen2 and a few more.

    Args:
        num_mm_adap_layers: Number of image-only layers at the beginning.
        num_mm_head_layers: Number of image-only layers at the end.
        mm_vocab_size: Number of multimodal tokens.
        image_vocab_size: Number of codes among them; they come first.
        mm_special_tokens: The marks: begin of image, end of image, and the one between the size of an image and its codes.
        vision_config: Settings of the image tokenizer and the pixel decoder, as they are written.
    """

    model_type = "x-omni"

    num_mm_adap_layers: int = 4
    num_mm_head_layers: int = 4
    mm_vocab_size: int = 16448
    image_vocab_size: int = 16384
    mm_special_tokens: list[str] | tuple[str, ...] = ("<SOM>", "<EOM>", "<IMAGE>")
    vision_config: dict[str, Any] | None = None

    def image_only(self, layer: int) -> bool:
        """Whether a layer, counted from 0, changes multimodal tokens only."""
        return not self.num_mm_adap_layers <= layer < self.num_hidden_layers - self.num_mm_head_layers


class XOmniLayer(Qwen2DecoderLayer):
    """A layer of Qwen2. An image-only one returns the states of text tokens as they came.

    Text tokens have keys and values in image-only layers, too, and image tokens attend to them.
    """

    def __init__(self, config: XOmniConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.image_only = config.image_only(layer_idx)

    def forward(self, hidden_states: Tensor, *args: Any, multimodal: Tensor, **kwargs: Any) -> Tensor:
        """The states ``[N, P, D]`` behind the layer; ``multimodal`` is ``[N, P, 1]``."""
        changed: Tensor = super().forward(hidden_states, *args, **kwargs)
        return torch.where(multimodal, changed, hidden_states) if self.image_only else changed


class XOmniModel(Qwen2Model):
    """The decoder from token ids to final hidden states."""

    config_class = XOmniConfig
    _input_embed_layer = "lm_embed_tokens"
    _no_split_modules = ["XOmniLayer"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__(config)
        del self.embed_tokens
        self.lm_embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mm_embed_tokens = nn.Embedding(config.mm_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([XOmniLayer(config, number) for number in range(config.num_hidden_layers)])
        nothing: Any = nn.Identity()
        self.norm = nothing  # both norms come after the parent's forward
        self.lm_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mm_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def embed(self, ids_NP: Tensor) -> Tensor:
        """Input embeddings ``[N, P, D]`` of tokens of both vocabularies."""
        first = self.config.vocab_size
        text_NPD = self.lm_embed_tokens(ids_NP.clamp(max=first - 1))
        image_NPD = self.mm_embed_tokens((ids_NP - first).clamp(min=0))
        return torch.where((ids_NP >= first)[..., None], image_NPD, text_NPD)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the decoder as Qwen2's. Embeddings without ids are taken for those of text."""
        if input_ids is not None:
            multimodal_NP1, inputs_embeds = (input_ids >= self.config.vocab_size)[..., None], self.embed(input_ids)
        else:
            assert inputs_embeds is not None
            multimodal_NP1 = torch.zeros_like(inputs_embeds[..., :1], dtype=torch.bool)
        out = super().forward(inputs_embeds=inputs_embeds, multimodal=multimodal_NP1, **kwargs)
        hidden_NPD = out.last_hidden_state
        out.last_hidden_state = torch.where(multimodal_NP1, self.mm_norm(hidden_NPD), self.lm_norm(hidden_NPD))
        return out


update_wrapper(XOmniModel.forward, Qwen2Model.forward, assigned=())  # its signature says how this version names the cache


class XOmniForCausalLM(Qwen2ForCausalLM):
    """The decoder with its two output heads. ``forward`` returns logits of text; those of images need ``mm_head``."""

    config_class = XOmniConfig
    _input_embed_layer = "lm_embed_tokens"
    _tied_weights_keys = {"lm_head.weight": "model.lm_embed_tokens.weight"}  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__(config)
        self.model = XOmniModel(config)
        self.mm_head = nn.Linear(config.hidden_size, config.mm_vocab_size, bias=False)
        self.post_init()
