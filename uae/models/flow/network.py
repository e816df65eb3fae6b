"""The trainable root of a diffusion policy."""

from __future__ import annotations

from typing import Any

from uae.learner import Network


class FlowNetwork(Network):
    """Stands where a pipeline expects its transformer, with everything that it may ask of one.

    Args:
        model: A denoiser of diffusers, or a PeftModel around one.
    """

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
