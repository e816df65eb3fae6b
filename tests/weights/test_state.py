import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from uae.weights.state import group_of, load_into, read_state, save_state


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(3, 4, generator=generator) for i in range(6)}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write_shards(folder, tensors, index=True, suffix=".safetensors"):
    names = sorted(tensors)
    shards = {f"model-{i + 1:05d}-of-00003{suffix}": names[2 * i : 2 * i + 2] for i in range(3)}
    for file, members in shards.items():
        part = {name: tensors[name] for name in members}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    if index:
        listed = {name: file for file, members in shards.items() for name in members}
        (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_whole(tmp_path, tensors, suffix, index):
    write_shards(tmp_path, tensors, index, suffix)
    torch.save({"anything": 1}, tmp_path / "training_args.bin")  # what trainers leave beside the weights
    same(read_state(tmp_path), tensors)
    (tmp_path / f"model-00002-of-00003{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 shards .*: model-00002-of-00003\{suffix}$"):
        read_state(tmp_path)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "module"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "old.bin", "weights.safetensors"])
def test_single_files_are_read(tmp_path, tensors, name, wrapping):
    if name.endswith("safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        zipped = {"_use_new_zipfile_serialization": name != "old.bin"}
        torch.save({wrapping: tensors, "epoch": 3} if wrapping else tensors, tmp_path / name, **zipped)
    same(read_state(tmp_path / name), tensors)
    same(read_state(tmp_path), tensors)


@pytest.mark.parametrize("name", ["large.safetensors", "large.pth"])
def test_reading_maps_the_file_and_writes_to_a_copy(tmp_path, name):
    large = {"weight": torch.ones(4_000_000)}
    save_file(large, tmp_path / name) if name.endswith("safetensors") else torch.save(large, tmp_path / name)
    found = read_state(tmp_path / name)["weight"]
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / name) in maps.read()
    found.zero_()  # training in place must not reach the disk
    assert read_state(tmp_path / name)["weight"].min() == 1


class Runs:
    def __reduce__(self):
        return print, ("code from a checkpoint has run",)


