import peft
import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.export import Export
from tests.tiny_random import RandomTiny
from tests.two_processes import run_on_two
from uae.data import SceneData


def logits(model):
    ids = torch.arange(30).view(2, 15) % 20 + 12
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def base():
    return RandomTiny().build().captioner.policy.model


def test_an_adapter_is_what_plain_peft_loads(run):
    loaded = peft.PeftModel.from_pretrained(base(), run.folder / "export")
    torch.testing.assert_close(logits(loaded), logits(run.cli.model.policy.model), atol=1e-6, rtol=0)
    assert (logits(loaded) - logits(base())).abs().max() > 1e-3  # it has learned something
    weights = [file.name for file in (run.folder / "export").glob("*.safetensors")]
    assert weights == ["adapter_model.safetensors"]


def test_a_model_is_what_plain_transformers_loads(tmp_path, build, trainer):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    module = build()
    trainer(callbacks=[Export(str(tmp_path))]).fit(module, SceneData(batch_size=2, train_size=4))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(module.policy.model), atol=1e-6, rtol=0)
    assert (logits(loaded) - logits(module.system.build().captioner.policy.model)).abs().max() > 1e-3
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.decode(
        [12]
    ) == module.umm.captioner.processor.tokenizer.decode([12])


def sharded_run(rank, folder, kind):
    """Two steps under FSDP2; the weights as the policy's own shards say."""
    from functools import partial

    from uae.encoders import LayoutEncoder
    from uae.grpo import GRPOLoss
    from uae.models.finetune import Full, LoRA
    from uae.module import UnifiedGRPO
    from uae.rewards import EncoderSimilarity, WeightedReward
    from uae.strategy import FSDP2Strategy
    from uae.types import Sampling

    module = UnifiedGRPO(
        RandomTiny(),
        WeightedReward({"layout": EncoderSimilarity(LayoutEncoder())}, {"layout": 1.0}),
        LoRA(rank=4) if kind == "lora" else Full("language_model"),
        GRPOLoss(),
        Sampling(max_tokens=4),
        group=3,
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    run = Trainer(
        accelerator="cpu", devices=2, strategy=FSDP2Strategy(), max_steps=2, limit_val_batches=0, inference_mode=False,
        use_distributed_sampler=False, callbacks=[Export(folder)], **quiet,
    )  # fmt: skip
    run.fit(module, SceneData(batch_size=2, train_size=16))
    trained = {name: p for name, p in module.policy.model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_sharded_policy_is_gathered_first(tmp_path, kind):
    expected, _ = run_on_two(sharded_run, str(tmp_path), kind, timeout=120)
    if kind == "lora":
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    else:
        from transformers import AutoModelForImageTextToText

        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    found = dict(loaded.named_parameters())
    assert expected
    start = dict(base().named_parameters()) if kind == "full" else {}
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].detach(), weight, atol=0, rtol=0)
    assert any((weight - start.get(name, torch.zeros(()))).abs().max() > 1e-4 for name, weight in expected.items())
