"""CLIP, LongCLIP, DINOv2, DINOv3 and other image towers that transformers can load."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing, from_image_processor
from uae.encoders.tower import EXACT, Tower, located
from uae.weights.placement import Placement
from uae.weights.remote_code import refused, trusted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

CODE_KEY = "the encoder's init_args.trust_remote_code"


@runtime_checkable
class ImageTextModel(Protocol):
    """A model such as CLIP or SigLIP that projects images into a space shared with text.

    A protocol, because these classes of transformers share a method but no base class.
    """

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """The projected image embedding ``[N, D]`` as ``pooler_output``."""
        ...


class HFEncoder(Tower):
    """An image tower in the format of transformers.

    Unified-Bench scores CLIP by the projected image embedding, and DINOv2 and DINOv3 by the class token after the last
    layer norm. Both can be had here; resizing and normalisation follow the folder's ``preprocessor_config.json``.

    LongCLIP differs from CLIP in its text encoder only (248 positions). Its transformers conversion loads here with
    ``feature="projection"``; the official file ``longclip-L.pt`` loads with `OpenCLIPEncoder`.

    Args:
        path: A folder, a folder below ``UAE_CHECKPOINTS``, or a model id on the hub such as
            ``openai/clip-vit-large-patch14``.
        feature: Which output of the tower is the embedding. "projection" is the one in the space that images and texts
            share (CLIP and its like), "cls" the first token of the last hidden state (DINOv2, DINOv3).
        placement: Data type and device of the weights, see `Tower`.
        trust_remote_code: None runs no code of the checkpoint. If its model is defined by Python code of its own, repeat
            ``path`` here to let that code run.

    Raises:
        ValueError: ``feature`` is unknown, or ``trust_remote_code`` is another name than ``path``.
    """

    def __init__(
        self,
        path: str,
        feature: Literal["projection", "cls"] = "projection",
        placement: Placement = EXACT,
        trust_remote_code: str | None = None,
    ) -> None:
        super().__init__(placement)
        if feature not in ("projection", "cls"):
            raise ValueError(f"feature={feature!r}; allowed: projection, cls; set the encoder's init_args.feature")
        self.path = path
        self.feature = feature
        self.trusted = trusted(path, trust_remote_code, CODE_KEY)

    def weights(self) -> Hashable:
        """The folder or model id. Both features are read from the same module."""
        path = located(self.path, "path")
        return "transformers", os.path.realpath(path) if os.path.isdir(path) else path

    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Read the model without its text encoder, and the numbers of its image processor.

        Raises:
            FileNotFoundError: There is no complete model at ``path``.
            ValueError: Weights are missing, the preprocessing is unknown, or the model needs code that may not run.
        """
        with refused(self.path, CODE_KEY):
            return self._read()

    def _read(self) -> tuple[nn.Module, Preprocessing]:
        path = located(self.path, "path")
        import transformers

        options: dict[str, Any] = {"local_files_only": os.path.isdir(path), "trust_remote_code": self.trusted}
        try:
            config = transformers.AutoConfig.from_pretrained(path, **options)
            processor = transformers.AutoImageProcessor.from_pretrained(path, **options)
            module, missing = _pretrained(path, config, options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"encoder path {self.path!r} is no complete folder here and cannot be had from the hub "
                f"({reason}); set the encoder's init_args.path"
            ) from error
        if missing:
            raise ValueError(
                f"encoder path {self.path!r} lacks {len(missing)} weights ({missing[0]}, ...), which would stay random; "
                "set the encoder's init_args.path to a complete model"
            )
        return module, from_image_processor(processor.to_dict())

    def features(self, module: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        """The projected embedding or the class token ``[N, D]`` of preprocessed pixels.

        Raises:
            ValueError: The projection is asked for, and the model has none.
        """
        from transformers import CLIPVisionModelWithProjection, PreTrainedModel

        assert isinstance(module, PreTrainedModel)  # `read` returns no other
        if self.feature == "cls":
            tower = module.get_encoder(modality="image")  # the model itself where it is nothing but an image tower
            return tower(pixel_values=pixels_NCHW).last_hidden_state[:, 0]
        if isinstance(module, CLIPVisionModelWithProjection):
            return module(pixel_values=pixels_NCHW).image_embeds
        if isinstance(module, ImageTextModel):
            embedding_ND = module.get_image_features(pixel_values=pixels_NCHW).pooler_output
            assert embedding_ND is not None  # its type allows None for models without a projection
            return embedding_ND
        raise ValueError(
            f"the model at {self.path!r} ({type(module).__name__}) has no image projection; set the encoder's init_args.feature to cls"
        )


def _pretrained(path: str, config: PreTrainedConfig, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """The model without its text encoder, and the names of weights that were not in the checkpoint."""
    import transformers

    # AutoModel would read a CLIP folder that has no text encoder without its projection.
    projected = config.model_type == "clip_vision_model"
    # Any, because the annotations do not say that output_loading_info makes from_pretrained return a pair.
    kind: Any = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
    module, report = kind.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True, **options)
    for name, _ in list(module.named_children()):
        if name in ("text_model", "text_projection"):
            setattr(module, name, None)
    return module, sorted(report["missing_keys"])
