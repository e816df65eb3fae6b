import random
from collections import Counter

import pytest
import torch

from tests.miniature.pretraining.objectives import built, loss
from uae.miniature.pretraining.contrastive import CONTEXT, END, edit, encode
from uae.miniature.scenes import WORDS, describe, parse, render, sample_scene, scene_of


@pytest.mark.parametrize("attribute", ["color", "shape", "size", "place", "background"])
def test_an_edit_changes_one_attribute_of_one_object(attribute):
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        other = edit(scene, rng, attribute)
        assert parse(describe(other)) == other  # still a scene, in reading order
        if attribute == "background":
            assert other.objects == scene.objects
            assert other.background != scene.background
            continue
        assert other.background == scene.background
        (before,), (after,) = set(scene.objects) - set(other.objects), set(other.objects) - set(scene.objects)
        names = ("color", "shape", "size", "row", "column")
        changed = {name for name in names if getattr(before, name) != getattr(after, name)}
        assert changed <= {"row", "column"} if attribute == "place" else changed == {attribute}
        places = [(obj.row, obj.column) for obj in other.objects]
        assert len(set(places)) == len(places) == len(scene.objects)


def test_edits_choose_all_attributes():
    rng, scene = random.Random(1), scene_of(0, counts=(1,))
    kinds: Counter[str] = Counter()
    for _ in range(500):
        other = edit(scene, rng)
        (a,), (b,) = scene.objects, other.objects
        kinds["background"] += other.background != scene.background
        kinds["place"] += (a.row, a.column) != (b.row, b.column)
        for name in ("color", "shape", "size"):
            kinds[name] += getattr(a, name) != getattr(b, name)
    assert sum(kinds.values()) == 500
    assert min(kinds.values()) > 70
    assert len(kinds) == 5


def test_captions_fit_the_text_tower():
    longest = describe(scene_of(0, counts=(3,)))
    (ids,) = encode([longest])
    assert ids.tolist() == [1 + WORDS.index(word) for word in longest.split()] + [END] + [0] * (CONTEXT - len(longest.split()) - 1)
    assert ids.argmax() == len(longest.split())  # open_clip reads the text where the highest id is


def test_the_contrastive_loss_by_hand(batch):
    objective = built("contrastive").eval()
    with torch.no_grad():
        terms = loss(objective, batch)
        rng = random.Random(5)
        scenes = [copy_ for scene in batch["scene"] for copy_ in (scene, edit(scene, rng))]
        images = torch.nn.functional.normalize(objective.clip.encode_image((render(scenes) - 0.5) / 0.5), dim=1)
        texts = torch.nn.functional.normalize(objective.clip.encode_text(encode([describe(s) for s in scenes])), dim=1)
        scale = min(objective.clip.logit_scale.exp().item(), 15.0)
        cosines = (scale * images @ texts.T).double()
        rows = [cosines[i, i] - cosines[i].logsumexp(0) for i in range(24)]
        columns = [cosines[i, i] - cosines[:, i].logsumexp(0) for i in range(24)]
    assert terms.item() == pytest.approx(-(sum(rows) + sum(columns)).item() / 48, abs=1e-5)
