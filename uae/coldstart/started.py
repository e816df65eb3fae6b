"""A system with the weights that a cold start wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from uae.coldstart.system_objective import CAPTIONER, CONDITIONER, DENOISER, diffusers_renderer
from uae.models.pipelines.contracts import denoiser_of
from uae.types import UMM, PlannedSystem, System


class Started:
    """Any system with the weights of a cold start in place of its own, as a `uae.types.System`.

    Args:
        system: The system that the cold start trained.
        folder: Folder that the cold start wrote. It holds ``captioner``, ``denoiser`` and ``conditioner.safetensors``, those
            of them that trained. Adapters are merged into the weights. (To go on training a captioner's adapter instead,
            do not use this class: set ``LoRA(adapter=<folder>/captioner)``.)
    """

    def __init__(self, system: System, folder: str) -> None:
        self.system, self.folder = system, folder

    def blueprint(self) -> Any:
        """The blueprint (layer sizes without weights) of the system below, for ``--print_plan``.

        Raises:
            ValueError: The system has no blueprint.
        """
        if not isinstance(self.system, PlannedSystem):
            raise ValueError(f"{type(self.system).__name__} has no memory plan; leave --print_plan out")
        return self.system.blueprint()

    def build(self) -> UMM:
        """Build the system and replace weights.

        Raises:
            FileNotFoundError: The folder has none of the three.
            ValueError: The weights in the folder do not fit this system.
        """
        folder = Path(self.folder).expanduser()
        captioner, denoiser, conditioner = folder / CAPTIONER, folder / DENOISER, folder / f"{CONDITIONER}.safetensors"
        if not any(path.exists() for path in (captioner, denoiser, conditioner)):
            raise FileNotFoundError(
                f"no cold start in {self.folder!r}; allowed: a folder with captioner, denoiser or conditioner.safetensors; "
                "correct model.init_args.system.init_args.folder"
            )
        umm = self.system.build()
        if captioner.is_dir():
            network = umm.captioner.learner.network
            network.model = _with(network.model, captioner)
        if denoiser.is_dir():
            _with(denoiser_of(diffusers_renderer(umm, "A cold start of the denoiser").pipe), denoiser)
        if conditioner.is_file():
            if not isinstance(umm.conditioner, nn.Module):
                raise ValueError(
                    f"{conditioner} holds weights of a conditioner, but {type(umm.conditioner).__name__} has no weights; "
                    "correct model.init_args.system.init_args.folder"
                )
            _load(umm.conditioner, conditioner)
        return umm


def _with(network: Any, folder: Path) -> Any:
    """The network, changed in place: with the folder's adapter merged into it, or with the folder's weights. Frozen."""
    from uae.weights.state import load_into

    if (folder / "adapter_config.json").is_file():
        import peft

        network = peft.PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    else:
        saved = type(network).from_pretrained(folder, local_files_only=True)  # the library renames old keys of the file
        load_into(network, saved.state_dict(), str(folder), "model.init_args.system.init_args.folder")
    return network.requires_grad_(False).eval()


def _load(module: nn.Module, file: Path) -> None:
    from uae.weights.state import read_state

    state = read_state(file)
    wrong = [name for name, value in state.items() if name not in (own := module.state_dict()) or own[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{file} holds {wrong[0]}, but {type(module).__name__} has no parameter of that name and shape, so the file was "
            "trained with another system; correct model.init_args.system.init_args.folder"
        )
    module.load_state_dict(state, strict=False)
