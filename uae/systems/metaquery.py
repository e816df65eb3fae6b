"""MetaQuery and OpenUni (of the same design, with released weights): learned queries after the caption, connector, Sana."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from uae.files.locations import local_file, local_folder
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import COMPLETELY
from uae.types import UMM

KEY = "model.init_args.system.init_args.checkpoint"
METAQUERY_SYSTEM = (  # the system prompt that MetaQuery's queries were trained with
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)


class _Queries:
    """The common part of `OpenUni` and `MetaQuery`.

    Args:
        checkpoint: File or folder of the queries, the connector and, if it was trained, the diffusion transformer.
        captioner: Folder or hub id of the vision-language model that the queries were trained with.
        pipeline: Folder or hub id of the Sana pipeline. It supplies the autoencoder, the scheduler and, if the checkpoint
            has none, the transformer.
        condition_weights: Weights that read the captions for the renderer. "live": those in training. "start": those the
            run started from, so that the renderer's reading does not change during training.
        condition_tokens: Most tokens of a caption and its template that are read; longer captions are cut.
        reading: Settings with which the captioner is loaded and prompted.
        rendering: Size, steps, guidance and memory settings of the renderer.
    """

    def __init__(
        self,
        checkpoint: str,
        captioner: str,
        pipeline: str,
        condition_weights: Literal["live", "start"] = "live",
        condition_tokens: int = 1024,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        rendering: Rendering = Rendering(steps=20, guidance=4.5, rows=32),  # noqa: B008
    ) -> None:
        self.checkpoint, self.captioner, self.pipeline = checkpoint, captioner, pipeline
        self.condition_weights, self.condition_tokens = condition_weights, condition_tokens
        self.reading, self.rendering = reading, rendering

    def conditioner(self, captioner: Any, weights: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        """The `uae.models.conditioners.queries.QueryConditioner`, and the transformer's trained weights (empty if none)."""
        raise NotImplementedError

    def connector(self, width: int, width_out: int) -> nn.Module:
        """Connector and projector in the released size, with random weights.

        Args:
            width: Width of the language model's hidden states.
            width_out: Width of the renderer's embeddings.
        """
        raise NotImplementedError

    def blueprint(self) -> Blueprint:
        """The networks of the system without their weights, for memory plans."""
        from uae.systems.blueprints import denoiser_skeleton, vae_skeleton, vlm_skeleton

        place = self.rendering.placement
        policy = vlm_skeleton(self.captioner, self.reading.dtype)
        transformer = denoiser_skeleton(self.pipeline)
        with torch.device("meta"):
            connector = self.connector(policy.config.get_text_config().hidden_size, transformer.config.caption_channels)
        frozen = {"connector": connector, "transformer": transformer, "vae": vae_skeleton(self.pipeline)}
        return Blueprint(
            policy,
            {name: (module, place) for name, module in frozen.items()},
            self.rendering,
            condition_tokens=256,
            reading=self.reading,
            policy_reads=True,
            needs_reference=self.condition_weights == "start",
        )

    def build(self) -> UMM:
        """Load the parts on the CPU. Sana's own text encoder is not loaded."""
        from uae.models.captioners.loading import load_captioner, with_engine
        from uae.models.pipelines.loading import load_pipeline
        from uae.models.renderers.diffusers import DiffusersRenderer
        from uae.weights.placement import torch_dtype
        from uae.weights.state import load_into

        frozen, placement = self.condition_weights == "start", self.rendering.placement
        captioner = load_captioner(self.captioner, self.reading, COMPLETELY)
        conditioner, trained = self.conditioner(captioner, captioner.learner.reference if frozen else nullcontext)
        conditioner.requires_grad_(False).eval().to(torch_dtype(placement))
        pipe = load_pipeline(self.pipeline, placement, text_encoder=None, tokenizer=None)
        if trained:
            load_into(pipe.transformer, trained, f"{self.checkpoint}: transformer", KEY)
        check_width(conditioner, pipe)
        negative = torch.no_grad()(conditioner.encode_unconditional)
        renderer = DiffusersRenderer(pipe, self.rendering, cache(negative) if frozen else negative)
        return UMM(with_engine(captioner, self.reading), conditioner, renderer, needs_reference=frozen)


