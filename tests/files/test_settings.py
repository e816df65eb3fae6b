import pytest
import yaml

from uae.files.settings import RepeatedKeyError, read_settings


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer: 1\nmodel: 2\ntrainer: 3\n", "trainer", (1, 3)),
        ("model:\n  init_args:\n    group: 4\n    seed: 1\n    group: 8\n", "group", (3, 5)),  # inside
        ("callbacks:\n- a: 1\n- {b: 1,\n   b: 2}\n", "b", (3, 4)),  # in a list, in braces
        ("'lr': 1\nlr: 2\n", "lr", (1, 2)),  # quoted or not
        ("{lr: 1, lr}", "lr", (1, 1)),  # without a value
        ("? lr\n? lr\n", "lr", (1, 2)),
    ],
)
def test_a_key_given_twice_is_named_with_both_lines(tmp_path, text, key, lines):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(RepeatedKeyError) as caught:
        read_settings(tmp_path / "run.yaml")
    said = f"'{tmp_path}/run.yaml' has the key '{key}' twice, in line {lines[0]} and in line {lines[1]}; remove one of them"
    assert str(caught.value) == said


def test_the_same_key_in_several_mappings_is_no_repetition(tmp_path):
    text = "a: &one {lr: 1, next: {lr: 2}}\nb: [*one, *one, {lr: 3}]\nc: {<<: *one, lr: 4}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert read_settings(tmp_path / "run.yaml") == yaml.safe_load(text)
