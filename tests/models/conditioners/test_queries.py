import copy

import pytest
import torch
from torch import nn

from uae.miniature.tiny import VOCABULARY
from uae.models.conditioners.connectors import OpenUniConnector, metaquery_connector
from uae.models.conditioners.queries import QueryConditioner
from uae.models.finetune import LoRA

TEXTS = ["a red square", "a tiny blue ring at top left and a white cross on a navy background", ""]
HEAD, TAIL = "<|im_start|> user", "<|im_end|> <|im_start|> assistant"
TEMPLATE, NOTHING = f"{HEAD} {{caption}} {TAIL}", f"{HEAD} describe {TAIL}"
QUERIES, WIDTH, OUT = 5, 128, 12
CLOSE = {"atol": 1e-5, "rtol": 0}


def ids_of(prompt):
    return [VOCABULARY.index(word) for word in prompt.split()]


@pytest.fixture
def openuni(fresh):
    """OpenUni's layout around the captioner's decoder, with weights large enough that everything matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = OpenUniConnector(WIDTH, 96, layers=2), nn.Linear(WIDTH, OUT)
        queries_QD = torch.randn(QUERIES, WIDTH) * WIDTH**-0.5
        return QueryConditioner(lambda: fresh.language_model, fresh.processor.tokenizer, queries_QD, *parts, TEMPLATE, NOTHING)


def plain(model, conditioner, prompt):
    """One row without padding: the prompt's embeddings, the queries, the decoder, the connector, the projector."""
    words = model.get_input_embeddings().weight[ids_of(prompt)]
    hidden = model.model.language_model(inputs_embeds=torch.cat([words, conditioner.meta_queries])[None]).last_hidden_state
    return conditioner.projector(conditioner.connector(hidden[:, -QUERIES:]))[0]


def test_rows_equal_one_caption_at_a_time(fresh, openuni):
    condition = openuni.encode(TEXTS)
    assert condition.embeds_NLD.shape == (3, QUERIES, OUT)
    assert condition.mask_NL.tolist() == [[1] * QUERIES] * 3
    assert condition.pooled_NP is None
    for row, text in enumerate(TEXTS):
        expected = plain(fresh.learner.network.base, openuni, TEMPLATE.replace("{caption}", text))
        torch.testing.assert_close(condition.embeds_NLD[row], expected, **CLOSE)
    spread = (condition.embeds_NLD - condition.embeds_NLD[:1])[1:].abs().amax((1, 2))
    assert (spread > 0.1).all()  # captions matter


def test_the_prompt_without_a_caption(fresh, openuni):
    condition = openuni.encode_unconditional()
    assert len(condition) == 1
    torch.testing.assert_close(condition.embeds_NLD[0], plain(fresh.learner.network.base, openuni, NOTHING), **CLOSE)
    openuni.unconditional = None
    torch.testing.assert_close(openuni.encode_unconditional().embeds_NLD, openuni.encode([""]).embeds_NLD, **CLOSE)


def test_the_state_dict_is_the_published_one(openuni):
    released = {"meta_queries": torch.randn(QUERIES, WIDTH)} | {
        f"connector.layers.{n}.{name}.{kind}": torch.randn(shape if kind == "weight" else shape[:1])
        for n in range(2)
        for name, shape in {
            **{f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in ("q", "k", "v", "out")},
            "mlp.fc1": (96, WIDTH), "mlp.fc2": (WIDTH, 96), "layer_norm1": (WIDTH,), "layer_norm2": (WIDTH,),
        }.items()
        for kind in ("weight", "bias")
    }  # fmt: skip
    released |= {"projector.weight": torch.randn(OUT, WIDTH), "projector.bias": torch.randn(OUT)}
    openuni.load_state_dict(released, strict=True)
    assert torch.equal(openuni.meta_queries, released["meta_queries"])


def test_metaquery_reads_as_the_published_code_does(fresh):
    """There the queries are special tokens in a left-padded prompt that goes on behind them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        connector = metaquery_connector(WIDTH, OUT, layers=2)
        rows = torch.randn(QUERIES + 2, WIDTH)  # <begin_of_img>, <end_of_img>, the queries
    model = copy.deepcopy(fresh.learner.network.base)
    model.resize_token_embeddings(len(VOCABULARY) + len(rows), mean_resizing=False)
    model.get_input_embeddings().weight.data[len(VOCABULARY) :] = rows
    begin, end, *images = range(len(VOCABULARY), len(VOCABULARY) + len(rows))
    prompts = [[*ids_of(TEMPLATE.replace("{caption}", text)), begin, *images, end, VOCABULARY.index("<|im_end|>")] for text in TEXTS]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    states = hidden[(ids > end)].view(len(TEXTS), QUERIES, WIDTH)

    words, queries = fresh.processor.tokenizer, torch.cat([rows[:1], rows[2:]])
    conditioner = QueryConditioner(lambda: fresh.language_model, words, queries, connector, None, TEMPLATE, lead=1)
    condition = conditioner.encode(TEXTS)
    assert condition.embeds_NLD.shape == (3, QUERIES, OUT)
    torch.testing.assert_close(condition.embeds_NLD, connector(states), atol=2e-5, rtol=0)
    assert set(conditioner.state_dict()) == {"meta_queries", *(f"connector.{name}" for name in connector.state_dict())}


def test_long_captions_are_cut_and_counted(fresh, openuni):
    openuni.max_tokens = 9
    with pytest.warns(UserWarning, match="1 of 3 captions .* max_tokens=9"):
        condition = openuni.encode(TEXTS)
    assert openuni.truncated == 1
    expected = plain(fresh.learner.network.base, openuni, TEMPLATE.replace("{caption}", "a tiny blue ring"))
    torch.testing.assert_close(condition.embeds_NLD[1], expected, **CLOSE)


def test_the_gradient_reaches_queries_connector_and_projector(fresh, openuni):
    with torch.no_grad():
        assert not openuni.encode(TEXTS).embeds_NLD.requires_grad
    fresh.learner.network.requires_grad_(False)
    openuni.encode(TEXTS).embeds_NLD.square().sum().backward()
    without = [name for name, p in openuni.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []
    assert (openuni.meta_queries.grad.abs().sum(1) > 0).all()


def test_precisions_are_their_own_and_weights_may_be_the_start(fresh, openuni):
    exact = openuni.encode(TEXTS).embeds_NLD
    LoRA(rank=2).attach(fresh.learner, keep_reference=True)
    with torch.no_grad():
        for name, weight in fresh.learner.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    assert (openuni.encode(TEXTS).embeds_NLD - exact).abs().max() > 1e-2
    openuni.weights = fresh.learner.reference
    torch.testing.assert_close(openuni.encode(TEXTS).embeds_NLD, exact, **CLOSE)
    fresh.learner.network.to(torch.bfloat16)
    low = openuni.encode(TEXTS).embeds_NLD
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.1 * exact.abs().max()
