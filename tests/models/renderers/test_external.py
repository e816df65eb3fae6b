import json
import pickle
import threading
from collections import Counter
from functools import partial

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image

from uae.models.conditioners.states import EmbeddingCondition, TextCondition
from uae.models.renderers import external
from uae.models.renderers.external import CallableRenderer, FolderRenderer

torch.set_num_threads(1)

CALLS = []  # what `draw` was asked


def colour(text, seed):
    """What `draw` paints for a caption and a seed."""
    return [len(text) * 7 % 256, sum(map(ord, text)) % 256, seed % 256]


def draw(text, height, width, seed):
    CALLS.append((text, height, width, seed))
    return Image.fromarray(np.full((height, width, 3), colour(text, seed), dtype=np.uint8))


def expected(texts, seeds, size=8):
    rows = [torch.tensor(colour(text, seed)) / 255 for text, seed in zip(texts, seeds, strict=True)]
    return torch.stack(rows)[:, :, None, None].expand(-1, 3, size, size)


class Clock:
    """Stands still; notes who would have slept for how long."""

    def __init__(self):
        self.now, self.sleeps = 100.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(external, "time", clock)
    CALLS.clear()
    return clock


def renderer(folder, client=draw, **more):
    more = {"version": "" if client is draw else "test"} | more
    return CallableRenderer(client, str(folder / "cache"), 8, 8, **more)


def entries(folder):
    return sorted((folder / "cache").rglob("*.png"))


# A system behind a function


def test_equal_rows_are_asked_once_and_never_again(tmp_path):
    texts, seeds = ["a cat", "a dog", "a cat", "a cat"], [3, 3, 3, 4]
    for _ in range(2):  # the second time, another process would find the same
        images = renderer(tmp_path).render(TextCondition(texts), seeds)
        torch.testing.assert_close(images, expected(texts, seeds), rtol=0, atol=0)
        assert images.dtype is torch.float32
    assert Counter(CALLS) == {("a cat", 8, 8, 3): 1, ("a dog", 8, 8, 3): 1, ("a cat", 8, 8, 4): 1}
    assert len(entries(tmp_path)) == 3

    renderer(tmp_path, version="2").render(TextCondition(["a cat"]), [3])  # another model behind the same function
    CallableRenderer(draw, str(tmp_path / "cache"), 8, 16).render(TextCondition(["a cat"]), [3])  # another size
    assert CALLS[3:] == [("a cat", 8, 8, 3), ("a cat", 8, 16, 3)]


def test_requests_run_at_once_and_keep_their_order(tmp_path):
    texts = [f"caption {n}" for n in range(4)]
    together, done = threading.Barrier(4), [threading.Event() for _ in range(5)]
    done[4].set()

    def backwards(text, height, width, seed):
        together.wait(timeout=20)  # breaks unless all four are under way
        assert done[seed + 1].wait(timeout=20)
        done[seed].set()
        return draw(text, height, width, seed)

    images = renderer(tmp_path, backwards, workers=4).render(TextCondition(texts), range(4))
    assert [call[3] for call in CALLS] == [3, 2, 1, 0]
    torch.testing.assert_close(images, expected(texts, range(4)))


def test_no_more_than_the_given_workers(tmp_path):
    running, most, lock = Counter(), [0], threading.Lock()

    def watched(text, height, width, seed):
        with lock:
            running["now"] += 1
            most[0] = max(most[0], running["now"])
        threading.Event().wait(0.005)
        with lock:
            running["now"] -= 1
        return draw(text, height, width, seed)

    renderer(tmp_path, watched, workers=2).render(TextCondition(["x"] * 8), range(8))
    assert most == [2]


