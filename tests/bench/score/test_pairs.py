import json

import pytest

from uae.bench.score.pairs import pair


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def paired(tmp_path):
    def run(sources, reconstructions):
        return pair(touch(tmp_path / "a", sources), touch(tmp_path / "b", reconstructions))

    return run


@pytest.mark.parametrize(
    ("source", "reconstruction"),
    [
        ("x.jpg", "x.jpg"),
        ("x.jpg", "x.jpg.png"),
        ("x.jpg", "x.png"),
        ("x.jpg", "recon_x.jpg"),
        ("x.jpg", "recon_x.webp"),
        ("deep/x.v2.jpg", "deep/x.v2.png"),
        ("deep/x.jpg", "deep/recon_x.png"),
        ("deep/x.jpg", "x.png"),
        ("x.jpg", "out/recon_x.png"),
    ],
)
def test_one_name_for_one_image(paired, source, reconstruction):
    pairs = paired([source, "other.png", "notes.txt"], [reconstruction, "captions.json", ".hidden.png"])
    assert pairs.matched == {source: reconstruction}
    assert (pairs.unmatched_sources, pairs.unmatched_reconstructions, pairs.ambiguous) == (["other.png"], [], {})


def test_certain_names_go_before_likely_ones(paired):
    pairs = paired(["a.jpg", "a.png", "recon_b.png", "b.png"], ["a.png", "a.jpg.png", "recon_b.png", "b.webp"])
    assert pairs.matched == {"a.jpg": "a.jpg.png", "a.png": "a.png", "recon_b.png": "recon_b.png", "b.png": "b.webp"}
    assert not pairs.ambiguous


def test_nothing_is_guessed(paired):
    sources = ["a.jpg", "a.png", "b.jpg", "one/c.png", "two/c.png"]
    pairs = paired(sources, ["a.webp", "b.png", "b.webp", "c.png", "d.png"])
    assert pairs.matched == {}
    assert pairs.unmatched_sources == []
    assert pairs.unmatched_reconstructions == ["d.png"]
    assert pairs.ambiguous["sources/a.jpg"] == pairs.ambiguous["sources/a.png"] == ["a.webp"]
    assert pairs.ambiguous["reconstructions/a.webp"] == ["a.jpg", "a.png"]
    assert pairs.ambiguous["sources/b.jpg"] == ["b.png", "b.webp"]
    assert set(pairs.ambiguous) == {f"sources/{n}" for n in sources} | {
        f"reconstructions/{n}" for n in ("a.webp", "b.png", "b.webp", "c.png")
    }


def test_names_do_not_wander_between_folders(paired):
    pairs = paired(["one/x.png", "two/x.png"], ["one/x.jpg", "two/x.png"])
    assert pairs.matched == {"one/x.png": "one/x.jpg", "two/x.png": "two/x.png"}


def test_what_is_recorded_goes_before_names(tmp_path, paired):
    """Equal names would pair the source a.jpg.png with the reconstruction of a.jpg."""
    rows = [{"name": "a.jpg", "reconstruction": "a.jpg.png"}, {"name": "a.jpg.png", "reconstruction": "a.jpg.png.png"}]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/captions.json").write_text(json.dumps([*rows, {"name": "gone.png", "reconstruction": "gone.png"}]))
    pairs = paired(["a.jpg", "a.jpg.png", "c.png"], ["a.jpg.png", "a.jpg.png.png", "c.png"])
    assert pairs.matched == {"a.jpg": "a.jpg.png", "a.jpg.png": "a.jpg.png.png", "c.png": "c.png"}


@pytest.mark.parametrize("content", ["no JSON", "[3]", '{"a.jpg": "a caption"}', '[{"name": "a.jpg", "reconstruction": 3}]'])
def test_captions_of_other_programs_do_not_matter(tmp_path, paired, content):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/captions.json").write_text(content)
    assert paired(["a.jpg"], ["a.jpg.png"]).matched == {"a.jpg": "a.jpg.png"}
