"""CLIP towers of open_clip, and the official LongCLIP file."""

from __future__ import annotations

import os
from collections.abc import Hashable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing, from_open_clip
from uae.encoders.tower import EXACT, Tower, located
from uae.files.locations import locate
from uae.weights.placement import Placement

# Entries that the code of OpenAI and of LongCLIP leaves in a state dict. Both trained with QuickGELU.
_OPENAI_MARKS = {"input_resolution", "positional_embedding_res"}


class OpenCLIPEncoder(Tower):
    """The projected image embedding of a model of open_clip.

    For LongCLIP set ``name="ViT-L-14-quickgelu"`` and ``pretrained`` to the path of the official ``longclip-L.pt``. Of a
    file only the image tower (``visual.*``) is read, so the text positions, of which LongCLIP has more, do not matter.

    Folders, files and hub ids are looked up below ``UAE_CHECKPOINTS``, too.

    Args:
        name: A registered architecture such as ``ViT-L-14-quickgelu``; or ``local-dir:DIR``, a folder with
            ``open_clip_config.json`` and weights; or ``hf-hub:ID``, a model on the hub.
        pretrained: A tag of the registered architecture, such as ``openai``, or a file of weights. None if ``name`` is a
            ``local-dir:`` or ``hf-hub:`` name, which come with their weights.
        placement: Data type and device of the weights, see `Tower`.

    Raises:
        ValueError: ``name`` and ``pretrained`` do not go together.
    """

    def __init__(self, name: str, pretrained: str | None = None, placement: Placement = EXACT) -> None:
        super().__init__(placement)
        if (pretrained is None) != (":" in name):
            raise ValueError(
                f"name={name!r} with pretrained={pretrained!r}: a registered name needs a tag or a weights file in the "
                "encoder's init_args.pretrained, a local-dir: or hf-hub: name must have none"
            )
        if pretrained == "openai" and "quickgelu" not in name:
            raise ValueError(_quickgelu(name, "openai"))
        self.name = name
        self.pretrained = pretrained

    def weights(self) -> Hashable:
        """The architecture, and the file or tag of the weights."""
        return "open_clip", self._model_name(), self._weights_file() or self.pretrained

    def _model_name(self) -> str:
        """The name as open_clip wants it; a hub id that is mirrored on disk becomes that folder."""
        scheme, _, place = self.name.partition(":")
        if not place:
            return self.name
        path = located(place, "name")
        if os.path.isdir(path):
            return f"local-dir:{os.path.realpath(path)}"
        if scheme == "local-dir":
            raise FileNotFoundError(f"{self.name!r}: the folder does not exist; set the encoder's init_args.name")
        return self.name

    def _weights_file(self) -> str | None:
        """The path of the weights; None if ``pretrained`` is no file on this disk, so that it can only be a tag."""
        if self.pretrained is None:
            return None
        try:
            path = locate(self.pretrained)
        except FileNotFoundError:
            return None
        return os.path.realpath(path) if os.path.isfile(path) else None

    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Build the model and keep its image tower.

        Raises:
            FileNotFoundError: open_clip does not find the architecture or the weights.
            ValueError: The weights were trained with another activation, or the preprocessing is unknown.
        """
        import open_clip

        name, file = self._model_name(), self._weights_file()
        try:
            if self.pretrained is None:
                model = open_clip.create_model(name, require_pretrained=True)
            elif file is not None:
                model = self._from_file(open_clip, file)
            else:
                model = self._from_tag(open_clip, self.pretrained)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"open_clip cannot load name={self.name!r}, pretrained={self.pretrained!r} ({reason}); "
                "set the encoder's init_args.name or init_args.pretrained"
            ) from error
        return model.visual, from_open_clip(model.visual.preprocess_cfg)

    # Models of open_clip have no types, hence Any.
    def _from_file(self, open_clip: ModuleType, file: str) -> Any:
        state = open_clip.factory.load_state_dict(file, device="cpu", weights_only=True)
        if _OPENAI_MARKS & set(state) and "quickgelu" not in self.name:
            raise ValueError(_quickgelu(self.name, file))
        model = open_clip.create_model(self.name, pretrained_text=False)
        prefix = "visual."
        model.visual.load_state_dict({key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)})
        return model

    def _from_tag(self, open_clip: ModuleType, tag: str) -> Any:
        trained = open_clip.get_pretrained_cfg(self.name, tag)
        if not trained:
            allowed = open_clip.list_pretrained_tags_by_model(self.name)
            raise FileNotFoundError(f"neither a file nor a tag of {self.name}; its tags: {', '.join(allowed) or 'none'}")
        if trained.get("quick_gelu", False) != open_clip.get_model_config(self.name).get("quick_gelu", False):
            raise ValueError(_quickgelu(self.name, tag))  # open_clip only warns, and every score would be slightly off
        return open_clip.create_model(self.name, pretrained=tag, require_pretrained=True)

    def features(self, module: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        """The projected embedding ``[N, D]`` of preprocessed pixels."""
        out = module(pixels_NCHW)
        return out[0] if isinstance(out, tuple) else out  # some towers return the embeddings of their patches as well


def _quickgelu(name: str, weights: str) -> str:
    bare = name.removesuffix("-quickgelu")
    return (
        f"name={name!r} and pretrained={weights!r} disagree on the activation (QuickGELU or GELU), which would shift "
        f"every score silently; set the encoder's init_args.name to {bare if bare != name else name + '-quickgelu'!r}"
    )
