"""The encoders of protocol 1: the paper's four, or those of a YAML file."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jsonargparse import ArgumentError, ArgumentParser
from yaml import YAMLError

from uae.cli.explain import explain
from uae.encoders import HFEncoder
from uae.files.packaged import configuration
from uae.files.settings import read_settings
from uae.types import ImageEncoder

HELD_OUT = "held_out"  # the only key of an encoders file that is not the name of an encoder
TAKEN = {"overall", "floor", "calibrated"}  # names that other numbers of a result have


@runtime_checkable
class Fingerprinted(Protocol):
    """An encoder that can identify what it computes."""

    def fingerprint(self) -> str:
        """Digest of the weights and the preprocessing: encoders with equal fingerprints give equal embeddings."""
        ...


@dataclass(frozen=True)
class EncoderSet:
    """Encoders by name.

    Args:
        encoders: Encoders by name, at least one.
        held_out: Names of the encoders that no reward of the measured systems uses.
    """

    encoders: dict[str, ImageEncoder]
    held_out: tuple[str, ...] = ()


def paper_encoders() -> EncoderSet:
    """The paper's four encoders (arXiv 2509.09666), under the names of the official results; no weights are loaded."""
    encoders: dict[str, ImageEncoder] = {
        "clip": HFEncoder("openai/clip-vit-large-patch14"),
        "longclip": HFEncoder("zer0int/LongCLIP-L-Diffusers"),
        "dinov2": HFEncoder("facebook/dinov2-large", feature="cls"),
        "dinov3": HFEncoder("facebook/dinov3-vitl16-pretrain-lvd1689m", feature="cls"),
    }
    return EncoderSet(encoders, ("dinov2", "dinov3"))


def read_encoders(file: str | Path | None) -> EncoderSet:
    """The encoders of a YAML file: a mapping of name to ``{class_path, init_args}``, and optionally ``held_out: [names]``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds something else.
    """
    if file is None:
        return paper_encoders()
    try:
        content = read_settings(configuration(str(file), "--encoders"))
    except YAMLError as error:
        raise ValueError(f"encoders file {str(file)!r} cannot be read: {' '.join(str(error).split())}") from None
    given: dict[str, Any] = dict(content) if isinstance(content, dict) else {}
    held_out = tuple(given.pop(HELD_OUT, None) or ())
    if not given or not set(held_out) <= given.keys() or TAKEN & given.keys():
        raise ValueError(
            f"encoders file {str(file)!r} names the encoders {sorted(given)} and {HELD_OUT} {list(held_out)}; there must be "
            f"an encoder, each as name: {{class_path, init_args}}, {HELD_OUT} must name encoders of the file, and "
            f"{', '.join(sorted(TAKEN))} are taken"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoders", type=dict[str, ImageEncoder])
    try:
        encoders = parser.instantiate(parser.parse_object({"encoders": given})).encoders
    except ArgumentError as error:
        raise ValueError(f"encoders file {str(file)!r}: {explain(str(error))}") from None
    return EncoderSet(encoders, held_out)


def encoder_configuration(encoder: ImageEncoder) -> dict[str, Any]:
    """The configuration of an encoder, ``{class_path, init_args}``, from the attributes that its constructor's arguments became."""
    kind = type(encoder)
    attributes = vars(encoder)
    arguments = {name: attributes[name] for name in inspect.signature(kind).parameters if name in attributes}
    plain = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value for name, value in arguments.items()
    }
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": plain}


def encoder_record(encoder: ImageEncoder) -> dict[str, Any]:
    """The configuration of an encoder with its fingerprint; None if the encoder has none. Loads the encoder's weights."""
    return encoder_configuration(encoder) | {"fingerprint": encoder.fingerprint() if isinstance(encoder, Fingerprinted) else None}
