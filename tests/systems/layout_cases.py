"""Tiny official checkpoints, written by hand: names and files as the official code leaves them."""

import json

import peft
import torch
from safetensors.torch import save_file

from uae.miniature.tiny import create_captioner, processor

RANK = 4


def language_model(seed=0, tied=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_captioner(layers=2).eval()
        if not tied:
            model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 10)
        for parameter in model.parameters():  # biases and norms, too, say which weight is which
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model):
    """Of a picture and a question."""
    words = processor()
    picture = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    prompt = words.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}], tokenize=False
    )
    with torch.no_grad():
        return model(**words(text=[prompt], images=[picture], return_tensors="pt")).logits


def adapted(model, seed=1, rank=RANK):
    """The inner model wrapped by PEFT as the official training wraps it, with an adapter that matters."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    model.model = peft.get_peft_model(model.model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def old_name(name):
    """As transformers before 4.52 had it, in memory and on disk."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def old_wrapped_name(name):
    """The same with PEFT around the inner model, which then had no image tower and no ``language_model``."""
    return name.replace("model.base_model.model.language_model.", "model.base_model.model.")


def clones(state):
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def projector(width=128):
    generator = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (24, width), "0.bias": (24,), "2.weight": (32, 24), "2.bias": (32,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_config(folder, model, **more):
    """``config.json`` as transformers 4.50 wrote it: the text model's settings at the top, rope under its old name."""
    folder.mkdir(parents=True, exist_ok=True)
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    for name in ("model_type", "architectures", "layer_types"):
        text.pop(name, None)
        vision.pop(name, None)
    vision["model_type"] = "qwen2_5_vl"  # the same as of the whole
    tokens = {name: getattr(model.config, name) for name in vars(model.config) if name.endswith("_token_id")}
    tied = model.config.tie_word_embeddings
    config = {
        **text,
        **tokens,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        "model_type": "qwen2_5_vl",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.1}')


def write_shards(folder, state, count=3, index=True):
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(sorted(state))}
    for file in files:
        save_file(clones({name: state[name] for name in where if where[name] == file}), folder / file, {"format": "pt"})
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_uae(folder, start, trained_state):
    """``llm`` from a model, ``llm_lora`` from a state dict; the projector in both, trained in the second."""
    state = {old_name(name): value for name, value in start.state_dict().items() if name != "lm_head.weight"}
    first = {f"projector.{name}": torch.zeros_like(value) for name, value in projector().items()}
    write_config(folder / "llm", start)
    write_shards(folder / "llm", state | first, count=2)
    if trained_state is not None:
        write_shards(folder / "llm_lora", trained_state | {f"projector.{k}": v for k, v in projector().items()}, index=False)


def sd3_transformer(seed=0):
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SD3Transformer2DModel(
            sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=8,
            pos_embed_max_size=4, qk_norm="rms_norm",
        ).eval()  # fmt: skip


def flux_transformer(seed=0):
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ).eval()  # fmt: skip


def sd3_output(model):
    g = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(s, generator=g) for s in ((2, 4, 4, 4), (2, 3, 32), (2, 8)))
    with torch.no_grad():
        return model(latents, text, pooled, torch.tensor([500.0, 100.0])).sample


def flux_output(model):
    g = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(s, generator=g) for s in ((2, 6, 4), (2, 3, 32), (2, 8)))
    with torch.no_grad():
        return model(
            latents, text, pooled, torch.tensor([0.5, 0.1]), torch.randn(6, 3, generator=g), torch.zeros(3, 3),
            guidance=torch.tensor([3.5, 3.5]),
        ).sample  # fmt: skip


def write_uniworld(folder, model, transformer, denoiser_config=None):
    """One sharded state dict of everything, as transformers 4.50 saved the official class."""
    state = {old_name(name): value for name, value in model.state_dict().items()}
    for i, name in enumerate(("denoise_projector", "siglip_projector", "vae_projector")):
        state |= {f"denoise_tower.{name}.{key}": value + i for key, value in projector().items()}
    state |= {f"denoise_tower.denoiser.{key}": value for key, value in transformer.state_dict().items()}
    tower = {"denoiser_type": "flux", "denoiser_config": denoiser_config or dict(transformer.config)}
    write_config(folder, model, denoise_tower=tower)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "univa_qwen2p5vl"}))
    write_shards(folder, state)
    torch.save({"0.weight": torch.zeros(1)}, folder / "task_head_final.pt")
