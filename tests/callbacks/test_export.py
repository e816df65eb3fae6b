import json
from functools import partial

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from callbacks.export import Export
from tests.tiny_random import RandomTiny
from tests.two_processes import run_on_two
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA, default_targets
from uae.types import UMM


class FromFolder:
    """The random miniature, its captioner loaded from a folder as a published one would be."""

    def __init__(self, folder):
        self.folder = folder

    def build(self):
        from uae.models.captioners.captioner import HFCaptioner

        umm = RandomTiny().build()
        model = AutoModelForImageTextToText.from_pretrained(self.folder)
        captioner = HFCaptioner(model, AutoProcessor.from_pretrained(self.folder), umm.captioner.instruction)
        captioner.end_ids = umm.captioner.end_ids
        return UMM(captioner, umm.conditioner, umm.renderer)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with generation settings that today's library refuses to write when they are new."""
    folder = tmp_path_factory.mktemp("base")
    captioner = RandomTiny().build().captioner
    captioner.learner.network.model.save_pretrained(folder)
    captioner.processor.save_pretrained(folder)
    settings = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False, "temperature": 0.1, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def logits(model):
    """Of two pictures and a question, so that image tower and language model count."""
    words = RandomTiny().build().captioner.processor
    pictures = list(torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    prompt = words.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}], tokenize=False
    )
    with torch.no_grad():
        return model.eval()(**words(text=[prompt] * 2, images=pictures, return_tensors="pt")).logits


def trained(build, trainer, base, folder, finetune, **options):
    """The policy after two steps; with a KL term, so that a continued adapter has its start beside it."""
    module = build(system=FromFolder(base), finetune=finetune, loss=GRPOLoss(beta=0.01))
    trainer(callbacks=[Export(str(folder), **options)], max_steps=2).fit(module, SceneData(batch_size=2, train_size=4))
    return module


def started_adapter(base, folder):
    """An adapter that a run can start from: another name for its base, a rank of its own, a rank-stabilised scale."""
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=default_targets(plain(base)), init_lora_weights=False)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(plain(base), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.3)
    config.base_model_name_or_path = "elsewhere"
    wrapped.save_pretrained(folder)
    return LoRA(adapter=str(folder))


@pytest.mark.parametrize("kind", ["language model", "all-linear", "continued"])
@pytest.mark.parametrize("merge", [False, True])
def test_plain_libraries_load_the_policy(tmp_path, build, trainer, base, kind, merge):
    finetune = {
        "language model": lambda: LoRA(rank=4, alpha=8),
        "all-linear": lambda: LoRA(rank=2, alpha=8, target_modules="all-linear"),
        "continued": lambda: started_adapter(base, tmp_path / "start"),
    }[kind]()
    folder = tmp_path / "export"
    module = trained(build, trainer, base, folder, finetune, merge=merge)
    expected = logits(module.policy.model)
    start = plain(base) if kind != "continued" else peft.PeftModel.from_pretrained(plain(base), tmp_path / "start")
    assert (expected - logits(start)).abs().max() > 1e-3  # it has learned something
    if merge:
        loaded = plain(folder)
        assert not list(folder.glob("adapter*"))
        assert_published(folder, base, module)
    else:
        loaded = peft.PeftModel.from_pretrained(plain(base), folder)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5 if merge else 0, rtol=0)


def test_a_model_is_what_plain_transformers_loads(tmp_path, build, trainer, base):
    module = trained(build, trainer, base, tmp_path, Full("language_model"))
    torch.testing.assert_close(logits(plain(tmp_path)), logits(module.policy.model), atol=0, rtol=0)
    assert (logits(plain(tmp_path)) - logits(plain(base))).abs().max() > 1e-3
    assert_published(tmp_path, base, module)


def assert_published(folder, base, module):
    """All that a published folder has: names on disk, settings and processor of the base."""
    written, started = (load_file(where / "model.safetensors") for where in (folder, base))
    assert {name: (value.shape, value.dtype) for name, value in written.items()} == {
        name: (value.shape, value.dtype) for name, value in started.items()
    }
    assert GenerationConfig.from_pretrained(folder).to_dict() == GenerationConfig.from_pretrained(base).to_dict()
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == module.umm.captioner.processor.tokenizer.get_vocab()
    assert processor.chat_template == module.umm.captioner.processor.chat_template


def test_weights_merge_in_their_own_dtype(tmp_path, build, trainer, base):
    """The adapter is float32 above bfloat16 weights; the sum is rounded once."""

    class Half(FromFolder):
        def build(self):
            umm = super().build()
            umm.captioner.learner.network.model.to(torch.bfloat16)
            return umm

    module = build(system=Half(base), finetune=LoRA(rank=4, alpha=8), ratio_tolerance=1.0)
    trainer(callbacks=[Export(str(tmp_path), merge=True)]).fit(module, SceneData(batch_size=2, train_size=4))
    found = dict(plain(tmp_path).named_parameters())
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    layers = {n: m for n, m in module.policy.base.named_modules() if hasattr(m, "base_layer")}
    assert layers
    for name, layer in layers.items():
        delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 2
        expected = (layer.base_layer.weight.double() + delta).to(torch.bfloat16)
        torch.testing.assert_close(found[f"{name}.weight"].detach(), expected, atol=1e-9, rtol=2**-7)


