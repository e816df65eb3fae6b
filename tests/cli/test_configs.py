"""Every file in configs/ is parsed, and its classes constructed, the way ``fit`` does it."""

import inspect
from pathlib import Path

import pytest
import yaml

from uae import cli
from uae.cli.command import Parsed
from uae.data import ImageData, ImageFolderData, PhotographData, StreamedData, TableData, WebDatasetData
from uae.encoders import HFEncoder, LayoutEncoder, OpenCLIPEncoder
from uae.encoders.tower import Tower
from uae.miniature.data import SceneData
from uae.models.finetune import Finetune, Full, LoRA
from uae.rewards import (
    CaptionFormat,
    CopiedInstruction,
    EncoderSimilarity,
    ForeignScript,
    LengthBand,
    PerceptualSimilarity,
    PreferenceScore,
    RandomReward,
    Repetition,
    TextFidelity,
    VLMJudge,
)
from uae.rewards.network import NetworkReward

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
COMPLETE = [file for file in FILES if file.parent in (CONFIGS, CONFIGS / "pretrain")]
FRAGMENTS = [file for file in FILES if file not in COMPLETE and CONFIGS / "bench" not in file.parents]
BASES = {  # of fragments whose keys the miniature has not
    "debug/rehearsal.yaml": "uae.yaml",
    "debug/rehearsal_tokens.yaml": "janus_pro.yaml",
    "engine/vllm.yaml": "qwen_any.yaml",
    "finetune/lora_pretrained.yaml": "qwen_any.yaml",
    "finetune/full_pretrained.yaml": "qwen_any.yaml",
}


def name_of(file):
    return str(file.relative_to(CONFIGS))


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """The command line without the run at its end."""
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)

    def parse_files(*files, subcommand="fit", extra=()):
        return cli.main([subcommand, *(word for file in files for word in ("--config", str(file))), *extra])

    return parse_files


def test_nothing_is_overlooked():
    assert len(COMPLETE) >= 6
    assert len(FRAGMENTS) >= 9
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("file", COMPLETE, ids=name_of)
def test_complete_runs(parse, file):
    run = parse(file)
    assert run.config.fit.run_name == str(file.relative_to(CONFIGS).with_suffix(""))
    assert run.trainer.max_steps > 0
    header = [line for line in file.read_text().splitlines() if line.startswith("# ")][:4]
    assert [line.split(":")[0] for line in header] == ["# What", "# Hardware", "# Command", "# Expect"]
    assert f"--config configs/{name_of(file)}" in header[2]


@pytest.mark.parametrize("file", FRAGMENTS, ids=name_of)
def test_fragments_are_deltas_that_take_effect(parse, file, monkeypatch):
    if file.parent.name == "trainer":  # a Trainer looks for its GPUs when it is made
        monkeypatch.setattr(cli.CLI, "instantiate_trainer", lambda self: None)
    if file.parent.name == "logger":  # of packages that are not installed; tests/loggers uses them
        run = Parsed(["fit", "--config", str(CONFIGS / "tiny.yaml"), "--config", str(file)])
    else:
        run = parse(CONFIGS / BASES.get(name_of(file), "tiny.yaml"), file)
    assert file.read_text().startswith("# ")
    resolved = run.config.fit.as_dict()
    for path, value in leaves(yaml.safe_load(file.read_text())):
        if not str(value).startswith("${"):
            found = at(resolved, path)
            assert (list(found) if isinstance(found, tuple) else found) == value, path


def at(node, path):
    """The value at a path. A class that a fragment does not name has its settings one level below."""
    for key in path:
        inside = node.get("init_args") if isinstance(node, dict) and key not in node else None
        node = node[key] if inside is None else inside[key]
    return node


def leaves(node, path=()):
    listed = isinstance(node, list) and any(isinstance(value, dict) for value in node)  # callbacks get their defaults
    if isinstance(node, dict) or listed:
        for key, value in enumerate(node) if listed else node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def test_random_reward_replaces_and_leaks_nothing(parse):
    run = parse(CONFIGS / "tiny.yaml", CONFIGS / "reward" / "random.yaml")
    reward = run.config.fit.model.init_args.reward.as_dict()["init_args"]
    assert reward["weights"] == {"random": 1.0}
    assert reward["parts"] == {"random": {"class_path": "uae.rewards.RandomReward", "init_args": {"low": 0.0, "high": 1.0, "seed": 0}}}
    assert [type(part) for part in run.model.reward.parts.values()] == [RandomReward]


