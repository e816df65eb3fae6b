"""Every real system once more, from plain transformers and diffusers calls: what ours must equal. One caption at a time."""

import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


def chatml(role, text, system=True):
    """Qwen's chat format by hand."""
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>{role}\n{text}<|im_end|>\n<|im_start|>assistant\n"


def final_states(model, tokenizer, text):
    """Hidden states ``[1, L, D]`` after the final norm, of the text alone."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    return model(**ids, output_hidden_states=True).hidden_states[-1]


def uae_language_model(folder):
    """The base of ``llm`` with the weights of the trained shards, the adapter added by hand; and the projector's weights."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / "llm", dtype=torch.float32)
    shards = {}
    for file in sorted((folder / "llm_lora").glob("model-*.safetensors")):
        shards |= load_file(file)
    projector = {key.split("projector.")[1]: value for key, value in shards.items() if "projector." in key and "lora_" not in key}
    parameters = dict(model.named_parameters())
    adapted = 0
    for name, parameter in parameters.items():
        if name.startswith("lm_head"):
            continue
        inner = name.removeprefix("model.")
        stem = inner.rsplit(".", 1)[0]
        candidates = [f"model.base_model.model.{inner}", f"model.base_model.model.{stem}.base_layer.{inner.rsplit('.', 1)[1]}"]
        (found,) = [key for key in candidates if key in shards]
        value = shards[found].float()
        down = shards.get(f"model.base_model.model.{stem}.lora_A.default.weight")
        if down is not None and name.endswith("weight"):
            up = shards[f"model.base_model.model.{stem}.lora_B.default.weight"]
            value = value + 64 / len(down) * up.float() @ down.float()
            adapted += 1
        parameter.data = value.clone()
    assert adapted > 6
    return model.eval(), projector


def mlp(state, x, activation):
    """Linear, activation, Linear."""
    hidden = activation(F.linear(x, state["0.weight"].float(), state["0.bias"].float()))
    return F.linear(hidden, state["2.weight"].float(), state["2.bias"].float())


def empty_pooled(folder):
    """CLIP's projected vectors of the empty caption, by the pipeline's own prompt encoder."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    _, _, pooled, _ = pipe.encode_prompt("", None, None, do_classifier_free_guidance=False, device="cpu")
    return pooled


def euler(transformer, vae, scheduler, condition, negative, guidance, seed, size, steps):
    """Euler's method on the flow of a Stable Diffusion 3 transformer: two passes a step, no padding anywhere."""
    scheduler.set_timesteps(steps)
    side = size // (2 ** (len(vae.config.block_out_channels) - 1))
    shape = 1, transformer.config.in_channels, side, side
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for t, now, then in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        good, bad = (
            transformer(x, encoder_hidden_states=e, pooled_projections=p, timestep=t[None]).sample for e, p in (condition, negative)
        )
        x = x + (then - now) * (bad + guidance * (good - bad))
    image = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (image[0] / 2 + 0.5).clamp(0, 1)


def uniworld_language_model(folder):
    """Qwen2.5-VL from the old names, its tokenizer, and the rest of the checkpoint below ``denoise_tower``."""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    written = json.loads((folder / "config.json").read_text())
    del written["model_type"], written["denoise_tower"]
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**written)).eval()
    renamed = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else
        f"model.{name}" if name.startswith("visual.") else name: value
        for name, value in state.items() if not name.startswith("denoise_tower.")
    }  # fmt: skip
    model.load_state_dict(renamed)
    tower = {k.removeprefix("denoise_tower."): v for k, v in state.items() if k.startswith("denoise_tower.")}
    return model.float(), AutoTokenizer.from_pretrained(folder), tower


def openuni_encoder(state, x):
    """OpenUni's connector as torch's own encoder layers: pre-norm, tanh-GELU, no mask."""
    width = x.shape[-1]
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("connector.layers."))
    for number in range(layers):
        part = {k.split(".", 3)[3]: v for k, v in state.items() if k.startswith(f"connector.layers.{number}.")}
        inner = len(part["mlp.fc1.weight"])
        layer = torch.nn.TransformerEncoderLayer(
            width, max(1, width // 64), inner, 0.0, lambda h: F.gelu(h, approximate="tanh"), 1e-6, True, True
        ).eval()
        layer.load_state_dict({
            "self_attn.in_proj_weight": torch.cat([part[f"self_attn.{n}_proj.weight"] for n in "qkv"]),
            "self_attn.in_proj_bias": torch.cat([part[f"self_attn.{n}_proj.bias"] for n in "qkv"]),
            "self_attn.out_proj.weight": part["self_attn.out_proj.weight"],
            "self_attn.out_proj.bias": part["self_attn.out_proj.bias"],
            **{f"linear{n}.{kind}": part[f"mlp.fc{n}.{kind}"] for n in (1, 2) for kind in ("weight", "bias")},
            **{f"norm{n}.{kind}": part[f"layer_norm{n}.{kind}"] for n in (1, 2) for kind in ("weight", "bias")},
        })  # fmt: skip
        x = layer(x)
    return x
