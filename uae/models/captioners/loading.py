"""Any vision-language checkpoint in transformers format as a captioner."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from uae.files.locations import locate
from uae.models.captioners.caches import check_memory
from uae.models.captioners.captioner import HFCaptioner
from uae.weights.remote_code import refused, trusted


@dataclass(frozen=True)
class Reading:
    """How a captioner reads images.

    Args:
        instruction: The question put beside every image; None is the system's own.
        image_first: Whether the image stands before the question; None is the system's own order.
        dtype: Of the weights. Adapters stay in float32.
        min_pixels, max_pixels: Images are scaled to an area between these, in pixels (Qwen-like processors; a multiple
            of the squared token size, 28 x 28 for Qwen2.5-VL). None is the checkpoint's own.
        attention: Implementation in transformers: "sdpa", "eager", "flash_attention_2", ...; None is the library's choice.
        gradient_checkpointing: Compute the insides of layers again in the backward pass instead of keeping them.
        trust_remote_code: The captioner's name once more, if Python code that lies in its checkpoint may run; None runs none.
    """

    instruction: str | None = None
    image_first: bool | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    min_pixels: int | None = None
    max_pixels: int | None = None
    attention: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: str | None = None


def load_captioner(
    name: str, reading: Reading, instruction: str, image_first: bool = True, processor_name: str | None = None
) -> HFCaptioner:
    """The captioner of a checkpoint, on the CPU. What of it trains is up to `uae.models.finetune`.

    Args:
        name: Of the checkpoint, see `uae.files.locations.locate`.
        reading: What is not None there wins over the arguments.
        instruction: The system's own question.
        image_first: The system's own order.
        processor_name: Of the folder that holds the processor, where it is another.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, lacks weights or a chat template, or cannot do what ``reading`` asks for.
    """
    key = "system.init_args.reading.trust_remote_code"
    trust = trusted(name, reading.trust_remote_code, key)
    with refused(name, key):
        model, processor = _read(name, processor_name or name, reading, trust)
    return assemble_captioner(model, processor, reading, instruction, image_first)


def _read(name: str, processor_name: str, reading: Reading, trust: bool) -> tuple[Any, Any]:
    """Model and processor, or one line on why not."""
    import transformers
    from safetensors import SafetensorError

    path, words = locate(name), locate(processor_name)
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            words, local_files_only=os.path.isdir(words), trust_remote_code=trust and words == path
        )
        loader: Any = transformers.AutoModelForImageTextToText
        model, report = loader.from_pretrained(
            path,
            dtype=getattr(torch, reading.dtype),
            attn_implementation=reading.attention,
            local_files_only=os.path.isdir(path),
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        keys = "system.init_args.captioner" + (" or reading.attention" if reading.attention else "")
        raise ValueError(
            f"captioner {name!r} cannot be read as a vision-language model in transformers format "
            f"({' '.join(str(error).split())[:200]}); correct {keys}"
        ) from error
    absent = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"captioner {name!r} lacks {len(absent)} weights of its config ({absent[0]}, ...), or has them in other "
            "shapes; set system.init_args.captioner to a complete checkpoint"
        )
    return model, processor


def assemble_captioner(
    model: Any, processor: Any, reading: Reading, instruction: str, image_first: bool = True
) -> HFCaptioner:
    """A captioner around a model (of any device, ``meta`` too) and its processor, changed as ``reading`` says."""
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"the captioner's processor ({type(processor).__name__}) reads no images: set system.init_args.captioner to a "
            "vision-language checkpoint with its preprocessor_config.json (or processor_config.json)"
        )
    check_memory(model, reading.gradient_checkpointing)
    _set_pixels(processor, reading)
    captioner = HFCaptioner(
        model,
        processor,
        reading.instruction if reading.instruction is not None else instruction,
        image_first=reading.image_first if reading.image_first is not None else image_first,
    )
    captioner.learner.network.gradient_checkpointing = reading.gradient_checkpointing
    return captioner


def _set_pixels(processor: Any, reading: Reading) -> None:
    """Apply the pixel budget; "edges" is what Qwen's processors call areas."""
    asked = {"shortest_edge": reading.min_pixels, "longest_edge": reading.max_pixels}
    asked = {key: value for key, value in asked.items() if value is not None}
    if not asked:
        return
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        key = "min_pixels" if reading.min_pixels is not None else "max_pixels"
        raise ValueError(
            f"reading.{key}={getattr(reading, key)}, but {type(images).__name__} has no pixel budget; remove reading.{key}"
        )
    size = {key: images.size[key] for key in ("shortest_edge", "longest_edge")} | asked
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"an image cannot have between {size['shortest_edge']} and {size['longest_edge']} pixels; allowed: "
            "0 < reading.min_pixels <= reading.max_pixels (the checkpoint's own where not given)"
        )
    images.size = size
