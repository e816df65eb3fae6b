"""CLIP, LongCLIP, DINOv2, DINOv3: any image tower transformers can load."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing, from_image_processor
from uae.encoders.tower import EXACT, Tower, located
from uae.weights.placement import Placement
from uae.weights.remote_code import refused, trusted

CODE_KEY = "the encoder's init_args.trust_remote_code"


class HFEncoder(Tower):
    """An image tower in transformers format.

    Unified-Bench scores CLIP with the projected image embedding and DINOv2/DINOv3 with the class token (after the last
    layer norm); both are reproduced here, with the preprocessing numbers of the folder's ``preprocessor_config.json``.

    LongCLIP differs from CLIP on the text side only (248 positions), so its transformers conversion loads here with
    ``feature="projection"``; the official ``longclip-L.pt`` loads with ``OpenCLIPEncoder``.

    Args:
        path: A folder, a folder below ``UAE_CHECKPOINTS`` or a model id on the hub, e.g.
            ``openai/clip-vit-large-patch14``.
        feature: "projection": the embedding in the joint image-text space (CLIP-like models). "cls": the first token of
            the last hidden state (DINOv2, DINOv3).
        placement: dtype and device, see `Tower`.
        trust_remote_code: ``path`` once more, if Python code that lies in it may run; None runs none.
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
        """The folder or id; both features come from one module."""
        path = located(self.path, "path")
        return "transformers", os.path.realpath(path) if os.path.isdir(path) else path

    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Config, image processor and weights; the text tower is dropped."""
        with refused(self.path, CODE_KEY):
            return self._read()

    def _read(self) -> tuple[nn.Module, Preprocessing]:
        path = located(self.path, "path")
        import transformers

        options = {"local_files_only": os.path.isdir(path), "trust_remote_code": self.trusted}
        try:
            config = transformers.AutoConfig.from_pretrained(path, **options)
            processor = transformers.AutoImageProcessor.from_pretrained(path, **options)
            module, missing = _pretrained(transformers, path, config, options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"encoder path {self.path!r} is no complete folder here and cannot be had from the hub "
                f"({reason}); set the encoder's init_args.path"
            ) from error
        if missing:
            raise ValueError(
                f"encoder path {self.path!r} lacks {len(missing)} weights ({missing[0]}, ...), left random; "
                "set the encoder's init_args.path to a complete model"
            )
        return module, from_image_processor(processor.to_dict())

    def features(self, module: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        """Projected embedding or class token ``[N, D]``."""
        if self.feature == "cls":
            tower: Any = getattr(module, "vision_model", module)
            return tower(pixel_values=pixels_NCHW).last_hidden_state[:, 0]
        if hasattr(module, "get_image_features"):
            out = module.get_image_features(pixel_values=pixels_NCHW)
            return getattr(out, "pooler_output", out)  # transformers 5 wraps the projected vector, 4 returned it
        if hasattr(module, "visual_projection"):
            return module(pixel_values=pixels_NCHW).image_embeds
        raise ValueError(
            f"the model at {self.path!r} ({type(module).__name__}) has no image projection; "
            "set the encoder's init_args.feature to cls"
        )


def _pretrained(transformers: Any, path: str, config: Any, options: dict[str, bool]) -> tuple[nn.Module, list[str]]:
    # AutoModel maps a vision-only CLIP folder to the class without the projection.
    projected = config.model_type == "clip_vision_model"
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
    module, report = kind.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True, **options
    )
    for part in ("text_model", "text_projection"):
        if hasattr(module, part):
            setattr(module, part, None)
    return module, sorted(report["missing_keys"])