@pytest.mark.parametrize(("name", "parts"), [("clip_l14", ["clip"]), ("ensemble", ["clip", "longclip"])])
def test_rewards_at_full_size_replace_the_miniatures_and_load_nothing(parse, name, parts):
    reward = parse(CONFIGS / "tiny.yaml", CONFIGS / "reward" / f"{name}.yaml").model.reward
    assert reward.weights == dict.fromkeys(parts, 1 / len(parts))
    encoders = [reward.parts[part].encoder for part in parts]
    assert [type(encoder) for encoder in encoders] == [HFEncoder] * len(parts)
    assert all(encoder._loaded is None and encoder.placement.dtype == "float32" for encoder in encoders)


def test_a_part_of_the_same_name_takes_no_arguments_of_the_old_class(parse, tmp_path):
    delta = {
        "clip": {"class_path": "uae.rewards.RandomReward"},
        "valid": {"class_path": "uae.miniature.tiny.SceneFormat"},
    }
    file = tmp_path / "delta.yaml"
    file.write_text(yaml.safe_dump({"model": {"init_args": {"reward": {"init_args": {"parts": delta}}}}}))
    parts = parse(CONFIGS / "tiny.yaml", file).model.reward.parts
    assert isinstance(parts["clip"], RandomReward)
    assert not hasattr(parts["clip"], "encoder")


def test_full_finetuning_replaces_lora_and_back(parse):
    lora, full = CONFIGS / "finetune" / "lora.yaml", CONFIGS / "finetune" / "full.yaml"
    run = parse(CONFIGS / "tiny.yaml", full)
    assert isinstance(run.model.finetune, Full)
    assert set(run.config.fit.model.init_args.finetune.init_args.as_dict()) == {"trainable", "weights"}
    run = parse(CONFIGS / "tiny.yaml", full, lora)
    assert isinstance(run.model.finetune, LoRA)
    assert run.model.finetune.rank == 16


@pytest.mark.parametrize("siblings", [
    (Finetune, LoRA, Full),
    (
        NetworkReward, EncoderSimilarity, CaptionFormat, RandomReward, LengthBand, Repetition, ForeignScript, CopiedInstruction,
        TextFidelity, PreferenceScore, PerceptualSimilarity, VLMJudge,
    ),
    (Tower, HFEncoder, OpenCLIPEncoder, LayoutEncoder),
    (ImageData, SceneData, PhotographData),
    (PhotographData, ImageFolderData, StreamedData),
    (StreamedData, TableData, WebDatasetData),
])  # fmt: skip
def test_siblings_share_only_what_their_parent_has(siblings):
    """Changing a class_path keeps equally named arguments, so equal names must mean the same thing."""
    parent, *classes = siblings
    allowed = set(inspect.signature(parent.__init__).parameters) | {"self", "kwargs"}
    names = [set(inspect.signature(c.__init__).parameters) - allowed for c in classes]
    shared = {name for i, some in enumerate(names) for other in names[i + 1 :] for name in some & other}
    assert not shared


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_a_run_configures_every_subcommand(parse, subcommand):
    run = parse(CONFIGS / "tiny.yaml", subcommand=subcommand)
    assert Path(run.trainer.log_dir) == Path("outputs/tiny", subcommand)


def test_predicting_a_folder_takes_one_command(parse, tmp_path):
    extra = ["--data.init_args.predict_root", str(tmp_path)]
    run = parse(CONFIGS / "tiny.yaml", CONFIGS / "data" / "folder.yaml", subcommand="predict", extra=extra)
    assert run.datamodule.roots["predict"] == str(tmp_path)
    assert len(run.model.metrics) == 0


def test_the_seed_of_the_run_seeds_the_captions(parse):
    assert parse(CONFIGS / "tiny.yaml", extra=["--seed_everything", "7"]).model.plan.seed == 7
