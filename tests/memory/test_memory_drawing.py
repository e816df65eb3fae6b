"""What drawing and embedding take, against the tensors alive in the published networks on the meta device."""

import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uae.memory.estimates import decode_bytes, denoise_bytes, encode_bytes
from uae.models.renderers.diffusers import Rendering
from uae.systems import blueprints

CLIP = "openai/clip-vit-large-patch14"


class Live(TorchDispatchMode):
    """Counts the memory of tensors that are alive, on a device where they take none."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | set(self.sizes):
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


class Fused(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return torch.empty_like(given["query"])
        return function(*args, **(kwargs or {}))


def live(function):
    with torch.no_grad(), Live() as count, Fused():
        function()
    return count.peak


def empty(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def test_drawing_is_as_large_as_the_tensors_alive():
    sd3, rows = blueprints.pipeline_skeletons("stabilityai/stable-diffusion-3.5-large", ("text_encoder_3",)), 2
    inputs = {
        "hidden_states": empty(2 * rows, 16, 64, 64), "encoder_hidden_states": empty(2 * rows, 333, 4096),
        "pooled_projections": empty(2 * rows, 2048), "timestep": empty(2 * rows),
    }  # fmt: skip
    rendering = Rendering(height=512, width=512, guidance=5.0, rows=rows)
    counted = live(lambda: sd3["transformer"](**inputs))
    assert denoise_bytes(sd3["transformer"], sd3["vae"], rendering, rows, 333) == pytest.approx(counted, rel=0.25)
    counted = live(lambda: sd3["vae"].decode(empty(rows, 16, 64, 64)))
    assert decode_bytes(sd3["vae"], rendering, rows) == pytest.approx(counted, rel=0.25)
    sliced = Rendering(height=512, width=512, rows=rows, slice_vae=True)
    assert decode_bytes(sd3["vae"], sliced, rows) == decode_bytes(sd3["vae"], rendering, 1)


def test_flux_packs_latents_and_works_in_parallel():
    flux = blueprints.pipeline_skeletons("black-forest-labs/FLUX.1-dev", ("text_encoder", "text_encoder_2"))
    inputs = {
        "hidden_states": empty(1, 1024, 64), "encoder_hidden_states": empty(1, 512, 4096), "guidance": empty(1),
        "pooled_projections": empty(1, 768), "timestep": empty(1), "img_ids": empty(1024, 3), "txt_ids": empty(512, 3),
    }  # fmt: skip
    estimate = denoise_bytes(flux["transformer"], flux["vae"], Rendering(height=512, width=512), 1, 512)
    assert estimate == pytest.approx(live(lambda: flux["transformer"](**inputs)), rel=0.25)


@pytest.mark.parametrize("name", [CLIP, "google/siglip2-so400m-patch16-512"])
def test_embedding_is_as_large_as_the_tensors_alive(name):
    tower = blueprints.encoder_skeleton(name)
    side = tower.config.vision_config.image_size
    counted = live(lambda: tower.vision_model(pixel_values=torch.empty(4, 3, side, side, device="meta")))
    assert encode_bytes(tower, 4, 4) == pytest.approx(counted, rel=0.5)
