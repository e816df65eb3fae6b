"""Every real system, loaded from checkpoints in the official layout, equals an assembly of plain library calls."""

import pytest
import torch
from torch.nn import functional as F

from tests.systems import plain_assemblies as plain
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.any_pipeline import AnyPipeline
from uae.systems.metaquery import OpenUni
from uae.systems.uae import NEGATIVE, UAE
from uae.systems.uniworld_v1 import UniWorldV1
from uae.types import Sampling
from uae.weights.placement import Placement

CAPTIONS = ["a red square", 'A tiny blue ring at the top left, and a "white" cross; navy background.']
SEEDS = [7, 8]
CLOSE = {"atol": 1e-5, "rtol": 0}
OPENUNI = "wusize/openuni/openuni_b_internvl3_1b_sana_0_6b_512_hf_blip3o60k.pth"


FULL = Placement("float32")


def small(**changes):
    return {
        "reading": Reading(dtype="float32"),
        "rendering": Rendering(**{"height": 32, "width": 32, "steps": 2, "placement": FULL, **changes}),
    }


def render(umm, captions=CAPTIONS, seeds=SEEDS):
    with torch.no_grad():
        return umm.renderer.render(umm.conditioner.encode(captions), seeds)


# ------------------------------------------------------------------------------------------------------------- parity


