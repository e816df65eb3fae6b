"""MetaQuery from what its training code saves: no weights are released, so the layout is written here."""

import json

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.systems.test_real_systems import CAPTIONS, CLOSE, small
from uae.models.conditioners.connectors import metaquery_connector
from uae.systems.metaquery import METAQUERY_SYSTEM, MetaQuery

QWEN, SANA = "Qwen/Qwen2.5-VL-3B-Instruct", "Efficient-Large-Model/Sana_1600M_512px_diffusers"
QUERIES = 6


@torch.no_grad()
def test_queries_are_the_last_words_of_the_vocabulary(mirrored, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(mirrored / QWEN, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(mirrored / QWEN)
    table_VD = model.get_input_embeddings().weight
    noise = torch.Generator().manual_seed(0)
    added_QD = torch.randn(QUERIES + 2, table_VD.shape[1], generator=noise)  # begin, end, queries
    connector = metaquery_connector(table_VD.shape[1], 32, layers=2).eval()
    for weight in connector.parameters():
        weight.copy_(weight + 0.1 * torch.randn(weight.shape, generator=noise))
    saved = {f"model.connector.{name}": value.clone() for name, value in connector.state_dict().items()}
    saved["model.mllm_backbone.model.embed_tokens.weight"] = torch.cat([table_VD, added_QD])
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_metaqueries": QUERIES}))
    umm = MetaQuery(str(tmp_path), QWEN, SANA, **small(guidance=3.0)).build()
    condition = umm.conditioner.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        prompt = f"<|im_start|>system\n{METAQUERY_SYSTEM}<|im_end|>\n<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n\n"
        ids_L = words(prompt, return_tensors="pt", add_special_tokens=False).input_ids[0]
        inputs = torch.cat([table_VD[ids_L], added_QD[:1], added_QD[2:], added_QD[1:2]])  # begin, queries, end
        states = model.model.language_model(inputs_embeds=inputs[None]).last_hidden_state[:, -QUERIES - 1 : -1]
        torch.testing.assert_close(condition.embeds_NLD[row], connector(states)[0], **CLOSE)
    assert umm.renderer.render(condition, [1, 2]).shape == (2, 3, 32, 32)
