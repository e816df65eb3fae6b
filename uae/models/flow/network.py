"""The trainable root of a diffusion policy."""

from __future__ import annotations

from typing import Any

from torch import nn


class FlowNetwork(nn.Module):
    """Stands where a pipeline expects its transformer, with everything that it may ask of one.

    It is the root that a distributed strategy shards: whoever calls the pipeline goes through its ``forward``.

    Args:
        model: A denoiser of diffusers, or a PeftModel around one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():  # a policy with dropout has no ratio of one
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    @property
    def base(self) -> Any:
        """The denoiser, whether or not an adapter wraps it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep the inputs of blocks only, in passes with gradient, and compute the rest again. Changes no number."""
        return bool(getattr(self.base, "gradient_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.base.enable_gradient_checkpointing()
        elif self.gradient_checkpointing:
            self.base.disable_gradient_checkpointing()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The denoiser's own."""
        return self.model(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Configuration, dtype, cache contexts and whatever else a pipeline reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)
