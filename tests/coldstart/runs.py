"""Cold starts of whole systems through the command line, and what they left alone."""

import re
from pathlib import Path

import torch

from uae import cli
from uae.miniature.data import SceneData
from uae.models.pipelines.contracts import denoiser_of
from uae.rehearsal.catalog import write

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = (
    "UAE", "openai/clip-vit-large-patch14", "wusize/openuni", "OpenGVLab/InternVL3-1B-hf",
    "Efficient-Large-Model/Sana_600M_512px_diffusers", "stabilityai/stable-diffusion-xl-base-1.0", "Qwen/Qwen2.5-VL-3B-Instruct",
    "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image",
)  # fmt: skip
SMALL = (
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "data.init_args.val_size=4",
    "data.init_args.batch_size=2",
)


def checkpoints(folder):
    """What UAE_CHECKPOINTS names."""
    write(folder, NAMES)
    return folder


def fit(name, stage, *changes):
    """The run, in the current folder; ``changes`` without the leading dashes."""
    rehearsal = [] if name == "tiny" else ["debug/rehearsal.yaml"]
    files = [f"{name}.yaml", *rehearsal, f"stages/{stage}.yaml"]
    words = [word for file in files for word in ("--config", str(CONFIGS / file))]
    small = SMALL if name == "tiny" else ()
    return cli.main(["fit", *words, *(f"--{change}" for change in (*small, *changes))])


def started_from(run, folder):
    """The run's system as it was, and as what the run wrote makes it; both on the CPU, frozen."""
    from uae.coldstart import Started

    system = run.model.objective.system
    return system.build(), Started(system, str(folder)).build()


def weights(umm):
    """Part to state dict, under plain names: adapters aside."""
    parts = {
        "captioner": umm.captioner.learner.network.base,
        "denoiser": denoiser_of(umm.renderer.pipe),
        "vae": umm.renderer.pipe.vae,
    }
    if isinstance(umm.conditioner, torch.nn.Module):
        parts["conditioner"] = umm.conditioner
    return {
        f"{part}.{name.replace('.base_layer.', '.')}": value.detach().float()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if "lora_" not in name
    }


def changed(before, after):
    """Names whose weights differ."""
    before, after = weights(before), weights(after)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def matching(umm, pattern):
    """Names that match a regular expression."""
    return {name for name in weights(umm) if re.search(pattern, name)}


def adapters(module):
    """Parameters of adapters that are not what they start as: zero in B."""
    return {name: bool(p.any()) for name, p in module.named_parameters() if "lora_B" in name}


def batch(size, count=3):
    """Scenes with captions, at the size a renderer draws."""
    images, _ = SceneData().source("train").__getitems__(list(range(count)))
    images["image"] = torch.nn.functional.interpolate(images["image"], size)
    return images


@torch.no_grad()
def outputs(umm, images):
    """Log-probs of captions, and images drawn of them."""
    from uae.coldstart.system_objective import caption_rollout

    context = umm.captioner.prepare(images["image"])
    rollout = caption_rollout(umm.captioner, images["caption"], context, 64)
    condition = umm.conditioner.encode(images["caption"], rollout)
    return umm.captioner.logprobs(rollout), umm.renderer.render(condition, range(len(rollout)))


def falls(objective, images, steps=4, rate=0.003):
    """Losses on one batch with the same noise every time; every gradient is where it should be, and finite."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective(images, 0.0)["loss"]
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    return losses
