import ast
import inspect
import textwrap

import diffusers
import pytest

from tests.models.pipelines.pipeline_cases import load
from uae.models.pipelines.contracts import contract_of, denoiser_of, text_encoders_of
from uae.models.pipelines.quirks import QUIRKS
from uae.rehearsal.pipelines import PIPELINES

EXPECTED = {  # masking, mask, pooled, guidance, distilled, own negative, together
    "sd3": ("joint", None, True, "guidance_scale", None, True, True),
    "flux": ("per_pass", None, True, "true_cfg_scale", "guidance_scale", False, True),
    "sana": ("keyword", "prompt_attention_mask", False, "guidance_scale", None, True, True),
    "qwen_image": ("keyword", "prompt_embeds_mask", False, "true_cfg_scale", "guidance_scale", False, True),
    "sdxl": ("cross", None, True, "guidance_scale", None, True, True),
    "omnigen": ("none", None, False, "guidance_scale", None, True, False),
}
# Text-to-image classes that hand a caption over as one tensor, as diffusers' documentation has them.
LISTS = ["ZImage", "ErnieImage"]  # these take one tensor per caption
EMBEDDINGS = [
    "StableDiffusion3", "Flux", "Flux2", "Sana", "SanaSprint", "QwenImage", "StableDiffusionXL", "StableDiffusion",
    "PixArtAlpha", "PixArtSigma", "Lumina", "Lumina2", "AuraFlow", "Chroma", "CogView3Plus", "CogView4", "Bria", "OvisImage",
    "Krea2", "NucleusMoEImage", "LatentConsistencyModel",
]  # fmt: skip
TEXT_ONLY = [
    "OmniGen", "HiDreamImage", "HunyuanDiT", "HunyuanImage", "Kandinsky5T2I", "GlmImage", "Kandinsky3", "LongCatImage",
]  # fmt: skip
DISTILLED_ONLY = {"Flux2", "SanaSprint", "LatentConsistencyModel"}


def pipeline_class(name):
    return getattr(diffusers, f"{name}Pipeline", None)


def contract_of_class(kind):
    """The contract of a pipeline whose networks are not at hand."""
    pipe = kind.__new__(kind)
    pipe.__dict__.update(transformer=None, unet=None)
    return contract_of(pipe)


@pytest.mark.parametrize("name", PIPELINES)
def test_contracts_of_the_pipelines_at_hand(name):
    pipe = load(name)
    contract = contract_of(pipe)
    facts = (contract.masking, contract.mask, contract.pooled is not None, contract.guidance, contract.distilled)
    assert (*facts, contract.own_negative, contract.quirks.read_together) == EXPECTED[name]
    assert contract.takes_embeddings == (name != "omnigen")
    assert contract.fixed == ({"use_resolution_binning": False} if name == "sana" else {})
    assert denoiser_of(pipe) is (pipe.unet if name == "sdxl" else pipe.transformer)
    encoders = {"sd3": 3, "flux": 2, "sana": 1, "qwen_image": 1, "sdxl": 2, "omnigen": 0}
    assert len(text_encoders_of(pipe)) == encoders[name]


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_names_of_what_the_encoders_return_are_those_in_their_source(name):
    kind = pipeline_class(name)
    contract = contract_of_class(kind)
    assert contract.takes_embeddings
    source = ast.parse(textwrap.dedent(inspect.getsource(kind.encode_prompt)))
    returned = [node.value for node in ast.walk(source) if isinstance(node, ast.Return)][-1]
    names = [next(part.id for part in ast.walk(one) if isinstance(part, ast.Name)) for one in returned.elts]
    assert list(contract.encoded) == names[: len(contract.encoded)]
    assert set(names) - set(contract.encoded) <= {"text_ids", "negative_text_ids"}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_embeddings_have_no_mask(name):
    contract = contract_of_class(pipeline_class(name))
    assert (contract.masking, contract.mask, contract.embeddings) == ("list", None, "prompt_embeds")


@pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning")  # of PRX, in diffusers
@pytest.mark.parametrize("name", [name for name in QUIRKS if name != "OmniGen2Pipeline"])  # which is this project's own
def test_every_row_of_the_table_is_a_class_and_its_arguments_are_its_own(name):
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__call__).parameters
    assert set(QUIRKS[name].fixed) <= set(parameters)
    assert set(QUIRKS[name].left_out) <= set(inspect.signature(kind.__init__).parameters)


@pytest.mark.parametrize("name", [*EMBEDDINGS, *LISTS, *TEXT_ONLY])
def test_every_keyword_is_one_of_the_call(name):
    kind = pipeline_class(name)
    contract = contract_of_class(kind)
    assert contract.takes_embeddings == (name not in TEXT_ONLY)
    call = inspect.signature(kind.__call__).parameters
    names = {contract.embeddings, contract.pooled, contract.mask, contract.guidance, contract.distilled}
    assert names - {None} <= set(call)
    assert {*contract.negatives, *contract.fixed} <= set(call)
    assert hasattr(kind.__call__, "__wrapped__")  # without it there is no gradient
    assert (contract.guidance is None) == (name in DISTILLED_ONLY or name == "HunyuanImage")
