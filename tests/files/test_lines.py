"""JSON Lines of any program: strings may hold every line separator of Unicode, and files may begin with a byte-order mark."""

import json

import pytest

from callbacks.predictions import finished
from uae.bench.geneval import plus
from uae.bench.geneval.prompts import read_prompts
from uae.bench.judging.captions import read_captions
from uae.bench.ledger import Ledger
from uae.bench.understanding.samples import read_samples
from uae.data.captions import CaptionFiles
from uae.data.skipped import Skipped
from uae.files.lines import lines_of, read_lines
from uae.models.renderers.external import FolderRenderer

TEXT = "a sign\u2028it says\u2029\x85\x0b\x0c\x1c\x1d\x1ehi"
OBJECTS = [{"class": "cat", "count": 1}]


def geneval(file):
    return read_prompts(file)[0]["prompt"]


def folder_renderer(file):
    drawn = FolderRenderer(str(file.parent), 8, 8)
    drawn.check()
    return next(iter(drawn._files))


def predictions(file):
    (file.parent / "0.png").touch()
    return finished(file.parent)["0.png"]["caption"]


def ledger(file):
    return Ledger(file).rows["0"]["answer"]


def skipped(file):
    rows = Skipped()
    rows.write_to(file.parent, 0)
    rows[TEXT] = "it is there already"
    (line,) = lines_of(file.read_bytes().decode("utf-8-sig"))
    return json.loads(line)["name"]


def geneval_plus(file):
    return plus.read_lines(file)[0]["prompt"]


def captions_of_a_judge(file):
    return read_captions(file)["a"]


def captions_of_a_folder(file):
    return CaptionFiles(file.parent)["0.png"]


READERS = {
    geneval: ("prompts.jsonl", [{"tag": "single_object", "include": OBJECTS, "prompt": TEXT}]),
    geneval_plus: ("prompts.jsonl", [{"tag": "color", "include": OBJECTS, "prompt": TEXT}]),
    captions_of_a_judge: ("captions.jsonl", [{"name": "a", "caption": TEXT}, {"name": "b", "caption": "x"}]),
    ledger: ("answers.jsonl", [{"made_by": {"name": "m"}}, {"key": "0", "answer": TEXT}]),
    captions_of_a_folder: ("metadata.jsonl", [{"file_name": "0.png", "text": TEXT}]),
    folder_renderer: ("metadata.jsonl", [{"file_name": "0.png", "text": TEXT}]),
    predictions: ("captions.rank0.jsonl", [{"name": "0.png", "caption": TEXT, "reconstruction": "0.png"}]),
    skipped: ("skipped.rank0.jsonl", [{"name": TEXT, "reason": "x"}]),
}


OURS = (predictions, skipped)  # only this project writes these files, and it writes no mark


@pytest.mark.parametrize(
    ("read", "mark"), [(read, mark) for read in READERS for mark in ("utf-8", "utf-8-sig") if mark == "utf-8" or read not in OURS]
)
def test_every_reader_takes_separators_and_byte_order_marks(tmp_path, read, mark):
    name, rows = READERS[read]
    (tmp_path / "0.png").touch()
    (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding=mark)
    assert read(tmp_path / name) == TEXT


def test_samples_of_lmms_eval(tmp_path):
    row = {"doc_id": 0, "input": TEXT, "target": "A", "accuracy": {"overall": 1.0, "ocr": 1.0}}
    asked = {"index": 0, "question": TEXT, "answer": "A", "category": "ocr_text", "l2-category": "ocr"}
    for name, line in (("s.jsonl", row), ("q.jsonl", asked)):
        (tmp_path / name).write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    (question,) = read_samples("mmt", [tmp_path / "s.jsonl"], tmp_path / "q.jsonl")
    assert question.prompt == TEXT


def test_text_with_a_mark_of_any_width(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "x").write_text(f"ü{TEXT}\n\nb", encoding=encoding)
        assert read_lines(tmp_path / "x") == [f"ü{TEXT}", "", "b"]
    assert lines_of("") == []
    (tmp_path / "x").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="utf-8"):
        read_lines(tmp_path / "x")
