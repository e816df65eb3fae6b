"""The network of a diffusion policy, around the denoiser of its pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from uae.learner import Kept, Network


class FlowNetwork(Network):
    """Takes the place of the transformer in a pipeline, and passes attributes that the pipeline reads on to it.

    Args:
        model: A denoiser of diffusers, or a PeftModel around one.
    """

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether passes with gradient keep only the inputs of blocks and compute the rest again; results do not change."""
        return bool(getattr(self.base, "gradient_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self.base.enable_gradient_checkpointing()
        elif self.gradient_checkpointing:
            self.base.disable_gradient_checkpointing()

    def never_adapted(self) -> list[nn.Module]:
        """Modules that no pass uses."""
        return [module for module in self.model.modules() if isinstance(module, Kept)]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the denoiser."""
        return self.model(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the denoiser, such as its configuration, dtype and cache context."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)
