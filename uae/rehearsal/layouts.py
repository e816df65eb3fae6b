"""Tiny random checkpoints of UAE, UniWorld-V1 and OpenUni, which no library reads, with the released names of all weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from uae.rehearsal.encoders import SIZES
from uae.rehearsal.language_models import WIDTH, qwen2_5_vl
from uae.rehearsal.pipelines import write_flux, write_sana, write_sd3

QUERIES = 256  # number of OpenUni's queries


def write_uae(folder: Path) -> None:
    """UAE: Stable Diffusion 3, its trained transformer with an adapter, the language model with an adapter, the projector."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, get_peft_model

    write_sd3(folder / "SD3_model")
    decoder = SD3Transformer2DModel.from_pretrained(folder / "SD3_model", subfolder="transformer", local_files_only=True)
    _move(decoder, seed=1).save_pretrained(folder / "dit")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    adapted = get_peft_model(decoder, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    _fill_adapter(adapted, seed=2).save_pretrained(folder / "dit_lora")

    model, processor = qwen2_5_vl(tied=True, seed=11)
    processor.save_pretrained(folder / "llm_model_preprocessor")
    width = decoder.config.joint_attention_dim
    model.projector = _mlp(WIDTH, 2 * width, width, nn.GELU(), seed=3)
    model.bfloat16().save_pretrained(folder / "llm", max_shard_size="200KB")
    _write_adapted_shards(folder / "llm_lora", model)


def _write_adapted_shards(folder: Path, model: Any) -> None:
    """The state dict of a model whose inner model has an adapter, in three files without an index."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    adapted = get_peft_model(model.model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
    model.model = _fill_adapter(adapted, seed=4)
    _move(model.projector, seed=5)  # trained together with the adapter
    state = {name: tensor.bfloat16().contiguous().clone() for name, tensor in model.state_dict().items()}
    folder.mkdir()
    names, shard = list(state), -(-len(state) // 3)
    for number in range(3):
        part = {name: state[name] for name in names[number * shard : (number + 1) * shard]}
        save_file(part, folder / f"model-{number + 1:05}-of-00003.safetensors", metadata={"format": "pt"})


def write_uniworld(folder: Path) -> None:
    """UniWorld-V1: Qwen2.5-VL as of transformers 4.50, FLUX and three projectors in one set of files."""
    from diffusers import FluxTransformer2DModel
    from huggingface_hub import save_torch_state_dict

    model, processor = qwen2_5_vl(tied=False, seed=12)
    with TemporaryDirectory() as temporary:
        write_flux(Path(temporary))
        denoiser = FluxTransformer2DModel.from_pretrained(temporary, subfolder="transformer", local_files_only=True)
        config = json.loads((Path(temporary) / "transformer" / "config.json").read_text())
    width, channels = config["joint_attention_dim"], config["in_channels"]
    tower = nn.Module()
    tower.denoiser = _move(denoiser, seed=6)
    tower.denoise_projector = _mlp(WIDTH, 3 * width, width, nn.SiLU(), seed=7)
    tower.siglip_projector = _mlp(SIZES["hidden_size"], 3 * width, width, nn.SiLU(), seed=8)
    tower.vae_projector = _mlp(channels, 3 * channels, width, nn.SiLU(), seed=9)
    state = {**_as_on_disk(model), **{f"denoise_tower.{name}": tensor for name, tensor in tower.state_dict().items()}}
    state = {name: tensor.bfloat16().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(state, folder, max_shard_size="300KB")
    (folder / "config.json").write_text(json.dumps(_uniworld_config(model.config, config), indent=2))
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    head = nn.Sequential(nn.Linear(WIDTH, 96), nn.SiLU(), nn.Dropout(0.3), nn.Linear(96, 2))
    torch.save(_move(head, seed=10).state_dict(), folder / "task_head_final.pt")


def _uniworld_config(qwen: Any, denoiser: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` as transformers 4.50 wrote it: the text settings are at the top, and the image tower is "qwen2_5_vl"."""
    from transformers import PreTrainedConfig

    general = {*PreTrainedConfig().to_dict(), "layer_types", "model_type"}
    text, vision = (
        {key: value for key, value in part.to_dict().items() if key not in general} for part in (qwen.text_config, qwen.vision_config)
    )
    rope = text.pop("rope_parameters")
    vision.pop("rope_parameters", None)
    width = denoiser["joint_attention_dim"]
    return {
        **text,
        "architectures": ["UnivaQwen2p5VLForConditionalGeneration"],
        "model_type": "univa_qwen2p5vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"},
        "vision_config": {**vision, "model_type": "qwen2_5_vl"},
        **{key: value for key, value in qwen.to_dict().items() if key.endswith("token_id") and value is not None},
        "image_token_length": None,
        "shortcut_image_embeds": False,
        "shortcut_image_embeds_scale": 0.5,
        "shortcut_projector_type": None,
        "denoise_tower": {
            "model_type": "univa_denoise_tower",
            "denoiser_type": "flux",
            "denoise_projector_type": "mlp2x_gelu",
            "vae_projector_type": "mlp2x_gelu",
            "input_hidden_size": WIDTH,
            "vae_input_hidden_size": denoiser["in_channels"],
            "output_hidden_size": width,
            "denoiser_config": denoiser,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0",
    }


def write_openuni(folder: Path) -> None:
    """OpenUni-B-512 and -L-512. Files hold the trained parts only; those of blip3o60k also hold Sana's transformer."""
    from diffusers import SanaTransformer2DModel

    with TemporaryDirectory() as temporary:
        write_sana(Path(temporary))
        sana = SanaTransformer2DModel.from_pretrained(temporary, subfolder="transformer", local_files_only=True)
    trained = nn.Module()
    trained.connector = _OpenUniConnector(WIDTH, layers=6)
    trained.projector = nn.Linear(WIDTH, sana.config.caption_channels)
    trained.meta_queries = nn.Parameter(torch.zeros(QUERIES, WIDTH))
    folder.mkdir(parents=True, exist_ok=True)
    releases = ("openuni_b_internvl3_1b_sana_0_6b_512_hf", "openuni_l_internvl3_2b_sana_1_6b_512_hf")
    for stage in ("text2image23m", "blip3o60k"):
        if stage == "blip3o60k":
            trained.transformer = sana
        _move(trained, seed=13)
        for release in releases:
            torch.save(_half(trained), folder / f"{release}_{stage}.pth")


class _OpenUniConnector(nn.Module):
    """A connector with the released names and shapes, but without a forward pass."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in range(layers)])
        for layer in self.layers:
            layer.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(width, width) for x in ("q", "k", "v", "out")})
            layer.layer_norm1, layer.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            layer.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


def _as_on_disk(model: Any) -> dict[str, Tensor]:
    """The state dict with the names that transformers writes to disk: ``visual.*``, ``model.*``, ``lm_head.*``."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        return load_file(Path(temporary) / "model.safetensors")


def _mlp(width: int, inner_width: int, width_out: int, activation: nn.Module, seed: int) -> nn.Sequential:
    return _move(nn.Sequential(nn.Linear(width, inner_width), activation, nn.Linear(inner_width, width_out)), seed)


def _move(module: Any, seed: int) -> Any:
    """Add noise of the usual size of weights to all parameters."""
    noise = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        size = 0.5 * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.data.add_(torch.randn(weight.shape, generator=noise) * size)
    return module


def _fill_adapter(adapted: Any, seed: int) -> Any:
    """Fill the factors that start at zero with noise, as if the adapter were trained."""
    noise = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02, generator=noise)
    return adapted


def _half(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "UAE": write_uae,
    "LanguageBind/UniWorld-V1": write_uniworld,
    "wusize/openuni": write_openuni,
}