@torch.no_grad()
def test_uae(mirrored):
    """Caption -> generate role -> hidden states -> projector -> Stable Diffusion 3 with both adapters added by hand."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder = mirrored / "UAE"
    images = render(UAE("UAE", **small(guidance=5.0)).build())
    model, projector = plain.uae_language_model(folder)
    words = AutoTokenizer.from_pretrained(folder / "llm_model_preprocessor")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "dit")
    transformer = PeftModel.from_pretrained(transformer, folder / "dit_lora").merge_and_unload()
    vae = AutoencoderKL.from_pretrained(folder / "SD3_model", subfolder="vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "SD3_model", subfolder="scheduler")
    pooled = plain.empty_pooled(folder / "SD3_model")

    def condition(text):
        return plain.mlp(projector, plain.final_states(model, words, plain.chatml("generate", text)), F.gelu), pooled

    for caption, seed, image in zip(CAPTIONS, SEEDS, images, strict=True):
        expected = plain.euler(transformer, vae, scheduler, condition(caption), condition(NEGATIVE), 5.0, seed, size=32, steps=2)
        torch.testing.assert_close(image, expected, **CLOSE)
    assert (images[0] - images[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("with_t5", [True, False])
@torch.no_grad()
def test_uniworld(mirrored, with_t5):
    """T5's states, then the projected states of the caption in a user's turn without a system turn; CLIP's vector."""
    from diffusers import FluxPipeline

    folder, flux = mirrored / "LanguageBind/UniWorld-V1", mirrored / "black-forest-labs/FLUX.1-dev"
    images = render(UniWorldV1(with_t5=with_t5, text_encoders=FULL, **small(distilled_guidance=3.5)).build())
    model, words, tower = plain.uniworld_language_model(folder)
    pipe = FluxPipeline.from_pretrained(flux)
    denoiser = {k.removeprefix("denoiser."): v.float() for k, v in tower.items() if k.startswith("denoiser.")}
    pipe.transformer.load_state_dict(denoiser)
    projector = {k.split(".", 1)[1]: v for k, v in tower.items() if k.startswith("denoise_projector.")}
    for caption, seed, image in zip(CAPTIONS, SEEDS, images, strict=True):
        states = plain.final_states(model, words, plain.chatml("user", caption, system=False))
        embeds = plain.mlp(projector, states, F.silu)
        t5, pooled, _ = pipe.encode_prompt(caption if with_t5 else "", None, max_sequence_length=256)
        expected = pipe(
            prompt_embeds=torch.cat([t5, embeds], dim=1) if with_t5 else embeds,
            pooled_prompt_embeds=pooled,
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images[0]
        torch.testing.assert_close(image, expected, **CLOSE)


@torch.no_grad()
def test_openuni(mirrored):
    """Queries behind the caption, an encoder and a linear layer by torch's own functions, Sana with the trained transformer."""
    from diffusers import SanaPipeline
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base, sana = mirrored / "OpenGVLab/InternVL3-1B-hf", "Efficient-Large-Model/Sana_600M_512px_diffusers"
    images = render(OpenUni(OPENUNI, "OpenGVLab/InternVL3-1B-hf", sana, **small(guidance=4.5)).build())
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(base)
    state = {k: v.float() for k, v in torch.load(mirrored / OPENUNI, weights_only=True).items()}
    pipe = SanaPipeline.from_pretrained(mirrored / sana)
    trained = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    pipe.transformer.load_state_dict(trained)

    def condition(text):
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<img>"
        ids = words(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        inputs = torch.cat([model.get_input_embeddings()(ids), state["meta_queries"][None]], dim=1)
        states = model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, ids.shape[1] :]
        return F.linear(plain.openuni_encoder(state, states), state["projector.weight"], state["projector.bias"])

    ones = torch.ones(1, 256)
    for caption, seed, image in zip(CAPTIONS, SEEDS, images, strict=True):
        expected = pipe(
            prompt_embeds=condition(f"Generate an image: {caption}"),
            negative_prompt_embeds=condition("Generate an image."),
            prompt_attention_mask=ones,
            negative_prompt_attention_mask=ones,
            negative_prompt=None,
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=4.5,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images[0]
        torch.testing.assert_close(image, expected, **CLOSE)
    assert (images[0] - images[1]).abs().mean() > 1e-4


PIPELINES = {
    "stabilityai/stable-diffusion-3.5-medium": {"guidance_scale": 4.0, "negative_prompt": "ugly"},
    "black-forest-labs/FLUX.1-dev": {"true_cfg_scale": 4.0, "negative_prompt": "ugly"},
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": {"guidance_scale": 4.0, "negative_prompt": "ugly"},
    "Qwen/Qwen-Image": {"true_cfg_scale": 4.0, "negative_prompt": "ugly"},
    "stabilityai/stable-diffusion-xl-base-1.0": {"guidance_scale": 4.0, "negative_prompt": "ugly"},
    "Shitao/OmniGen-v1-diffusers": {"guidance_scale": 4.0},  # takes text only
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@torch.no_grad()
def test_any_pipeline(mirrored, pipeline):
    """One key chooses the pipeline; what is drawn is what the pipeline itself draws of the same words."""
    from diffusers import DiffusionPipeline

    system = AnyPipeline("Qwen/Qwen2.5-VL-3B-Instruct", pipeline, "ugly", text_encoders=FULL, **small(guidance=4.0))
    images = render(system.build())
    pipe = DiffusionPipeline.from_pretrained(mirrored / pipeline)
    extra = {"use_resolution_binning": False} if "Sana" in pipeline else {}
    for caption, seed, image in zip(CAPTIONS, SEEDS, images, strict=True):
        expected = pipe(
            caption,
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **PIPELINES[pipeline],
            **extra,
        ).images[0]
        torch.testing.assert_close(image, expected, **CLOSE)
    assert (images[0] - images[1]).abs().mean() > 1e-4


# -------------------------------------------------------------------------------------------------------- conformance

SYSTEMS = {
    "uae": lambda: UAE("UAE", **small(guidance=5.0)),
    "uniworld": lambda: UniWorldV1(text_encoders=FULL, **small(distilled_guidance=3.5)),
    "openuni": lambda: OpenUni(
        OPENUNI,
        "OpenGVLab/InternVL3-1B-hf",
        "Efficient-Large-Model/Sana_600M_512px_diffusers",
        **small(guidance=4.5),
    ),
    "qwen3_sd3": lambda: AnyPipeline(
        "Qwen/Qwen3-VL-4B-Instruct",
        "stabilityai/stable-diffusion-3.5-medium",
        text_encoders=FULL,
        **small(guidance=4.0),
    ),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def umm(request, checkpoints):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CHECKPOINTS", str(checkpoints))
        return SYSTEMS[request.param]().build()


@torch.no_grad()
def test_ratio_is_one(umm):
    images = [torch.rand(3, 40, side, generator=torch.Generator().manual_seed(side)) for side in (40, 72)]
    rollout = umm.captioner.sample(umm.captioner.prepare(images), 3, Sampling(1.0, 10), range(6))
    torch.testing.assert_close(umm.captioner.logprobs(rollout), rollout.logp_RS, **CLOSE)
    assert len(set(rollout.texts)) > 3


@torch.no_grad()
def test_greedy_equals_generate_and_shipped_settings_change_nothing(umm):
    """The checkpoints ship top_k, a repetition penalty and a low temperature."""
    context = umm.captioner.prepare([torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))])
    ours = umm.captioner.sample(context, 2, Sampling(0.0, 10), range(2)).tokens_NT
    model, inputs = umm.captioner.learner.network.model, context.inputs()
    assert model.generation_config.repetition_penalty != 1.0
    neutral = {"do_sample": False, "repetition_penalty": 1.0, "top_k": None, "top_p": None, "temperature": None}
    ends = {"eos_token_id": umm.captioner.end_ids, "pad_token_id": umm.captioner.pad_id}
    banned = umm.captioner.learner.network.banned_ids.tolist()
    theirs = model.generate(**inputs, **neutral, **ends, max_new_tokens=10, suppress_tokens=banned)
    assert torch.equal(ours, theirs[:, inputs["input_ids"].shape[1] :].repeat_interleave(2, 0))
    hot = umm.captioner.sample(context, 300, Sampling(50.0, 2), range(300))
    assert banned
    assert not torch.isin(hot.tokens_NT[hot.mask_RS.bool()], umm.captioner.learner.network.banned_ids).any()


@torch.no_grad()
def test_an_image_depends_on_its_caption_and_seed_only(umm):
    together = render(umm)
    assert together.min() >= 0
    assert together.max() <= 1
    for row in range(2):
        torch.testing.assert_close(render(umm, CAPTIONS[row : row + 1], SEEDS[row : row + 1])[0], together[row], **CLOSE)
    assert (render(umm, CAPTIONS, [SEEDS[0], 9])[1] - together[1]).abs().mean() > 1e-4
