"""How much people would prefer a picture for a caption, as models of CLIP's form have learned it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from uae.encoders import similarity
from uae.encoders.preprocessing import from_image_processor, from_open_clip
from uae.encoders.tower import EXACT
from uae.files.locations import local_file
from uae.rewards.network import Loaded, NetworkReward, identity, pretrained
from uae.weights.placement import Placement
from uae.weights.state import load_into, read_state

KEY = "the reward's init_args.preference"


class PreferenceScore(NetworkReward):
    """Cosine of a reconstruction and *its caption* under a model that was trained on people's choices.

    PickScore (arXiv 2305.01569) is a CLIP in the format of transformers, and multiplies the cosine by its logit scale, about
    100. HPSv2 (arXiv 2306.09341) is a file of open_clip, and does not. It rewards pictures that are pleasant and as the
    caption says. The source is not looked at, so a caption that is easy to draw is worth as much as a true one: give it a
    small weight beside a similarity. A caption is cut after the context length of the model (77 tokens).

    Args:
        preference: A folder or hub name in the format of transformers, such as ``yuvalkirstain/PickScore_v1``; or, with an
            ``architecture``, a file of weights, on this disk or as ``owner/model/file`` on the hub.
        architecture: Registered name of open_clip of the network whose weights the file holds (HPSv2: ``ViT-H-14``). A file
            ``open_clip_config.json`` beside the weights replaces it. None is the format of transformers.
        scaled: Whether the cosine is multiplied by the logit scale. None does as the model's authors do: yes in the format
            of transformers, no for a file of open_clip.
        placement: See `NetworkReward`.
        rows: See `NetworkReward`.
    """

    def __init__(
        self, preference: str, architecture: str | None = None, scaled: bool | None = None, placement: Placement = EXACT,
        rows: PositiveInt = 16,
    ) -> None:  # fmt: skip
        super().__init__(placement, rows)
        self.preference, self.architecture = preference, architecture
        self.scaled = architecture is None if scaled is None else scaled

    def weights(self) -> Hashable:
        """The folder or file, and the architecture."""
        return identity(self.preference), self.architecture

    def read(self) -> Loaded:
        """Read the network with both encoders, its tokenizer and the numbers of its preprocessing."""
        if self.architecture is not None:
            return self._read_open_clip(self.architecture)
        import transformers

        loaded = pretrained(transformers.CLIPModel, self.preference, "preference", self.placement)
        preprocessing = from_image_processor(loaded.processor.image_processor.to_dict())
        network: Any = loaded.network
        tokenizer, positions = loaded.processor.tokenizer, network.config.text_config.max_position_embeddings

        def tokens(texts: list[str]) -> Any:
            return tokenizer(texts, padding=True, truncation=True, max_length=positions, return_tensors="pt")

        return Loaded(loaded.network, (preprocessing, tokens))

    def _read_open_clip(self, architecture: str) -> Loaded:
        import open_clip

        file = local_file(self.preference, KEY)
        own = (file.parent / "open_clip_config.json").is_file()
        name = f"local-dir:{file.parent}" if own else architecture
        try:
            network = open_clip.create_model(name, load_weights=False, pretrained_text=False)
            tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(
                f"open_clip cannot build architecture={architecture!r} ({str(error).splitlines()[0]}); set the reward's "
                "init_args.architecture"
            ) from error
        load_into(network, read_state(file), f"preference {self.preference!r}", f"{KEY} or its init_args.architecture")
        return Loaded(network, (from_open_clip(network.visual.preprocess_cfg), tokenizer))

    def scores(self, loaded: Loaded, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Cosines ``[N]`` in [-1, 1], times the logit scale if ``scaled``."""
        preprocessing, tokenize = loaded.processor
        network: Any = loaded.network  # CLIP of transformers or of open_clip, which have no type in common
        dtype = network.logit_scale.dtype
        cosines = []
        for some in self.batches(len(texts)):
            pixels_NCHW = preprocessing(reconstructions_NCHW[some.start : some.stop]).to(dtype)
            tokens = tokenize([texts[row] for row in some]).to(pixels_NCHW.device)
            cosines.append(similarity(*self._embeddings(network, pixels_NCHW, tokens)))
        cosine_N = torch.cat(cosines)
        return cosine_N * network.logit_scale.float().exp() if self.scaled else cosine_N

    def _embeddings(self, network: Any, pixels_NCHW: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        """The projected embeddings ``[N, D]`` of images and texts."""
        if self.architecture is not None:
            return network.encode_image(pixels_NCHW), network.encode_text(tokens)
        return network.get_image_features(pixels_NCHW).pooler_output, network.get_text_features(**tokens).pooler_output
