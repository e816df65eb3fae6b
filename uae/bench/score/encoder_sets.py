"""What protocol 1 looks through: the paper's four encoders, or those of a file."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from uae.cli.explain import explain
from uae.encoders import HFEncoder
from uae.types import ImageEncoder

HELD_OUT = "held_out"  # the one key of an encoders file that is no encoder
TAKEN = {"overall", "floor", "calibrated"}  # names of other numbers in a result


@dataclass(frozen=True)
class EncoderSet:
    """Encoders by name.

    Args:
        encoders: At least one.
        held_out: Names of those that no reward of the measured systems uses.
    """

    encoders: dict[str, ImageEncoder]
    held_out: tuple[str, ...] = ()


def paper_encoders() -> EncoderSet:
    """The paper's four (arXiv 2509.09666), under the names of the official results. Loads nothing."""
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
        FileNotFoundError: There is no such file.
        ValueError: It says something else.
    """
    if file is None:
        return paper_encoders()
    import yaml

    if not Path(file).is_file():
        raise FileNotFoundError(f"no encoders at {str(file)!r}; give a YAML file like configs/bench/official.yaml")
    content = yaml.safe_load(Path(file).read_text())
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
    """An encoder as a configuration says it: ``{class_path, init_args}``."""
    kind = type(encoder)
    arguments = {name: getattr(encoder, name) for name in inspect.signature(kind).parameters if hasattr(encoder, name)}
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in arguments.items()}  # type: ignore[arg-type]
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": plain}


def encoder_record(encoder: ImageEncoder) -> dict[str, Any]:
    """As a result records it: with the fingerprint of what it computes, or None if it has none. Loads it."""
    fingerprint = getattr(encoder, "fingerprint", None)
    return encoder_configuration(encoder) | {"fingerprint": fingerprint() if fingerprint else None}