def test_a_wrong_answer_is_a_failure_and_not_kept(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 1 pictures.*none of BMP"):
        renderer(tmp_path, lambda *_: b"<html>busy</html>", retries=0).render(TextCondition(["a"]), [0])
    assert not entries(tmp_path)


def test_pictures_of_another_size_are_resized_alike_at_first_and_from_the_cache(tmp_path):
    large = renderer(tmp_path, lambda text, height, width, seed: draw(text, 24, 16, seed))
    for _ in range(2):
        torch.testing.assert_close(large.render(TextCondition(["a"]), [3]), expected("a", [3]), rtol=0, atol=1e-6)
    assert len(CALLS) == 1


def test_failures_are_tried_again_after_growing_pauses(tmp_path, clock):
    def busy(text, height, width, seed):
        if len(CALLS) < 5:
            CALLS.append("failed")
            raise TimeoutError("busy")
        return draw(text, height, width, seed)

    images = renderer(tmp_path, busy, retries=5, longest_pause=6.0).render(TextCondition(["a"]), [9])
    torch.testing.assert_close(images, expected("a", [9]))
    assert clock.sleeps == [1, 2, 4, 6, 6]


def test_what_succeeded_is_kept_when_others_fail(tmp_path, clock):
    def partly(text, height, width, seed):
        picture = draw(text, height, width, seed)
        if seed in broken:
            raise ConnectionError("two\nlines")
        return picture

    broken = {1, 4}
    texts, seeds = [f"caption {n}" for n in range(6)], list(range(6))
    with pytest.raises(RuntimeError, match=r"^2 of 6 pictures.*in 3 tries each.*ConnectionError: two lines") as error:
        renderer(tmp_path, partly, retries=2).render(TextCondition(texts), seeds)
    assert "\n" not in str(error.value)
    assert Counter(call[3] for call in CALLS) == {0: 1, 1: 3, 2: 1, 3: 1, 4: 3, 5: 1}
    assert len(entries(tmp_path)) == 4
    CALLS.clear()
    broken.clear()
    images = renderer(tmp_path, partly, retries=2).render(TextCondition(texts), seeds)
    assert sorted(call[3] for call in CALLS) == [1, 4]
    torch.testing.assert_close(images, expected(texts, seeds))


def test_the_rate_limit_spans_threads_retries_and_calls(tmp_path, clock):
    limited = renderer(tmp_path, requests_per_minute=30, workers=4)
    limited.render(TextCondition(["a"] * 4), range(4))
    assert sorted(clock.sleeps) == [2, 4, 6]  # the first goes at once
    clock.now += 7
    limited.render(TextCondition(["a"] * 6), range(6))  # two are new: slots 8 and 10 seconds after the start
    assert sorted(clock.sleeps[3:]) == [1, 3]
    clock.now, clock.sleeps = clock.now + 1000, []

    def failing(*_):
        raise OSError

    with pytest.raises(RuntimeError):
        renderer(tmp_path, failing, requests_per_minute=60, retries=1, workers=1).render(TextCondition(["b"]), [0])
    assert clock.sleeps == [1, 1]  # the pause, then its slot


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500])
def test_damaged_entries_are_fetched_again(tmp_path, damage):
    renderer(tmp_path).render(TextCondition(["a", "b"]), [1, 2])
    victim = entries(tmp_path)[0]
    whole = victim.read_bytes()
    victim.write_bytes(damage(whole))
    images = renderer(tmp_path).render(TextCondition(["a", "b"]), [1, 2])
    assert len(CALLS) == 3
    torch.testing.assert_close(images, expected("ab", [1, 2]))
    assert victim.read_bytes() == whole


def test_a_configuration_names_the_client(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CallableRenderer, "renderer")
    settings = {"client": f"{__name__}:draw", "cache": str(tmp_path / "cache"), "height": 8, "width": 8}
    config = parser.parse_object({"renderer": {"class_path": "uae.models.renderers.external.CallableRenderer", "init_args": settings}})
    named = parser.instantiate(config).renderer
    copy = pickle.loads(pickle.dumps(named.to("cpu")))
    for same in (copy, renderer(tmp_path), CallableRenderer(f"{__name__}.draw", str(tmp_path / "cache"), 8, 8)):
        torch.testing.assert_close(same.render(TextCondition(["a"]), [1]), expected("a", [1]))
    assert len(CALLS) == 1  # one function, one name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"client": "no.such.module:draw"},
            "client='no.such.module:draw' cannot be imported.*model.init_args.system.init_args.renderer.init_args.client",
        ),
        ({"client": f"{__name__}:nothing"}, "cannot be imported.*nothing"),
        ({"client": "draw"}, "cannot be imported.*allowed: package.module:function"),
        ({"client": f"{__name__}:CALLS"}, "is no function"),
        ({"client": lambda *_: None}, "no name of its own.*model.init_args.system.init_args.renderer.init_args.version"),
        ({"client": partial(draw, width=4)}, "no name of its own"),
        ({"client": Clock().sleep}, "no name of its own"),
        ({"retries": -1}, "retries=-1; allowed: 0 or more"),
        ({"workers": 0}, "workers=0; allowed: 1 or more"),
        ({"requests_per_minute": 0}, "requests_per_minute=0; allowed: a positive number"),
        ({"height": 0}, "height=0"),
    ],
)
def test_settings_are_checked_before_the_run_begins(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        CallableRenderer(**{"client": draw, "cache": str(tmp_path), "height": 8, "width": 8} | settings).to("cpu")
    assert "\n" not in str(error.value)


# A folder of pictures


@pytest.fixture
def folder(tmp_path):
    rows = [("a cat", 1), ("a dog", 2), ("a cat", 3), ("a cat", 4)]
    (tmp_path / "made").mkdir()
    for n, (text, seed) in enumerate(rows):
        Image.fromarray(np.full((8, 8, 3), colour(text, seed), dtype=np.uint8)).save(tmp_path / f"made/{n}.png")
    lines = [json.dumps({"file_name": f"made/{n}.png", "text": text}) for n, (text, _) in enumerate(rows)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, ""]))
    return tmp_path


