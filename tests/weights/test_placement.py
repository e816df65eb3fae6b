import pytest
import torch
from torch import nn

from uae.weights.placement import Placement, at_work, settle, torch_dtype, working_device

OFFLOADED = Placement(device="meta", offload=True)  # the meta device stands in for an accelerator


class Recording(nn.Linear):
    """Says where it was sent. Moving off the meta device has no data to copy, so moves leave memory as it comes."""

    def __init__(self):
        super().__init__(2, 2)
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))
        return self.to_empty(device=device)

    @property
    def place(self):
        (place,) = {tensor.device.type for tensor in self.parameters()}
        return place


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float8", torch.bfloat16),
    ],
)
def test_dtype(name, dtype):
    assert torch_dtype(Placement(dtype=name)) is dtype


def test_its_own_device_goes_before_the_policys():
    assert working_device(Placement(), "cuda:3") == torch.device("cuda:3")
    assert working_device(Placement(device="cuda:1"), torch.device("cpu")) == torch.device("cuda:1")
    assert working_device(OFFLOADED, "cpu") == torch.device("meta")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "placement.dtype='int8'; allowed: float32, bfloat16, float16, float8"),
        ({"device": "gpu"}, "placement.device='gpu' is no device; allowed: cpu, cuda, cuda:0"),
        ({"device": ""}, "placement.device='' is no device"),
    ],
)
def test_unknown_names_are_refused_in_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        Placement(**settings)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"change placement.{next(iter(settings))}")


def test_a_device_this_machine_lacks():
    devices = torch.cuda.device_count()
    far = Placement(device=f"cuda:{devices}")
    with pytest.raises(ValueError, match=rf"'cuda:{devices}' is not on this machine; allowed: cpu.*placement.device"):
        settle([Recording()], far, "cpu")
    with pytest.raises(ValueError, match="not on this machine"), at_work([Recording()], far, "cpu"):
        raise AssertionError("unreachable")


def test_settles_where_it_works_or_waits_and_never_casts():
    for placement, device, place in [
        (Placement(), "meta", "meta"),
        (Placement(device="meta"), "cpu", "meta"),
        (Placement(device="cpu"), "meta", "cpu"),
        (OFFLOADED, "meta", "cpu"),
    ]:
        module = Recording().half()
        settle([module], placement, device)
        settle([module], placement, device)
        assert module.place == place
        assert module.moves == ([place] if place != "cpu" else [])  # no copy of what is already there
        assert module.weight.dtype is torch.float16


def test_a_buffer_alone_is_moved_too():
    module = nn.BatchNorm1d(2, affine=False)
    settle([module], Placement(), "meta")
    assert module.running_mean.device.type == "meta"


def test_offloaded_modules_are_on_the_device_for_as_long_as_there_is_work():
    modules = [Recording(), Recording()]
    with at_work(modules, OFFLOADED, "cpu") as device:
        assert device == torch.device("meta")
        assert [module.place for module in modules] == ["meta", "meta"]
    assert [module.moves for module in modules] == [["meta", "cpu"]] * 2
    with pytest.raises(KeyError), at_work(modules, OFFLOADED, "cpu"):
        raise KeyError
    assert [module.place for module in modules] == ["cpu", "cpu"]


def test_what_is_not_offloaded_stays():
    module = Recording()
    with at_work([module], Placement(device="meta"), "cpu"), at_work([module], Placement(device="meta"), "cpu"):
        pass
    assert module.moves == ["meta"]


def test_the_outermost_block_offloads_once():
    first, second, third = Recording(), Recording(), Recording()
    with at_work([first, second], OFFLOADED, "cpu"):
        with at_work([second, third], OFFLOADED, "cpu"):
            pass
        assert [first.place, second.place, third.place] == ["meta", "meta", "cpu"]
        with pytest.raises(KeyError), at_work([first], OFFLOADED, "cpu"):
            raise KeyError
        assert first.place == "meta"
    assert [module.moves for module in (first, second, third)] == [["meta", "cpu"]] * 3


def test_a_module_that_was_never_settled_is_offloaded_afterwards():
    module = Recording().to("meta")
    with at_work([module], OFFLOADED, "cpu"):
        pass
    assert module.moves == ["meta", "cpu"]


def test_weights_moved_in_inference_mode_are_ordinary():
    class Copying(nn.Linear):  # the CPU to the CPU would copy nothing
        def to(self, device):
            return self._apply(lambda tensor: torch.empty_like(tensor, device=device))

    module = Copying(2, 2)
    with torch.inference_mode():
        settle([module], Placement(), "meta")
    assert not any(parameter.is_inference() for parameter in module.parameters())
