"""The part of a vision-language model that turns a prompt and its images into final hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn


class Trunk:
    """A model of transformers without its output head, for classes that have no such part of their own (Llama 4).

    Args:
        model: A ``...ForConditionalGeneration``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        """The output of the text decoder, whose ``last_hidden_state`` is taken after the final norm."""
        seen: list[Any] = []
        handle = text_decoder(self.model).register_forward_hook(lambda module, arguments, output: seen.append(output))
        try:
            self.model(**inputs, logits_to_keep=1)
        finally:
            handle.remove()
        return seen[-1]


def text_decoder(model: Any) -> Any:
    """The text decoder without its output head, whose ``last_hidden_state`` is taken after the final norm."""
    found = model.get_decoder()
    return found.model if found.get_output_embeddings() is not None and has_trunk(found) else found


def has_trunk(model: Any) -> bool:
    """Whether a model has all but its output head as one module, called ``model``."""
    return isinstance(getattr(model, "model", None), nn.Module)


def trunk(model: Any) -> Any:
    """What maps a model's inputs to its final hidden states."""
    return model.model if has_trunk(model) else Trunk(model)


def inner(model: Any) -> Any:
    """The module of transformers that runs the image tower, knows positions and takes the cache."""
    return model.model if has_trunk(model) else model