class OpenUni(_Queries):
    """A `uae.types.System` of a released ``.pth`` file of OpenUni (arXiv 2505.23661). No code in the file is run."""

    def conditioner(self, captioner: Any, weights: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        """Queries, connector and linear projector of the released file."""
        from uae.models.conditioners.connectors import OpenUniConnector
        from uae.models.conditioners.prompts import chat_template
        from uae.models.conditioners.queries import QueryConditioner
        from uae.systems.layouts import openuni_parts
        from uae.weights.state import load_into, read_state

        file = local_file(self.checkpoint, KEY)
        parts = openuni_parts(read_state(file))
        width = captioner.language_model.config.hidden_size
        if parts.meta_queries.shape[1] != width:
            raise ValueError(
                f"the queries in {str(file)!r} have width {parts.meta_queries.shape[1]}, the language model {width}; set "
                "model.init_args.system.init_args.captioner to the model they were trained with"
            )
        layers = 1 + max(int(name.split(".")[1]) for name in parts.connector if name.startswith("layers."))
        connector = OpenUniConnector(width, len(parts.connector["layers.0.mlp.fc1.weight"]), layers)
        load_into(connector, parts.connector, f"{file}: connector", KEY)
        projector = nn.Linear(width, len(parts.projector["weight"]))
        load_into(projector, parts.projector, f"{file}: projector", KEY)
        processor = captioner.processor
        opening = "<img>" if "<img>" in processor.tokenizer.get_vocab() else ""  # InternVL has this token, Qwen does not
        conditioner = QueryConditioner(
            lambda: captioner.language_model,
            processor.tokenizer,
            parts.meta_queries.float(),
            connector,
            projector,
            template=chat_template(processor, system=False, text="Generate an image: {caption}") + opening,
            unconditional=chat_template(processor, system=False, text="Generate an image.") + opening,
            max_tokens=self.condition_tokens,
            weights=weights,
        )
        return conditioner, parts.transformer

    def connector(self, width: int, width_out: int) -> nn.Module:
        """Six layers, as in every release of OpenUni."""
        from uae.models.conditioners.connectors import OpenUniConnector

        inner_width = {896: 3072, 1536: 8960}.get(width, 4 * width)  # in the releases for InternVL3-1B and -2B
        return nn.Sequential(OpenUniConnector(width, inner_width), nn.Linear(width, width_out))


class MetaQuery(_Queries):
    """A `uae.types.System` of a folder that MetaQuery's training code saved (arXiv 2504.06256; no weights are released)."""

    def conditioner(self, captioner: Any, weights: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        """Queries are the last rows of the token embeddings: a begin token, an end token, then one token per query."""
        from uae.models.conditioners.connectors import metaquery_connector
        from uae.models.conditioners.prompts import chat_template
        from uae.models.conditioners.queries import QueryConditioner
        from uae.systems.layouts import below
        from uae.weights.state import load_into, read_state

        folder = local_folder(self.checkpoint, KEY)
        count = json.loads((folder / "config.json").read_text())["num_metaqueries"]
        state = read_state(folder)
        embeddings = next((name for name in state if name.endswith("embed_tokens.weight")), None)
        if embeddings is None:
            raise ValueError(f"{str(folder)!r} has no embed_tokens.weight, whose last rows are the queries; correct {KEY}")
        rows_QD, parts = state[embeddings][-count - 2 :].float(), below(state, "model.connector.")
        width = rows_QD.shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in parts if name.startswith("0.layers."))
        connector = metaquery_connector(width, len(parts["1.weight"]), layers)
        load_into(connector, parts, f"{folder}: model.connector", KEY)
        tokenizer = captioner.processor.tokenizer
        conditioner = QueryConditioner(
            lambda: captioner.language_model,
            tokenizer,
            torch.cat([rows_QD[:1], rows_QD[2:]]),  # the end token follows the queries, so no query attends to it
            connector,
            None,
            template=chat_template(captioner.processor, system=METAQUERY_SYSTEM) + "\n",
            max_tokens=self.condition_tokens,
            lead=1,
            weights=weights,
        )
        return conditioner, below(state, "model.transformer.")

    def connector(self, width: int, width_out: int) -> nn.Module:
        """24 layers, as in every configuration of its authors."""
        from uae.models.conditioners.connectors import metaquery_connector

        return metaquery_connector(width, width_out)


def check_width(conditioner: Any, pipe: Any) -> None:
    """Check that the output of the queries' projector is as wide as the transformer's input.

    Raises:
        ValueError: The widths differ.
    """
    last = [module for module in conditioner.modules() if isinstance(module, nn.Linear)][-1]
    expected = pipe.transformer.config.caption_channels
    if last.out_features != expected:
        raise ValueError(
            f"the projector's output has width {last.out_features}, the transformer takes {expected}; set "
            "model.init_args.system.init_args.pipeline to the pipeline the queries were trained with"
        )
