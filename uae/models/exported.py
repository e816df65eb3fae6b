"""The whole weights that an earlier run exported, put in the place of those that a network has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from uae.files.locations import local_folder
from uae.learner import Network
from uae.weights.state import load_into, read_state

ADAPTER = "adapter_config.json"  # what PEFT writes beside an adapter
BAGEL = "ema.safetensors"  # beside which there is the autoencoder, which does not train


def load_exported(network: Network, name: str, key: str) -> None:
    """Replace all weights of the model in a network by those that ``callbacks.export.Export`` wrote.

    A network without memory, as a memory plan makes it, stays as it is: its sizes do not change.

    Args:
        network: The network, before an adapter is attached to it.
        name: Folder or hub id of a whole model, in the layout of its library.
        key: The setting that has ``name``, for error messages.

    Raises:
        FileNotFoundError, ValueError: There are no weights, or they are an adapter, or not all of this model.
    """
    model = network.base
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    folder, source = local_folder(name, key), f"{key}={name!r}"
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{source} holds an adapter, not the weights of a whole model: give it as {key.removesuffix('weights')}adapter (of "
            "uae.models.finetune.LoRA), or export whole weights with merge: true of callbacks.export.Export"
        )
    load_into(model, _state(model, folder, source), source, key)
    _rename(model, str(folder))


def _state(model: Any, folder: Path, source: str) -> dict[str, Tensor]:
    """The weights in a folder by the names of the model. Transformers has other names on the disk, and maps them itself."""
    from transformers import PreTrainedModel

    if not (isinstance(model, PreTrainedModel) and (folder / "config.json").is_file()):
        return read_state(folder / BAGEL if (folder / BAGEL).is_file() else folder)
    dtypes = {weight.dtype for weight in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds all others exactly
    library: Any = type(model)
    try:
        loaded, found = library.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be loaded into this model: {' '.join(str(error).split())[:300]}") from error
    for fault, names in (("lacks", found["missing_keys"]), ("has other weights than this model:", found["unexpected_keys"])):
        if names:
            raise ValueError(f"{source} {fault} {len(names)} weights (e.g. {min(names)}): correct the folder")
    state: dict[str, Tensor] = loaded.state_dict()
    return state


@runtime_checkable
class Named(Protocol):
    """A model that knows where its weights came from."""

    name_or_path: str


def _rename(model: Any, folder: str) -> None:
    """Let an adapter that is exported later name these weights as its base."""
    from diffusers import ConfigMixin

    if isinstance(model, ConfigMixin):
        model.register_to_config(_name_or_path=folder)
    elif isinstance(model, Named):
        model.name_or_path = folder