def test_the_seed_chooses_among_the_pictures_of_a_text(folder):
    texts, seeds = ["a dog", "a cat", "a cat", "a cat", "a cat"], [7, 0, 1, 2, 3]
    painted = [2, 1, 3, 4, 1]
    drawn = FolderRenderer(str(folder), 8, 8)
    images = pickle.loads(pickle.dumps(drawn)).to("cpu").render(TextCondition(texts), seeds)
    torch.testing.assert_close(images, expected(texts, painted), rtol=0, atol=0)
    assert images.dtype is torch.float32
    assert FolderRenderer(str(folder), 4, 6).render(TextCondition(["a cat"]), [0]).shape == (1, 3, 4, 6)
    assert drawn.modules() == []


def test_captions_without_a_picture_are_one_error(folder):
    texts = ["a cat", *[f"caption {n}" for n in range(5)], "caption 0"]
    with pytest.raises(ValueError, match=r"5 of 6 captions.*'caption 0', 'caption 1', 'caption 2'; .*folder$") as error:
        FolderRenderer(str(folder), 8, 8).render(TextCondition(texts), [0] * 7)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "metadata.jsonl").unlink(),
            "no metadata.jsonl in .*model.init_args.system.init_args.renderer.init_args.folder",
        ),
        (lambda root: (root / "metadata.jsonl").write_text('{"file_name": "made/0.png"}'), "line 1 of .*text"),
        (lambda root: (root / "metadata.jsonl").write_text("a cat, 0.png"), "line 1 of .*JSON object"),
        (lambda root: (root / "made/2.png").unlink(), "1 files of .*metadata.jsonl are not there, e.g. 2.png"),
        (
            lambda root: (root / "made/0.png").write_bytes(b"\x89PNG"),
            "replace 0.png in .*model.init_args.system.init_args.renderer.init_args.folder",
        ),
    ],
)
def test_a_bad_folder_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        FolderRenderer(str(folder), 8, 8).to("cpu").render(TextCondition(["a cat"]), [0])
    assert "\n" not in str(error.value)


# Both


def test_only_captions_and_no_gradient(folder):
    for drawn in (FolderRenderer(str(folder), 8, 8), renderer(folder)):
        name = type(drawn).__name__
        with pytest.raises(ValueError, match=f"{name} has no gradients"):
            drawn.render(TextCondition(["a cat"]), [0], grad=True)
        with pytest.raises(ValueError, match=f"{name} draws from captions .*got EmbeddingCondition.*TextConditioner"):
            drawn.render(EmbeddingCondition(torch.zeros(1, 2, 4), torch.ones(1, 2)), [0])
        with pytest.raises(ValueError, match="1 conditions but 2 seeds"):
            drawn.render(TextCondition(["a cat"]), [0, 1])


def test_nothing_is_asked_for_that_could_not_be_kept(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    condition = TextCondition(["a cat"])
    with pytest.raises(ValueError, match=r"cache=.* cannot be written .*; set model\.init_args\.system.*\.cache"):
        renderer(tmp_path).render(condition, [0])
    assert CALLS == []
