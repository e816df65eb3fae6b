import torch

from tests.miniature.pretraining.objectives import built
from tests.models.families import plain_logprobs
from uae.miniature.pretraining import CaptionObjective, CaptionStyle
from uae.miniature.scenes import Detail, Object, Scene, describe, scene_of
from uae.miniature.scenes.world import cell_codes
from uae.types import Rollout


def test_the_caption_loss_is_nats_per_word_whatever_the_padding(batch, monkeypatch):
    objective = built("captioning").eval()
    (captioner,) = objective.frozen
    texts = ["a red ring", describe(scene_of(0, counts=(3,))), *["a pink cross at top left"] * 10]
    replies = iter(texts * 2)
    monkeypatch.setattr(objective, "caption", lambda scene: next(replies))
    with torch.no_grad():
        terms = objective(batch, 0.0)
        words = captioner.processor.tokenizer
        rows = [torch.tensor(words(text)["input_ids"] + [words.eos_token_id]) for text in texts]
        tokens_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)  # anything
        mask_NT = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        context = captioner.prepare(batch["image"])
        rollout = Rollout(mask_RS=mask_NT, logp_RS=mask_NT, tokens_NT=tokens_NT, texts=texts, context=context, group=1)
        expected = -plain_logprobs(captioner, rollout).sum() / sum(len(text.split()) + 1 for text in texts)
    torch.testing.assert_close(terms["caption"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(terms["loss"], terms["caption"] + terms["reading"])


def test_cells_are_read_in_the_order_of_the_image_tokens(batch):
    """Changing one cell of the picture changes the codes of that cell only."""
    scene = Scene("navy", (Object("middle", "left", "red", "ring", "tiny"), Object("bottom", "right", "cyan", "cross", "large")))
    (codes,) = cell_codes([scene])
    assert codes.nonzero().flatten().tolist() == [3, 8]
    moved = Scene("navy", (scene.objects[0],))
    assert (cell_codes([moved])[0] != codes).nonzero().flatten().tolist() == [8]
    assert codes.max() < 1 + 12 * 8
    every = [Object("top", "left", c, s, z) for c in ("red", "pink") for s in ("ring", "cross") for z in ("tiny", "large")]
    assert len({int(cell_codes([Scene("black", (obj,))])[0, 0]) for obj in every}) == 8


def test_caption_styles_are_mixed_by_their_shares():
    objective = CaptionObjective([CaptionStyle(1.0, Detail(False, False, False)), CaptionStyle(3.0)])
    scene = scene_of(1)
    detailed = sum("background" in objective.caption(scene) for _ in range(2000))
    assert abs(detailed / 2000 - 0.75) < 0.04
