"""The last layer of a language model: logits from hidden states, the same in a sampler and in training code.

Logits are at least float32, whatever the surrounding autocast. On a GPU, a product with a 16-bit weight takes 16-bit inputs and
adds in float32; elsewhere both are converted to float32 first (float64 for a float64 weight).

On a CPU with oneDNN, a large weight is copied into an order that oneDNN reads faster. Products of few rows then take a half to a
quarter of the time, and since torch 2.14 a row's logits are the same bits whatever rows stand beside it. Other products add in an
order that depends on the number of rows, so that logits differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SMALL = 2**18  # a weight with fewer numbers is not reordered: there, to call oneDNN's operator takes longer than the product
PIECE = 2**22  # a larger weight is reordered and multiplied in pieces of so many numbers, each of which fits in a CPU's cache


@dataclass(frozen=True)
class LogitRule:
    """What a model does with the outputs z of its last layer to get its logits: ``c tanh(s z / c)``, or ``s z`` without a cap.

    Args:
        scale: The factor s, not 0 (Granite, HyperCLOVA X).
        cap: The largest size c of a logit, more than 0 (Gemma); None is no limit.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits_CV: Tensor) -> Tensor:
        """The logits from the outputs of the last layer; changes them in place."""
        if self.scale != 1:
            logits_CV *= self.scale
        return logits_CV if self.cap is None else logits_CV.div_(self.cap).tanh_().mul_(self.cap)

    def chain(self, slope_CV: Tensor, logits_CV: Tensor, temperature: float) -> Tensor:
        """From the gradient with respect to the logits to that with respect to the outputs of the last layer, in place.

        Args:
            slope_CV: The gradient.
            logits_CV: The logits divided by the temperature, which are overwritten.
            temperature: What they were divided by.
        """
        if self.scale != 1:
            slope_CV *= self.scale
        if self.cap is None:
            return slope_CV
        return slope_CV.mul_(logits_CV.mul_(temperature / self.cap).square_().neg_().add_(1.0))


AS_THEY_ARE = LogitRule()


class OutputLayer:
    """Computes the logits of tokens from their hidden states.

    Make a new object when the weight has changed: this one may hold a copy of the old one.

    Args:
        weight_VD: Weight of the layer.
        temperature: Number that divides the logits, more than 0.
        banned: Tokens int64 that the policy never emits, whose logit is minus infinity; None is no token.
        bias_V: Bias of the layer, or None.
        rule: How the model turns the outputs of the layer into logits.
        keep: True makes the reordered copy once and holds it (4 V D bytes), for many calls. False makes it again in every call,
            one piece at a time, which takes as long as the product of about 60 tokens. Where a weight is not reordered, it has
            no effect.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        temperature: float = 1.0,
        banned: Tensor | None = None,
        bias_V: Tensor | None = None,
        rule: LogitRule = AS_THEY_ARE,
        keep: bool = True,
    ) -> None:
        self.weight_VD, self.bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
        self.temperature, self.banned, self.rule = temperature, banned, rule
        self._reorders = reorders(weight_VD)
        self._kept = [*map(_reordered, self._rows())] if self._reorders and keep else None

    @torch.no_grad()
    def __call__(self, hidden_CD: Tensor) -> Tensor:
        """The logits ``[C, V]`` of C tokens, at least float32, without gradient."""
        logits_CV = self._outputs(hidden_CD)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        logits_CV = self.rule.apply(logits_CV)
        if self.temperature != 1:
            logits_CV /= self.temperature
        return logits_CV if self.banned is None else logits_CV.index_fill_(1, self.banned, -torch.inf)

    def _outputs(self, hidden_CD: Tensor) -> Tensor:
        """``hidden @ weight.T``."""
        if not len(hidden_CD):
            return hidden_CD.new_empty(0, len(self.weight_VD), dtype=accumulator(self.weight_VD))
        if not self._reorders:
            return product(hidden_CD, self.weight_VD.t())
        rows_RD = hidden_CD.float()
        if len(rows_RD) == 1:  # oneDNN adds up a single row in another order
            rows_RD = rows_RD.expand(2, -1)
        parts = (_multiplied(rows_RD, piece) for piece in self._kept or map(_reordered, self._rows()))
        if self.weight_VD.numel() <= PIECE:
            return next(parts)[: len(hidden_CD)]
        outputs_RV, start = rows_RD.new_empty(len(rows_RD), len(self.weight_VD)), 0
        for part_RP in parts:
            outputs_RV[:, start : start + part_RP.shape[1]] = part_RP
            start += part_RP.shape[1]
        return outputs_RV[: len(hidden_CD)]

    def gradient(self, slope_CV: Tensor) -> Tensor:
        """``slope @ weight``: from gradients with respect to the layer's outputs to those ``[C, D]`` with respect to hidden states."""
        if self.weight_VD.device.type != "cpu" or self.weight_VD.dtype.itemsize > 2:
            return product(slope_CV, self.weight_VD)
        gradient_CD, start = slope_CV.new_zeros(len(slope_CV), self.weight_VD.shape[1]), 0
        for rows_PD in self._rows():  # so that a 16-bit weight is never in float32 as a whole
            gradient_CD += product(slope_CV[:, start : start + len(rows_PD)], rows_PD.float())
            start += len(rows_PD)
        return gradient_CD

    def _rows(self) -> Iterator[Tensor]:
        """The rows of the weight, in pieces."""
        rows = max(1, PIECE // self.weight_VD.shape[1])
        return (self.weight_VD[start : start + rows] for start in range(0, len(self.weight_VD), rows))


def reorders(weight_VD: Tensor) -> bool:
    """Whether an `OutputLayer` multiplies by a reordered float32 copy of a weight."""
    whole = weight_VD.device.type == "cpu" and not isinstance(weight_VD, DTensor)
    return whole and reordered_bytes(weight_VD.numel(), weight_VD.dtype) > 0


def reordered_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Bytes of the reordered copy of a weight on a CPU; 0 if it is not reordered there.

    Args:
        numbers: How many numbers the weight has.
        dtype: Their data type.
    """
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return 4 * numbers if known and numbers >= SMALL and dtype != torch.float64 else 0


def accumulator(weight: Tensor) -> torch.dtype:
    """The data type in which products with a weight are accumulated."""
    return torch.promote_types(weight.dtype, torch.float32)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, at least float32, without the surrounding autocast, which would round it.

    On a GPU, a 16-bit ``right`` is multiplied by ``left`` rounded to its data type; elsewhere both are converted to
    `accumulator` of ``right`` first.
    """
    dtype = accumulator(right)
    with torch.autocast(right.device.type, enabled=False):
        if right.dtype != dtype and right.is_cuda:
            return torch.mm(left.to(right.dtype), right, out_dtype=dtype)  # no float32 copy of the head
        return left.to(dtype) @ right.to(dtype)


def _reordered(weight_PD: Tensor) -> Tensor:
    """A weight as oneDNN reads it best, in float32."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_PD.float(), 8)  # 8 rows are expected; others work, too
    return reordered


def _multiplied(rows_RD: Tensor, reordered: Tensor) -> Tensor:
    """``rows @ weight.T`` for a weight that was reordered."""
    outputs_RV: Tensor = torch.ops.mkldnn._linear_pointwise(rows_RD, reordered, None, "none", [], "")
    return outputs_RV
