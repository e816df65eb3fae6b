"""Learned queries after the caption: the renderer gets a fixed number of embeddings for captions of any length.

    caption --template--> tokens + queries --language model--> states of the queries --connector, projector--> condition

OpenUni (arXiv 2505.23661) and MetaQuery (arXiv 2504.06256) work this way, both with Sana as the renderer. The caption is read
without the image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from uae.models.conditioners.prompts import check_template, prompt_ids
from uae.models.conditioners.states import EmbeddingCondition, LanguageReader, right_padded
from uae.types import Rollout


class QueryConditioner(LanguageReader):
    """Projects the hidden states of learned queries that a language model reads after the caption.

    A row is its prompt, then the queries, then padding. No token attends to the padding, and positions do not depend on it.
    With a borrowed language model, the state dict is ``meta_queries``, ``connector.*`` and ``projector.*``, as OpenUni
    releases them.

    Args:
        language_model: Decoder-only model that takes ``inputs_embeds`` and ``attention_mask``; or a function that returns
            it, see `LanguageReader`.
        tokenizer: Tokenizer of the language model.
        queries_QD: The queries in the language model's embedding space, ``[Q, D]``.
        connector: Network over the query states ``[N, Q, D]``, see `uae.models.conditioners.connectors`.
        projector: Network from the connector's output to the renderer's embedding width; None if the connector's output has
            that width (MetaQuery).
        template: Prompt with "{caption}" exactly once.
        unconditional: Prompt without a caption for classifier-free guidance (OpenUni: "Generate an image." in the chat
            template); None is the template with the empty caption (MetaQuery).
        max_tokens: Most tokens of a prompt, template included, queries not. Longer captions are cut and counted in
            ``truncated``, with a warning.
        lead: Number of queries at the start whose states are not returned (MetaQuery: 1, its ``<begin_of_img>``).
        weights: Context manager that is entered around each call of the language model, such as ``captioner.learner.reference``.
    """

    def __init__(
        self,
        language_model: nn.Module | Callable[[], nn.Module],
        tokenizer: Any,
        queries_QD: Tensor,
        connector: nn.Module,
        projector: nn.Module | None,
        template: str,
        unconditional: str | None = None,
        max_tokens: int = 512,
        lead: int = 0,
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(language_model, weights)
        check_template(template)
        self.meta_queries = queries_QD if isinstance(queries_QD, nn.Parameter) else nn.Parameter(queries_QD)
        self.connector, self.projector = connector, projector or nn.Identity()
        self.tokenizer, self.template, self.unconditional = tokenizer, template, unconditional
        self.max_tokens, self.lead = max_tokens, lead

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """Embeddings ``[N, Q, D]`` of N captions. There is no padding, so the mask is all ones."""
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        return self._condition(rows)

    def encode_unconditional(self) -> EmbeddingCondition:
        """The condition of one row for classifier-free guidance, from the prompt without a caption."""
        prompt = self.template.replace("{caption}", "") if self.unconditional is None else self.unconditional
        return self._condition([list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])])

    def _condition(self, rows: list[list[int]]) -> EmbeddingCondition:
        states_NQD = self._states(rows)
        weight = next(self.connector.parameters(), states_NQD)
        embeds_NQD = self.projector(self.connector(states_NQD.to(weight.device, weight.dtype)))
        mask_NQ = torch.ones(embeds_NQD.shape[:2], dtype=torch.long, device=embeds_NQD.device)
        return EmbeddingCondition(embeds_NQD, mask_NQ)

    def _states(self, rows: list[list[int]]) -> Tensor:
        """Final hidden states ``[N, Q, D]`` of the queries, without the first ``lead`` queries."""
        with self.reading() as reader:
            embed = reader.get_input_embeddings()
            ids_NP, mask_NP = right_padded(rows, self.tokenizer, embed.weight.device)
            prompt_NPD = embed(ids_NP)
            N, Q = len(rows), len(self.meta_queries)
            at_NQ = mask_NP.sum(1, keepdim=True) + torch.arange(Q, device=ids_NP.device)
            every_N1 = torch.arange(N, device=ids_NP.device)[:, None]
            queries_NQD = self.meta_queries.to(prompt_NPD).expand(N, -1, -1)
            inputs_NLD = nn.functional.pad(prompt_NPD, (0, 0, 0, Q)).index_put((every_N1, at_NQ), queries_NQD)
            mask_NL = nn.functional.pad(mask_NP, (0, Q)).index_put((every_N1, at_NQ), torch.ones_like(at_NQ))
            hidden_NLD = reader(inputs_embeds=inputs_NLD, attention_mask=mask_NL, use_cache=False).last_hidden_state
        return hidden_NLD[every_N1, at_NQ[:, self.lead :]]
