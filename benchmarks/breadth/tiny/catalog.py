"""All families whose tiny checkpoints can be made, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.breadth.tiny import gemmas, grids, tiles, towers
from benchmarks.breadth.tiny.parts import Parts, model

FAMILIES: dict[str, Callable[[], Parts]] = {
    "Qwen2-VL": lambda: grids.qwen("Qwen2"),
    "Qwen2.5-VL": lambda: grids.qwen("Qwen2_5_"),
    "Qwen3-VL": lambda: grids.qwen("Qwen3"),
    "Qwen3-VL-MoE": grids.qwen3_vl_moe,
    "Qwen3.5": grids.qwen3_5,
    "InternVL": towers.internvl,
    "Llava": towers.llava,
    "Llava-Next": towers.llava_next,
    "Llava-OneVision": towers.llava_onevision,
    "Idefics3": tiles.idefics3,
    "SmolVLM": tiles.smolvlm,
    "FastVLM": towers.fast_vlm,
    "DeepSeek-VL": towers.deepseek_vl,
    "GLM-4V": grids.glm4v,
    "GLM-4.6V": grids.glm46v,
    "Mistral3": towers.mistral3,
    "Pixtral": towers.pixtral,
    "PaliGemma": gemmas.paligemma,
    "PaliGemma 2": gemmas.paligemma2,
    "Gemma 3": gemmas.gemma3,
    "Gemma 3n": gemmas.gemma3n,
    "Gemma 4": gemmas.gemma4,
    "Ovis2": towers.ovis2,
    "LFM2-VL": tiles.lfm2_vl,
    "MiniCPM-V 4.6": grids.minicpm,
    "Molmo2": tiles.molmo2,
    "Aya Vision": towers.aya_vision,
    "Command A Vision": towers.command_a,
    "Llama 4": tiles.llama4,
    "Llama 3.2 Vision": tiles.mllama,
    "Granite 4 Vision": tiles.granite4_vision,
    "Granite-Docling": tiles.granite_docling,
    "HyperCLOVA X Vision": grids.hyperclova,
    "Kimi-K2.5": grids.kimi,
}


def write(name: str, folder: Path, seed: int = 0) -> None:
    """Write a family's tiny checkpoint, in float32, as transformers writes them.

    Args:
        name: A key of `FAMILIES`.
        folder: Where to.
        seed: Of the random weights.
    """
    parts = FAMILIES[name]()
    model(parts, seed).save_pretrained(folder)
    parts.processor.save_pretrained(folder)
