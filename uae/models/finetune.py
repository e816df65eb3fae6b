"""Which weights of a network train: a low-rank adapter or the weights themselves. The configuration chooses one."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from uae.files.locations import locate
from uae.learner import FrozenAdapter, FrozenCopy, Learner, Network, WithoutAdapter, switch_dropout_off
from uae.models.exported import load_exported

LANGUAGE_MODEL = (  # but for its head, and for what routes tokens to experts; Emu3's is named text_model, X-Omni's has no name
    r"(.*\b(language_model|text_model)\.|model\.layers\.\d+\.)(?!(.*\.)?(\w*router\b.*|gate|shared_expert_gate|lm_head)$).*"
)
IMAGE_TOWER_ASIDE = r"^(?!.*(visual|vision_tower|vision_model)\.)"


def default_targets(model: nn.Module) -> list[str]:
    """Names of the layers that `LoRA` adapts if nothing is said: linear ones of the language model, or a denoiser's attention."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expression = attention_layers(model) or LANGUAGE_MODEL
    return [name for name in linear if re.fullmatch(expression, name)]


class Finetune:
    """Decides which parameters of a network train, and how the initial weights (the reference) can be used again."""

    key = "model.init_args.finetune.init_args"
    """Where the configuration holds the arguments, for error messages."""

    adapter: str | None = None
    """Folder or hub id of an adapter to start from."""

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights  # a whole model to start from; below ``adapter``, if both are given

    @property
    def origin(self) -> str | None:
        """What the start is read from, if it is not the system's own: the adapter, or else the weights."""
        return self.adapter or self.weights

    def _start(self, network: Network) -> None:
        """Load the weights of the start, if there are other ones than the system's."""
        if self.weights is not None:
            load_exported(network, self.weights, f"{self.key}.weights")

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Freeze and unfreeze ``learner.network`` in place, and set ``learner.start``.

        Args:
            learner: The learner whose network has its initial weights.
            keep_reference: Whether ``learner.reference()`` will be called, as it is where a KL coefficient is above 0.
        """
        raise NotImplementedError


class LoRA(Finetune):
    """Trains a low-rank adapter on the language model or the denoiser.

    The reference is the model with the adapter turned off, so it takes no memory. The adapter's weights are float32 even if
    the model is bfloat16, because bfloat16 would round updates of 1e-6 away.

    Args:
        rank: Rank of the adapter; None is that of ``adapter``, or 16.
        alpha: Scale of the adapter; it adds ``alpha / rank * B A`` to a weight. None is that of ``adapter``, or 32.
        target_modules: Regular expression over the names of modules that get an adapter, or "all-linear" for every linear
            layer except the output head, those of the image tower included, as UAE was trained. None is those of
            ``adapter``, or all linear layers of the language model but its head and its routers, or those inside the attention of
            a diffusers denoiser, as Flow-GRPO adapts them. Experts that are one weight for all of them are no linear layers, and
            get no adapter.
        adapter: Folder or hub id of a PEFT adapter to start from; the reference is then a frozen copy of that adapter. What
            is given of the other arguments must be as in its ``adapter_config.json``.
        weights: Folder or hub id of a whole model, as `callbacks.export.Export` writes it with ``merge: true`` or after full
            finetuning. It replaces the system's weights below the adapter.
    """

    def __init__(
        self,
        rank: int | None = None,
        alpha: int | None = None,
        target_modules: str | None = None,
        adapter: str | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__(weights)
        self.rank, self.alpha, self.target_modules, self.adapter = rank, alpha, target_modules, adapter

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Wrap the model in a PeftModel. Dropout is 0, because with dropout the policy ratio would not start at one.

        Raises:
            FileNotFoundError, ValueError: There is no LoRA at ``adapter``, or it fits neither the model nor the other arguments;
                or ``weights`` are not those of the model.
        """
        network = learner.network
        self._start(network)
        model = network.model.requires_grad_(False)
        if self.adapter is None:
            network.model, learner.start = self._new(model, network.never_adapted()), WithoutAdapter()
            return
        folder = locate(self.adapter)
        wrapped = self._loaded(model, folder)
        if keep_reference:
            wrapped.load_adapter(folder, adapter_name="reference", is_trainable=False)
            wrapped.set_adapter("default")
            learner.start = FrozenAdapter("reference")
        network.model = switch_dropout_off(wrapped)

    def _new(self, model: nn.Module, aside: list[nn.Module]) -> Any:
        """The model with a new adapter, which adapts none of the modules in ``aside``."""
        import peft

        targets = default_targets(model) if self.target_modules is None else self.target_modules
        rank, alpha = 16 if self.rank is None else self.rank, 32 if self.alpha is None else self.alpha
        excluded = [name for name, module in model.named_modules() if module in aside]
        try:
            return peft.get_peft_model(
                model,
                peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, exclude_modules=excluded or None, lora_dropout=0.0),
            )
        except ValueError as error:
            raise ValueError(
                f"{self.key}: rank={rank}, alpha={alpha}, target_modules={self.target_modules!r} are no adapter of this model: {error}"
            ) from error

    def _loaded(self, model: nn.Module, folder: str) -> Any:
        """The model with the adapter in a folder, all of whose factors must have found their place."""
        import peft

        at = f"{self.key}.adapter={self.adapter!r}"
        with _explained(at):
            config = peft.PeftConfig.from_pretrained(folder)
        self._check(config, at)
        with _explained(at), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # they are looked for below
            wrapped: Any = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
            written = {name for name in peft.load_peft_weights(folder, device="cpu") if "lora_" in name}
        adapted = {name for name in peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False) if "lora_" in name}
        for names, fault in ((adapted - written, "lacks"), (written - adapted, "has no layer of this model for")):
            if names:
                raise ValueError(f"{at} {fault} {len(names)} factors (e.g. {min(names)}): correct {self.key}.adapter")
        return wrapped

    def _check(self, config: Any, at: str) -> None:
        """Check that an adapter is LoRA, as the other arguments say."""
        if config.peft_type != "LORA":
            raise ValueError(f"{at} is an adapter of type {config.peft_type.value}; allowed: LORA")
        written = {"rank": config.r, "alpha": config.lora_alpha, "target_modules": config.target_modules}
        for name, value in written.items():
            asked = getattr(self, name)
            resolved = asked == "all-linear" and not isinstance(value, str)  # PEFT writes the names that it stood for
            if asked not in (None, value) and not resolved:
                shown = value if isinstance(value, int | str) else sorted(value)
                raise ValueError(f"{self.key}.{name}={asked}, but {at} has {shown}; allowed: {shown}, or null in a file")


