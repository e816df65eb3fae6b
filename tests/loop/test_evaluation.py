import pytest
import torch
from torchmetrics import Metric

from tests.conftest import Letters, data
from uae.encoders import LayoutEncoder
from uae.metrics import UnifiedScore
from uae.types import Sampling


class Texts(Metric):
    """Mean number of words, and which batches came."""

    def __init__(self):
        super().__init__()
        self.add_state("words", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, texts, reconstructions_NCHW, batch):
        assert len(texts) == len(reconstructions_NCHW) == len(batch["scene"])
        self.words += sum(len(text.split()) for text in texts)
        self.count += len(texts)

    def compute(self):
        return {"caption/words": self.words / self.count}


def test_validation_scores_greedy_captions(build, trainer):
    score = UnifiedScore({"layout": LayoutEncoder(cells=2)}, bootstrap=0)
    module, source = build(unified_score=score, metrics={"texts": Texts()}), data()
    run = trainer(limit_val_batches=1.0)
    (first,) = run.validate(module, source, verbose=False)
    captions, rewards, letters = [], [], Letters()
    sampling = Sampling(temperature=0.0, max_tokens=6)
    for batch in source.val_dataloader():
        for image in batch["image"]:  # one by one: the batch does not matter
            captioner = module.umm.captioner
            captions += captioner.sample(captioner.prepare(image[None]), 1, sampling, [0]).texts
            rewards.append(letters(image[None], image[None], captions[-1:]).item())
    assert first["caption/words"] == pytest.approx(sum(len(text.split()) for text in captions) / 6)
    found = module.predict_step(next(iter(source.val_dataloader())))
    assert found["caption"] == captions[: len(found["caption"])]
    assert found["reward/letters"].tolist() == pytest.approx(rewards[: len(found["caption"])])
    assert len(found["image"]) == len(found["reconstruction"]) == len(found["id"]) == len(found["reward"]) > 0
    assert {"val_reward/mean", "unified_score/unified", "unified_score/layout", "unified_score/n"} <= set(first)
    assert first["unified_score/n"] == 6
    (second,) = run.validate(module, source, verbose=False)
    assert second == first  # greedy, fixed noise, and every metric started afresh
    (tested,) = run.test(module, data(test_size=6), verbose=False)
    assert tested["unified_score/n"] == 6
    assert "test_reward/mean" in tested


def test_prediction_says_what_each_image_became(build, trainer):
    module = build()
    batches = trainer().predict(module, data(test_size=6))
    assert sum(len(batch["caption"]) for batch in batches) == 6
    for batch in batches:
        expected = batch["reward/layout"] + 0.5 * batch["reward/letters"]
        torch.testing.assert_close(batch["reward"], expected)
        assert batch["reconstruction"].shape == batch["image"].shape


class Counted(torch.nn.Module):
    """Counts captions, and is no metric of torchmetrics."""

    def __init__(self):
        super().__init__()
        self.captions = 0

    def update(self, texts, reconstructions_NCHW, batch):
        self.captions += len(texts)

    def compute(self):
        return {"counted": self.captions}

    def reset(self):
        self.captions = 0


def test_whatever_counts_like_a_metric_is_used(build, trainer):
    run = trainer(limit_val_batches=1.0)
    (logged,) = run.validate(build(metrics={"counted": Counted()}), data(), verbose=False)
    assert logged["counted"] == 6
