"""The plan of images that a policy draws by denoising, against bytes that are really there: tiny BAGEL on the CPU."""

import copy

import pytest
import torch

from tests.memory.test_memory import kept_by, planned, rows_of
from uae.grpo import GRPOLoss
from uae.memory.counting import steps_update_bytes
from uae.models.bagel.renderer import BagelRendering
from uae.models.captioners.loading import Reading
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.rehearsal.catalog import write
from uae.systems.bagel import Bagel
from uae.weights.placement import Placement

NAME = "ByteDance-Seed/BAGEL-7B-MoT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, [NAME])
    return folder / NAME


@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_activations_are_what_autograd_keeps(folder, finetune, recompute):
    """Three of four steps learn, two of them guided."""
    drawing = BagelRendering(128, 128, steps=4, guidance_times=(0.8, 1.0), placement=Placement("float32"))
    umm = Bagel(str(folder), reading=Reading(dtype="float32"), rendering=drawing).build()
    finetune.attach(umm.captioner.learner, keep_reference=False)
    policy, network = FlowPolicy(umm.renderer, Exploration()), umm.captioner.learner.network
    condition = umm.conditioner.encode(["a large blue square at the top left of a navy background"] * 2)
    drawn = policy.sample(condition, [1, 2])
    of_a_step = kept_by(network, lambda: network(condition, drawn.start_N, torch.ones(2), 8))
    network.gradient_checkpointing = recompute
    found = kept_by(network, lambda: policy.logprobs(drawn)) + (of_a_step / 2 if recompute else 0)  # one of two layers is there again
    skeleton = copy.deepcopy(network).to("meta")
    estimate = 2 * steps_update_bytes(skeleton, condition.ids_NL.shape[1], 66, 3, 2)
    assert found / 1.2 < estimate < found * 1.2


def test_rows_by_what_trains(folder):
    """Two images x 3 captions in 2 mini-batches. In full, the set of weights of the half that does not train is frozen."""
    system = Bagel(str(folder), rendering=BagelRendering(64, 64, steps=4))
    rows, sizes = {}, {name: weight.numel() for name, weight in system.blueprint().policy.named_parameters()}
    for train in ("captions", "images", "both"):
        changes = {"exploration": Exploration(window=2), "loss": GRPOLoss(beta=0.0), "finetune": Full()}
        rows[train] = rows_of(planned(system=system, train=train, batch_size=2, **changes))
    trains = {
        "both": lambda name: "vision_model" not in name,
        "captions": lambda name: trains["both"](name) and not any(part in name for part in ("_moe_gen", "vae", "time_embedder")),
        "images": lambda name: trains["both"](name) and "lm_head" not in name and "connector" not in name,
    }
    for train, chosen in trains.items():
        assert rows[train]["policy"].trainable == sum(size for name, size in sizes.items() if chosen(name))
    learning = {"image activations", "latents of the steps", "image replay buffers"}
    assert not learning & rows["captions"].keys()
    assert learning <= rows["both"].keys() & rows["images"].keys()
    assert "activations" in rows["both"]
    assert "activations" not in rows["images"]
    assert rows["both"]["reconstructions"].whole == 6 * 3 * 64 * 64 * 4
    assert rows["both"]["latents of the steps"].whole == 6 * (2 + 2) * 16 * 16 * 4  # starts and ends beside the two steps
