import shutil
from pathlib import Path

import pytest
import torch

from uae.bench.score.command import benchmark
from uae.bench.score.encoder_sets import encoder_configuration, encoder_record, paper_encoders, read_encoders
from uae.encoders import HFEncoder, LayoutEncoder
from uae.rehearsal.encoders import ENCODERS
from uae.weights.placement import Placement

FILES = Path(__file__).parents[3] / "configs" / "bench"


def test_the_files_are_what_they_say():
    default = paper_encoders()
    written = read_encoders(FILES / "official.yaml")
    assert {name: encoder_configuration(one) for name, one in written.encoders.items()} == {
        name: encoder_configuration(one) for name, one in default.encoders.items()
    }
    assert written.held_out == default.held_out == read_encoders(FILES / "held_out.yaml").held_out == ("dinov2", "dinov3")
    assert set(read_encoders(FILES / "held_out.yaml").encoders) == {"dinov2", "dinov3"}
    assert benchmark(written) == "unified_bench_1"
    assert benchmark(read_encoders(FILES / "tiny.yaml")) == "unified_bench_1 (clip, judge, layout)"
    assert all(one._loaded is None for one in written.encoders.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "there must be an encoder"),
        ("held_out: [x]\na: {class_path: uae.encoders.LayoutEncoder}\n", "must name encoders of the file"),
        ("overall: {class_path: uae.encoders.LayoutEncoder}\n", "are taken"),
        ("a: {class_path: uae.encoders.LayoutEncoder, init_args: {cels: 3}}\n", "cels"),
        ("a: {class_path: uae.encoders.LayoutEncoder}\n" * 2, "the key 'a' twice, in line 1 and in line 2"),
        ("a: [", "cannot be read: while parsing a flow"),
    ],
)
def test_mistakes_say_what_is_wrong(tmp_path, text, said):
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        read_encoders(tmp_path / "set.yaml")
    assert "set.yaml" in str(raised.value)


def test_a_fingerprint_is_of_what_is_computed_not_of_where_it_lies(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ENCODERS["facebook/dinov2-large"](tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    mark = HFEncoder(str(tmp_path / "a"), "cls").fingerprint()
    assert HFEncoder(str(tmp_path / "b"), "cls").fingerprint() == mark
    half = HFEncoder(str(tmp_path / "b"), "cls", Placement(dtype="bfloat16")).fingerprint()

    processor = tmp_path / "b" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("0.485", "0.486"))
    other_pixels = HFEncoder(str(tmp_path / "b"), "cls").fingerprint()

    moved = HFEncoder(str(tmp_path / "a"), "cls").load()
    with torch.no_grad():
        next(moved._loaded.module.parameters()).view(-1)[0] += 1e-6
    assert len({mark, half, other_pixels, moved.fingerprint()}) == 4
    assert encoder_record(LayoutEncoder(3))["fingerprint"] != encoder_record(LayoutEncoder(4))["fingerprint"]
