"""The same inputs through `uae.grpo.GRPOLoss` and through the loss of TRL's ``GRPOTrainer``: value and gradient side by side.

    pip install 'uae[bench-peers]' && python benchmarks/agreement/trl_losses.py

TRL's method ``_compute_loss`` is called on a stand-in for its trainer, which returns given log-probs and entropies in the place of a
model. One row of the table is one variant; where the two define something in another way, the row says what is compared instead. The
table goes to benchmarks/results/trl_losses.md.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from results import RESULTS

from uae.grpo import GRPOLoss, importance_weights

ROWS, TOKENS = 6, 9


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        name: The variant.
        ours: Settings of our loss.
        theirs: Settings of TRL's trainer that differ from the defaults of `stand_in`.
        weights: Whether importance weights are passed.
        truncated: Whether row 0 is a truncated completion that is left out.
        factor: What TRL's loss is multiplied by before it is compared.
        note: Why, or what is the same only under a condition.
    """

    name: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    weights: bool = False
    truncated: bool = False
    factor: float = 1.0
    note: str = ""


KL = {"beta": 0.04}
VARIANTS = [
    *(Variant(name, {"aggregation": name} | KL, {"loss_type": name} | KL) for name in ("grpo", "bnpo", "dapo")),
    Variant("dr_grpo", {"aggregation": "dr_grpo", "max_tokens": TOKENS} | KL, {"loss_type": "dr_grpo"} | KL),
    Variant("grpo, two-sided", {"delta": 1.1} | KL, {"delta": 1.1} | KL),
    Variant("grpo, sequence level", {"importance": "sequence"} | KL, {"importance_sampling_level": "sequence"} | KL),
    Variant("KL times ratio", {"kl_weighting": "ratio"} | KL, {"use_bias_correction_kl": True} | KL),
    Variant(
        "cispo", {"surrogate": "cispo", "epsilon_high": 0.3, "aggregation": "dapo"}, {"loss_type": "cispo", "epsilon_high": 1.3},
        note="TRL's epsilon_high is the cap itself, ours 1 less",
    ),
    Variant("sapo", {"surrogate": "sapo"}, {"loss_type": "sapo"}),
    Variant(
        "top entropies", {"top_entropy": 0.4, "aggregation": "dapo"}, {"top_entropy_quantile": 0.4, "loss_type": "dapo"}
    ),
    Variant(
        "importance weights", {"aggregation": "dapo"}, {"loss_type": "dapo", "use_vllm": True}, weights=True,
        note="no KL term, which TRL does not weigh",
    ),
    Variant("truncated left out, dapo", {"aggregation": "dapo"}, {"loss_type": "dapo"}, truncated=True),
    Variant(
        "truncated left out, grpo", truncated=True, factor=ROWS / (ROWS - 1),
        note="TRL divides by all rows, ours by those that are left",
    ),
]  # fmt: skip


def stand_in(logp: Tensor, entropy: Tensor, settings: dict[str, Any]) -> Any:
    """What ``_compute_loss`` reads of a trainer."""
    defaults = {
        "loss_type": "grpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0, "use_vllm": False, "delta": None, "use_bias_correction_kl": False,
    } | settings  # fmt: skip
    arguments = SimpleNamespace(
        delta=defaults.pop("delta"), use_bias_correction_kl=defaults.pop("use_bias_correction_kl"), steps_per_generation=1,
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    )  # fmt: skip
    same = lambda values, *_, **__: values  # noqa: E731
    accelerator = SimpleNamespace(num_processes=1, gather=same, reduce=same, pad_across_processes=same, sync_gradients=True)
    trainer = SimpleNamespace(
        args=arguments, accelerator=accelerator, aux_loss_enabled=False, off_policy_mask_threshold=None, max_completion_length=TOKENS,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)}, model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None), **defaults,
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given)
    return trainer


def compared(variant: Variant) -> tuple[float, float, float, float]:
    """Our loss, TRL's loss, the difference of the losses and the largest difference of the gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -2 + 0.5 * draw()
    logp, ref, sampler, entropy = old + 0.3 * draw(), old + 0.3 * draw(), old + 0.3 * draw(), draw().abs()
    advantages = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).double()
    if variant.truncated:
        mask[0] = 0.0
    weights = importance_weights(sampler, old, mask) if variant.weights else None
    loss = GRPOLoss(**variant.ours)
    rows = ROWS - 1 if variant.truncated and loss.window == "none" else None
    mine, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    ours = loss(mine, old, advantages, mask, ref, rows, weights, entropy).loss
    ones = torch.ones(ROWS, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": torch.ones(ROWS, TOKENS, dtype=torch.long), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    other = variant.factor * GRPOTrainer._compute_loss(stand_in(theirs, entropy, variant.theirs), None, inputs)
    ours.backward()
    other.backward()
    gap = torch.stack([t.grad for t in (mine, theirs) if t.grad is not None]).diff(dim=0).abs().max()
    return ours.item(), other.item(), abs(ours - other).item(), gap.item()


def main() -> None:
    """Print and write the table; fail if a variant differs by more than 1e-6."""
    found = [(variant, compared(variant)) for variant in VARIANTS]
    lines = [
        f"# The loss beside that of TRL {importlib.metadata.version('trl')}", "",
        "| variant | ours | TRL | difference | largest difference of a gradient | |", "|---|---|---|---|---|---|",
        *(f"| {v.name} | {a:.9f} | {b:.9f} | {c:.1e} | {d:.1e} | {v.note} |" for v, (a, b, c, d) in found),
        "",
        "float64, one process. Not compared, because TRL defines them in another way: the entropy bonus (TRL differentiates the",
        "entropy of all words, ours has the same gradient in expectation), and at sequence level the weighting of the KL term (TRL",
        "takes the ratio of the sequence, ours that of the token).",
    ]  # fmt: skip
    print("\n".join(lines))
    (RESULTS / "trl_losses.md").write_text("\n".join(lines) + "\n")
    worst = max(max(c, d) for _, (_, _, c, d) in found)
    if worst > 1e-6:
        sys.exit(f"a variant differs by {worst:.2g}; allowed: 1e-6")


if __name__ == "__main__":
    main()