def attention_layers(model: nn.Module) -> str | None:
    """A regular expression over the names of all linear layers inside the attention of a denoiser of diffusers.

    Attention is found by its type: its layers are called ``to_q`` in most classes, ``to_query`` in Kandinsky 5, ``img_qkv_proj`` in
    PRX and ``to_qkv_mlp_proj`` in FLUX.2.

    Returns:
        The expression; None if the model is not of diffusers, or has no attention.
    """
    if not any(base.__module__.startswith("diffusers.") for base in type(model).__mro__):
        return None
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    kinds: Any = (Attention, AttentionModuleMixin)  # the second is a mixin of modules
    layers: dict[str, None] = {}
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            any_block = re.sub(r"(?<=\.)\d+(?=\.|$)", r"\\d+", path).replace(".", r"\.")
            linear = (name for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
            layers.update({rf"{any_block}\.{re.escape(name)}": None for name in linear})
    return "|".join(layers) or None


@contextmanager
def _explained(at: str) -> Iterator[None]:
    """Turn what PEFT says about an adapter into one line that names it."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{at} cannot be loaded into this model: {' '.join(str(error).split())[:300]}") from error


class Full(Finetune):
    """Trains the weights themselves. The reference is a frozen copy, made only if a KL term needs it.

    Args:
        trainable: Regular expression that is searched in parameter names; parameters without a match stay frozen. The
            default freezes the image tower.
        weights: Folder or hub id of a whole model to start from, as `callbacks.export.Export` writes it.
    """

    def __init__(self, trainable: str = IMAGE_TOWER_ASIDE, weights: str | None = None) -> None:
        super().__init__(weights)
        self.trainable = trainable

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Unfreeze the parameters that match, and copy the initial weights if a reference is asked for.

        Raises:
            FileNotFoundError, ValueError: No parameter matches, or ``weights`` are not those of the model.
        """
        network = learner.network
        self._start(network)
        if keep_reference:
            learner.start = FrozenCopy(copy.deepcopy(network).requires_grad_(False).eval())
        names = [name for name, _ in network.model.named_parameters() if re.search(self.trainable, name)]
        if not names:
            raise ValueError(
                f"{self.key}.trainable={self.trainable!r} matches no parameter of the network; allowed: "
                "a regular expression that is found in the name of one"
            )
        for name, parameter in network.model.named_parameters():
            parameter.requires_grad_(name in names)


def freeze_unreached(network: Network, train: str) -> None:
    """Freeze weights that only the policy which does not train uses.

    No loss reaches them, but DDP would wait for their gradients.

    Args:
        network: The network, after its finetuning was attached.
        train: Which policies learn: "captions", "images" or "both".
    """
    for half, pattern in network.used_only_for.items():
        if train not in (half, "both"):
            for name, parameter in network.named_parameters():
                if re.search(pattern, name):
                    parameter.requires_grad_(False)


def check_resolution(networks: Mapping[str, nn.Module | None]) -> None:
    """Check that no weight trains in 16 bits, which would round small updates away.

    Args:
        networks: What trains, by the key below ``model.init_args.system.init_args`` that sets its dtype.

    Raises:
        ValueError: A weight does.
    """
    for key, network in networks.items():
        for name, parameter in network.named_parameters() if network is not None else ():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise ValueError(
                    f"model.init_args.system.init_args.{key}={dtype}, but these weights train ({name}), and {dtype} rounds updates of "
                    f"1e-5 away; allowed: model.init_args.system.init_args.{key}=float32 with trainer.precision=bf16-mixed, or an "
                    "adapter (uae.models.finetune.LoRA)"
                )