def test_a_pickle_with_code_is_refused(tmp_path, tensors, capsys):
    for zipped in (True, False):
        file = tmp_path / f"{zipped}.pth"
        torch.save({**tensors, "extra": Runs()}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"{file.name}.*would run code.*convert it.*{zipped}\.safetensors") as refusal:
            read_state(file)
        assert "\n" not in str(refusal.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="plain.pt"):
        read_state(tmp_path / "plain.pt")
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["half", "empty", "text", "pointer"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_a_damaged_file_is_named(tmp_path, tensors, name, content):
    file = tmp_path / name
    if name == "x.safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name == "x.pth")
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello " * 9, "pointer": pointer}[content])
    with pytest.raises(ValueError, match=rf"{name}.*truncated or damaged") as refusal:
        read_state(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_is_no_checkpoint_is_refused(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        read_state(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no weights in"):
        read_state(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json.* is no checkpoint; allowed: .safetensors"):
        read_state(tmp_path / "config.json")
    torch.save({"epoch": 3, **tensors}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth.*no named tensors \(epoch\)"):
        read_state(tmp_path)
    torch.save(tensors, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"several checkpoints \(a.pth, b.pth\)"):
        read_state(tmp_path)
    save_file(tensors, tmp_path / "c.safetensors")
    same(read_state(tmp_path), tensors)  # safetensors go first
    (tmp_path / "c.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="c.safetensors.index.json.* is no index"):
        read_state(tmp_path)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)


class Net(nn.Module):
    """Layers, a buffer, a tied head."""

    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Layer() for _ in range(12))
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.rand(2))
        self.to(dtype)


def with_memory(dtype):
    return Net(1, dtype)


def without_memory(dtype):
    with torch.device("meta"):
        return Net(1, dtype)


@pytest.mark.parametrize("build", [with_memory, without_memory])
@pytest.mark.parametrize("absent", ["head.weight", "words.weight", None])
def test_loading_keeps_dtype_and_ties(build, absent):
    state = {name: value.clone() for name, value in Net(0).state_dict().items() if name != absent}
    module = build(torch.bfloat16)
    load_into(module, state, "source", "key")
    expected = {name: value.bfloat16() for name, value in Net(0).state_dict().items()}
    same(module.state_dict(), expected)
    assert {value.dtype for value in module.state_dict().values()} == {torch.bfloat16}
    assert module.head.weight is module.words.weight
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_module_without_memory_takes_the_tensors_themselves():
    state = Net(0).state_dict()
    module = without_memory(torch.float32)
    load_into(module, state, "source", "key")
    assert all(value.data_ptr() == state[name].data_ptr() for name, value in module.state_dict().items())


@pytest.mark.parametrize("build", [with_memory, without_memory])
def test_nothing_is_loaded_unless_everything_fits(build):
    state = {name: value.clone() for name, value in Net(0).state_dict().items()}
    for i in range(12):
        del state[f"layers.{i}.q_proj.bias"], state[f"layers.{i}.k_proj.weight"]
    state["layers.3.q_proj.weight"] = torch.zeros(4, 7)
    state |= {
        "visual.blocks.0.mlp.weight": torch.zeros(1),
        "visual.blocks.11.mlp.weight": torch.zeros(1),
        "extra": torch.zeros(1),
    }
    module = build(torch.float32)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="^folder does not fit Net") as refusal:
        load_into(module, state, "folder", "model.system")
    assert str(refusal.value) == (
        "folder does not fit Net: missing 24 of layers.* (e.g. layers.0.k_proj.weight); "
        "unexpected 1 of extra (e.g. extra), 2 of visual.blocks.* (e.g. visual.blocks.0.mlp.weight); "
        "of another shape 1 of layers.* (e.g. layers.3.q_proj.weight is [4, 7], expected [4, 4]); correct model.system"
    )
    if build is with_memory:
        same(module.state_dict(), before)
    else:
        assert all(value.is_meta for value in module.state_dict().values())


def test_a_torn_tie_is_refused():
    state = {name: value.clone() for name, value in Net(0).state_dict().items()}
    state["head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="tied here but different there 1 of head .*head.weight and words.weight"):
        load_into(with_memory(torch.float32), state, "source", "key")


def test_missing_and_unexpected_names_are_both_reported():
    module, state = with_memory(torch.float32), dict(Net(0).state_dict())
    del state["scale"]
    state["vae.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="missing 1 of scale .*unexpected 1 of vae"):
        load_into(module, state, "source", "key")


def test_a_buffer_no_checkpoint_can_fill_is_an_error():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("frequencies", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match="Linear was built without memory, and source cannot fill frequencies"):
        load_into(module, nn.Linear(2, 2).state_dict(), "source", "key")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("language_model.layers.11.self_attn.q_proj.weight", "language_model.layers.*.self_attn"),
        ("layers.0.input_layernorm.weight", "layers.*"),
        ("projector.0.weight", "projector.*"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("meta_queries", "meta_queries"),
    ],
)
def test_groups_are_parts_of_layers(name, group):
    assert group_of(name) == group


def test_saved_states_may_share_memory(tmp_path):
    weight = torch.randn(4, 4)
    file = save_state(tmp_path / "new", "projector", {"a": weight, "b": weight, "c": weight.T})
    assert file == tmp_path / "new/projector.safetensors"
    same(load_file(file), {"a": weight, "b": weight, "c": weight.T})


def test_one_name_in_two_shards_is_refused(tmp_path, tensors):
    write_shards(tmp_path, tensors, index=False)
    save_file({"layers.0.weight": torch.zeros(3, 4)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"holds 'layers\.0\.weight' in two files.*model-00003-of-00003.safetensors"):
        read_state(tmp_path)