def test_an_adapter_that_cannot_be_merged_stops_the_run_at_its_start(tmp_path, build, trainer, base):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=default_targets(plain(base)))
    peft.get_peft_model(plain(base), config).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="more than two factors a layer .*magnitude"):
        trained(build, trainer, base, tmp_path / "export", LoRA(adapter=str(tmp_path / "start")), merge=True)
    assert not (tmp_path / "export").exists()


def test_the_command_line_exports_into_its_folder(run):
    base = RandomTiny().build().captioner.learner.network.model
    loaded = peft.PeftModel.from_pretrained(base, run.folder / "export")
    torch.testing.assert_close(logits(loaded), logits(run.cli.model.policy.model), atol=1e-6, rtol=0)


def sharded_runs(rank, folder):
    """Two steps under FSDP2 with an adapter, exported both ways, and two with everything; the weights as shards say."""
    from uae.encoders import LayoutEncoder
    from uae.module import UnifiedGRPO
    from uae.rewards import EncoderSimilarity, WeightedReward
    from uae.strategy import FSDP2Strategy
    from uae.types import Sampling

    def run(finetune, *exports):
        reward = WeightedReward({"layout": EncoderSimilarity(LayoutEncoder())}, {"layout": 1.0})
        optimizer = partial(torch.optim.SGD, lr=1.0)
        module = UnifiedGRPO(RandomTiny(), reward, finetune, GRPOLoss(), Sampling(max_tokens=4), group=3, optimizer=optimizer)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        Trainer(
            accelerator="cpu", devices=2, strategy=FSDP2Strategy(), max_steps=2, limit_val_batches=0, inference_mode=False,
            use_distributed_sampler=False, callbacks=list(exports), **dict.fromkeys(quiet, False),
        ).fit(module, SceneData(batch_size=2, train_size=16))  # fmt: skip
        weights = module.policy.model.named_parameters()
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in weights}

    adapter = LoRA(rank=4, alpha=8, target_modules="all-linear")
    adapted = run(adapter, Export(f"{folder}/adapter"), Export(f"{folder}/merged", merge=True))
    return adapted, run(Full("language_model"), Export(f"{folder}/full"))


def test_a_sharded_policy_is_gathered_first(tmp_path):
    (adapted, full), _ = run_on_two(sharded_runs, str(tmp_path), timeout=180)
    start = dict(RandomTiny().build().captioner.learner.network.model.named_parameters())
    wrapped = peft.PeftModel.from_pretrained(RandomTiny().build().captioner.learner.network.model, tmp_path / "adapter")
    assert_equal(wrapped, adapted, atol=0)
    assert any(weight.abs().max() > 1e-4 for name, weight in adapted.items() if "lora_B" in name)
    by_hand = {name: weight.clone() for name, weight in adapted.items() if "lora_" not in name}
    for name in adapted:
        if "lora_A" in name:
            delta = adapted[name.replace("lora_A", "lora_B")] @ adapted[name] * 8 / 4
            by_hand[name.replace("lora_A.default", "base_layer")] += delta
    by_hand = {n.removeprefix("base_model.model.").replace("base_layer.", ""): w for n, w in by_hand.items()}
    assert_equal(plain(tmp_path / "merged"), by_hand, atol=1e-6)
    assert_equal(plain(tmp_path / "full"), full, atol=0)
    assert any((weight - start[name]).abs().max() > 1e-4 for name, weight in full.items())


def assert_equal(model, weights, atol):
    found = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.testing.assert_close(found, weights, atol=atol, rtol=0)


def test_an_export_holds_the_files_of_one_run(tmp_path, build, trainer, base):
    """A new run refuses a folder with files of something else; a run that goes on replaces its own export as a whole."""
    folder, data = tmp_path / "export", SceneData(batch_size=2, train_size=8)
    trained(build, trainer, base, folder, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"folder=.*export' of callbacks\.export\.Export holds files of something else"):
        trained(build, trainer, base, folder, Full("language_model"))
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    module = build(system=FromFolder(base), finetune=LoRA(rank=2))
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "1.ckpt")
    module = build(system=FromFolder(base), finetune=LoRA(rank=2))
    trainer(callbacks=[Export(str(folder), merge=True)], max_steps=2).fit(module, data, ckpt_path=tmp_path / "1.ckpt")
    assert not list(folder.glob("adapter*"))
    torch.testing.assert_close(logits(plain(folder)), logits(module.policy.model), atol=1e-5, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"export", "1.ckpt"}
