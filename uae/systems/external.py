"""A system of any vision-language model and a renderer outside this process, which draws from the caption's text."""

from __future__ import annotations

from uae.models.captioners.loading import Reading
from uae.models.renderers.external import ExternalRenderer
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM


class External:
    """A `uae.types.System` whose captioner is rewarded for the images that an external program draws.

    Args:
        captioner: Folder or hub id of an image-text-to-text model with a chat template.
        renderer: A `FolderRenderer` or `CallableRenderer` of `uae.models.renderers.external`.
        reading: Settings with which the captioner is loaded and prompted.
    """

    def __init__(
        self,
        captioner: str,
        renderer: ExternalRenderer,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        self.captioner, self.renderer, self.reading = captioner, renderer, reading

    def build(self) -> UMM:
        """Load the captioner on the CPU."""
        from uae.models.captioners.loading import load_captioner, with_engine
        from uae.models.conditioners.states import TextConditioner

        captioner = with_engine(load_captioner(self.captioner, self.reading, IN_DETAIL), self.reading)
        return UMM(captioner, TextConditioner(), self.renderer)
