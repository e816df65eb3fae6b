"""Any vision-language checkpoint in transformers format as a captioner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from uae.files.locations import locate
from uae.models.captioners.caches import check_memory
from uae.models.captioners.captioner import Frame, HFCaptioner
from uae.models.captioners.engine import KEY, EngineCaptioner
from uae.models.captioners.steps import check_steps
from uae.models.captioners.vllm_engine import VLLM, VLLMEngine
from uae.weights.remote_code import refused, trusted


@dataclass(frozen=True)
class Reading:
    """How a captioner reads images.

    Args:
        instruction: The question that the captioner gets with every image; None is the system's own.
        image_first: Whether the image stands before the question in the prompt; None is the system's own order.
        dtype: Dtype of the captioner's weights. Adapters stay in float32.
        min_pixels: Smallest number of pixels that an image is scaled to, for processors that resize as Qwen's does; a multiple of
            the area of one token (28 x 28 for Qwen2.5-VL). None keeps the checkpoint's.
        max_pixels: Largest number of pixels that an image is scaled to, likewise.
        attention: Name of the attention implementation in transformers ("sdpa", "eager", "flash_attention_2", ...); None is
            the library's choice.
        gradient_checkpointing: Whether activations inside layers are recomputed in the backward pass instead of kept.
        compile: Whether the steps in which captions (and the image tokens of a unified model) are drawn are compiled, and recorded
            as a CUDA graph on a GPU. It takes a minute at the start, and changes rounding only. Not for sharded policies.
        engine: What draws captions in place of transformers; None is transformers. See docs/real_systems.md, "Rollouts by vLLM".
        trust_remote_code: Repeat the captioner's name here to allow the Python code in its checkpoint to run. With None no
            such code runs.
    """

    instruction: str | None = None
    image_first: bool | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    min_pixels: int | None = None
    max_pixels: int | None = None
    attention: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    engine: VLLM | None = None
    trust_remote_code: str | None = None


def load_captioner(
    name: str, reading: Reading, instruction: str, image_first: bool = True, processor_name: str | None = None
) -> HFCaptioner:
    """Load the captioner of a checkpoint on the CPU. `uae.models.finetune` later decides which weights train.

    Args:
        name: Folder or hub name of the checkpoint, see `uae.files.locations.locate`.
        reading: Settings of the user. Those that are not None replace ``instruction`` and ``image_first``.
        instruction: The question that the system asks by default.
        image_first: Whether the system by default puts the image before the question.
        processor_name: Folder or hub name of the processor; None is the checkpoint itself.

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
    """Load model and processor; an error of the library becomes one line that names the key to change."""
    import transformers
    from safetensors import SafetensorError

    path, processor_path = locate(name), locate(processor_name)
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            processor_path,
            local_files_only=os.path.isdir(processor_path),
            trust_remote_code=trust and processor_path == path,
        )
        loader: Any = transformers.AutoModelForImageTextToText
        model, report = loader.from_pretrained(
            path,
            dtype=getattr(torch, reading.dtype),
            attn_implementation=reading.attention,
            local_files_only=os.path.isdir(path),
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # the names are reported below
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        key = "captioner or reading.attention of model.init_args.system.init_args"
        keys = key if reading.attention else "model.init_args.system.init_args.captioner"
        raise ValueError(
            f"captioner {name!r} cannot be read as a vision-language model in transformers format "
            f"({' '.join(str(error).split())[:200]}); correct {keys}"
        ) from error
    absent = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"captioner {name!r} lacks {len(absent)} weights of its config ({absent[0]}, ...), or has them in other "
            "shapes; set model.init_args.system.init_args.captioner to a complete checkpoint"
        )
    return model, processor


def assemble_captioner(
    model: Any,
    processor: Any,
    reading: Reading,
    instruction: str,
    image_first: bool = True,
    banned_ids: Sequence[int] = (),
    frame: Frame = Frame(),  # noqa: B008 (frozen)
) -> HFCaptioner:
    """Make a captioner from a model (on any device, ``meta`` included) and its processor, with the settings of ``reading``."""
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"the captioner's processor ({type(processor).__name__}) reads no images: set model.init_args.system.init_args.captioner "
            "to a vision-language checkpoint with its preprocessor_config.json (or processor_config.json)"
        )
    check_memory(model, reading.gradient_checkpointing)
    if reading.compile:
        check_steps(model)
    _set_pixels(processor, reading)
    captioner = HFCaptioner(
        model,
        processor,
        reading.instruction if reading.instruction is not None else instruction,
        banned_ids,
        image_first=reading.image_first if reading.image_first is not None else image_first,
        frame=frame,
    )
    captioner.learner.network.gradient_checkpointing = reading.gradient_checkpointing
    captioner.learner.network.compile_steps = reading.compile
    return captioner


def with_engine(captioner: HFCaptioner, reading: Reading) -> HFCaptioner | EngineCaptioner:
    """The captioner, with the engine that draws for it if ``reading`` asks for one.

    Raises:
        ValueError: That engine cannot run here, or the steps of another sampler are to be compiled.
    """
    if reading.engine is not None and reading.compile:
        raise ValueError(
            f"{KEY} and {KEY.removesuffix('engine')}compile are both set, but the engine compiles its own steps; allowed: one of them"
        )
    return captioner if reading.engine is None else EngineCaptioner(captioner, VLLMEngine(captioner, reading.engine))


def without_engine(reading: Reading, system: str) -> None:
    """Refuse an engine for a system whose captioner also draws images.

    Raises:
        ValueError: ``reading`` asks for one.
    """
    if reading.engine is not None:
        raise ValueError(f"{KEY} is set, but the network of {system} draws images, too, which vLLM cannot; allowed: null")


def _set_pixels(processor: Any, reading: Reading) -> None:
    """Set the smallest and largest image area. Qwen's processors call these areas "edges", although they are in pixels."""
    asked = {"shortest_edge": reading.min_pixels, "longest_edge": reading.max_pixels}
    asked = {key: value for key, value in asked.items() if value is not None}
    if not asked:
        return
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        key = "min_pixels" if reading.min_pixels is not None else "max_pixels"
        raise ValueError(
            f"model.init_args.system.init_args.reading.{key}={getattr(reading, key)}, but {type(images).__name__} has no pixel "
            f"budget; remove model.init_args.system.init_args.reading.{key}"
        )
    size = {key: images.size[key] for key in ("shortest_edge", "longest_edge")} | asked
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"an image cannot have between {size['shortest_edge']} and {size['longest_edge']} pixels; allowed: "
            "0 < min_pixels <= max_pixels (the checkpoint's own where not given); change min_pixels or max_pixels of "
            "model.init_args.system.init_args.reading"
        )
    images.size = size
