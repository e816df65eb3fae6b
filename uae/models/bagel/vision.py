"""BAGEL's image tower: SigLIP without pooling, for images of any size (arXiv 2505.14683, section 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_1LD: Tensor) -> Tensor:
        query, key, value = (
            layer(x_1LD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x_1LD: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_1LD), approximate="tanh"))
        return out


class _Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn, self.mlp = _Attention(config), _FeedForward(width, config.intermediate_size)

    def forward(self, x_1LD: Tensor) -> Tensor:
        x_1LD = x_1LD + self.self_attn(self.layer_norm1(x_1LD))
        out: Tensor = x_1LD + self.mlp(self.layer_norm2(x_1LD))
        return out


class _Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.position_embedding = nn.Embedding(side**2, width)


class _Encoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))


class _Transformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(config), _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class ImageTower(nn.Module):
    """Patches of one image to features, with full attention among them.

    Args:
        config: A ``SiglipVisionConfig``, with the number of layers that are built.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model = _Transformer(config)

    def forward(self, patches_LP: Tensor, place_L: Tensor) -> Tensor:
        """Features ``[L, D]``.

        Args:
            patches_LP: Normalised pixels, see `uae.models.bagel.pixels.patches`.
            place_L: Row times the side of the table of positions, plus column.
        """
        net = self.vision_model
        weight = net.embeddings.patch_embedding.weight
        x_LD = net.embeddings.patch_embedding(patches_LP.to(weight.dtype)) + net.embeddings.position_embedding(place_L)
        x_1LD = x_LD[None]
        for block in net.encoder.layers:
            x_1LD = block(x_1LD)
        out: Tensor = net.post_layernorm(x_1LD)[0]
        return out
