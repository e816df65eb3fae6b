import csv
import math

import numpy as np
import pytest
from PIL import Image

from tests.bench.pictures import shapes
from uae.bench.__main__ import main
from uae.bench.paired import sign_test
from uae.bench.report.published import TABLES, number, published
from uae.bench.result import Case, cases_of, read_result, write_result
from uae.metrics.intervals import bootstrap, wilson


def score(right, n):
    return dict(zip(("value", "low", "high"), wilson(right, n), strict=True)) | {"n": n}


def understanding(folder, system, right, name="MMT-Bench (val_mi) [lmms-eval]", questions="q", backend=None):
    """A result of 20 questions; ``right`` says which."""
    names = ("small_object_detection", "person_reid")
    everything = [Case(str(i), float(i in right), group=names[i % 2]) for i in range(20)]
    alike = [Case(case.name, case.value) for case in everything]
    cases = {"overall": alike, "meta-task localization": everything, names[0]: alike[::2], names[1]: alike[1::2]}
    odd = len([i for i in right if i % 2])
    scores = {"overall": score(len(right), 20), "meta-task localization": score(len(right), 20),
              "person_reid": score(odd, 10), "small_object_detection": score(len(right) - odd, 10)}  # fmt: skip
    path = folder / f"{system}.json"
    inputs = {"questions": questions, "file": system}
    write_result(path, name, system, scores, backend or {"harness": "lmms-eval"}, inputs, cases)
    return path


@pytest.fixture
def before_after(tmp_path):
    return understanding(tmp_path, "before", {0, 1, 3}), understanding(tmp_path, "after", {0, 1, 2, 4, 6, 8, 10, 12, 5, 7})


def report(*words):
    main(["report", *map(str, words)])


def test_known_answers(before_after, tmp_path, capsys):
    report(*before_after, "--paper", "--output", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")}
    small = wilson(7, 10)
    assert rows["small_object_detection"][2] == f"70.00 [{100 * small.low:.2f}, {100 * small.high:.2f}] n=10"
    assert rows["small_object_detection"][3].startswith("+60.00 [")
    assert rows["small_object_detection"][3].endswith(f"n=10 p={2 / 2**6:.2g}")  # six better, none worse
    assert rows["overall"][3].startswith("+35.00 [")
    assert rows["overall"][3].endswith(f"n=20 p={sign_test(8, 1):.2g}")
    assert rows["small_object_detection"][4:] == ["5.00", "45.00"]
    assert rows["person_reid"][4:] == ["15.00", "75.00"]
    titles = text.splitlines()[2]
    assert "after - before" in titles
    assert "paper: Qwen2.5-VL-3B + Unified-GRPO" in titles
    assert "measured by its authors, not by us" in text
    assert "1 of 20" in text


def test_the_interval_is_that_of_the_paired_differences(before_after, tmp_path):
    report(*before_after, "--output", tmp_path / "r.csv", "--baseline", before_after[1])
    with (tmp_path / "r.csv").open() as file:
        rows = {(row["score"], row["system"]): row for row in csv.DictReader(file)}
    one = rows["overall", "before"]
    ours, other = ({case.name: case.value for case in cases_of(read_result(path))["overall"]} for path in before_after)
    gap = bootstrap(np.array([ours[key] - other[key] for key in sorted(ours)]), clusters_N=np.array(sorted(ours)))
    assert [float(one[f"difference{end}"]) for end in ("", "_low", "_high")] == pytest.approx([100 * x for x in gap])
    assert one["difference_to"] == "after"
    assert rows["overall", "after"]["difference"] == ""
    assert {row["source"] for row in rows.values()} == {"measured"}
    macro = rows["meta-task localization", "before"]
    assert float(macro["difference"]) == pytest.approx(100 * (-6 / 10 - 1 / 10) / 2)
    assert macro["p"] == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"questions": "other"}, "are not compared: other questions"),
        ({"backend": {"harness": "VLMEvalKit"}}, "are not compared: other harness (VLMEvalKit, lmms-eval)"),
        ({"name": "MMT-Bench (val) [x]"}, "not the same, so not in one table: MMT-Bench (val_mi) [lmms-eval], MMT-Bench (val) [x]"),
    ],
)
def test_what_was_measured_differently_is_said_and_not_subtracted(tmp_path, capsys, change, said):
    report(understanding(tmp_path, "a", {1}), understanding(tmp_path, "b", {1, 2}, **change))
    shown = capsys.readouterr().out
    assert said in shown
    assert "b - a" not in shown


def test_without_cases_there_is_no_interval(tmp_path, capsys):
    for name, value in (("a", 0.5), ("b", 0.75)):
        scores = {"overall": {"value": value, "low": value, "high": value, "n": 8}}
        write_result(tmp_path / f"{name}.json", "GenEval [hf]", name, scores, {"name": "hf"}, {"prompts": "x"})
    report(tmp_path / "a.json", tmp_path / "b.json", "--paper")
    shown = capsys.readouterr().out
    assert "+25.00 (not paired)" in shown
    assert "no cases to pair" in shown
    assert "others, named in brackets, are not proven equal" in shown


def test_geneval_is_paired_by_task_with_prompts_as_clusters(tmp_path, capsys):
    right = {"a": [0] * 12 + [1] * 4, "b": [1] * 4 + [0] * 8 + [1] * 4}  # four images per prompt
    for name, correct in right.items():
        tags = ["colors"] * 12 + ["counting"] * 4
        cases = [Case(f"{i // 4}/{i % 4}", float(correct[i]), f"{i // 4}", tag) for i, tag in enumerate(tags)]
        colors, counting = sum(correct[:12]) / 12, sum(correct[12:]) / 4
        values = {"overall": ((colors + counting) / 2, 16), "colors": (colors, 12)}
        scores = {key: {"value": value, "low": 0.0, "high": 1.0, "n": n} for key, (value, n) in values.items()}
        write_result(tmp_path / f"{name}.json", "GenEval [hf]", name, scores, {"name": "hf"}, {"prompts": "x"},
                     {"overall": cases, "colors": cases[:12]})  # fmt: skip
    report(tmp_path / "a.json", tmp_path / "b.json")
    shown = capsys.readouterr().out
    assert "+16.67 [+0.00, +50.00] n=16 |" in shown  # of two tasks; over images it would be 25
    assert "+33.33 [+0.00, +100.00] n=12 |" in shown  # of three prompts; of twelve images it would end near 60


def test_formats(before_after, tmp_path, capsys):
    report(*before_after, "--paper", "--output", tmp_path / "r.tex", "--plot", tmp_path / "r.png", "--scores", "small|over")
    text = (tmp_path / "r.tex").read_text()
    assert text.count("\\begin{tabular}{lrrrrr}") == 1
    lines = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {line.count(" & ") for line in lines} == {5}
    assert "small\\_object\\_detection & " in text
    assert "person" not in text
    picture = np.asarray(Image.open(tmp_path / "r.png").convert("RGB"))
    assert picture.shape[1] == 1200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(SystemExit):
        report(*before_after, "--output", tmp_path / "r.docx")
    assert ".md, .csv, .tex" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "results"), (("nothing.json",), "no result at"), (("{0}", "{0}copy"), "are of 'before'"),
        (("{0}", "--baseline", "them"), "none of the systems before"), (("{0}", "--scores", "zzz"), "finds no score"),
        (("{0}", "--scores", "["), "no regular expression"), (("{0}", "--plot", "a.txt"), "--plot 'a.txt': allowed"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(before_after, capsys, words, said):
    copy = before_after[0].with_name("before.jsoncopy")
    copy.write_text(before_after[0].read_text())
    with pytest.raises(SystemExit):
        report(*(word.format(before_after[0]) for word in words))
    assert said in capsys.readouterr().err


def test_sign_test():
    assert sign_test(0, 0) == 1.0
    assert sign_test(8, 0) == pytest.approx(2 / 256)
    assert sign_test(3, 5) == sign_test(5, 3) == pytest.approx(2 * sum(math.comb(8, k) for k in range(4)) / 256)


def test_published_numbers_are_consistent_and_only_for_the_papers_inputs():
    for row in TABLES["unified_bench_1"]:
        parts = [row.scores[name] for name in ("clip", "longclip", "dinov2", "dinov3") if name in row.scores]
        if parts:
            assert np.mean(parts) == pytest.approx(row.scores["overall"], abs=1.1e-4)
    assert [row.model for row in published("unified_bench_1")[0]][-1] == "UAE"
    for name in ("unified_bench_1 (clip, judge)", "GenEval (own prompts) [hf]", "DPG-Bench (own questions) fixed [hf]", "other"):
        assert published(name)[0] == []
    for name in ("GenEval [hf]", "GenEval (rewritten) [mmdet]", "DPG-Bench official [m]", "MMBench (dev_en) [x]", "MMMU [x]"):
        assert published(name)[0]
        assert published(name)[1]
    clip = TABLES["unified_bench_1"][-1]
    assert number(clip, "longclip") == (pytest.approx(0.9435), True)
    assert number(clip, "overall") == (pytest.approx(0.8609), False)
    assert number(clip, "floor/clip") is None


def test_results_of_score_end_to_end(tmp_path, capsys):
    for i in range(6):
        for folder, shift in (("sources", 0), ("good", 2), ("bad", 20)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(shapes(40, 40, 10 * i + shift)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "encoders.yaml").write_text("layout: {class_path: uae.encoders.LayoutEncoder}\nheld_out: []\n")
    for name in ("good", "bad"):
        words = ["--sources", tmp_path / "sources", "--reconstructions", tmp_path / name, "--output", tmp_path / f"{name}.json"]
        main(["score", *map(str, [*words, "--encoders", tmp_path / "encoders.yaml", "--cache", "false", "--device", "cpu"])])
    capsys.readouterr()
    report(tmp_path / "good.json", tmp_path / "bad.json", "--paper", "--output", tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "overall"]
    good, bad = (np.array([row["overall"] for row in read_result(tmp_path / f"{name}.json")["per_image"]]) for name in ("good", "bad"))
    gap = bootstrap(bad - good)
    assert float(rows[0]["value"]) == pytest.approx(100 * good.mean())
    assert [float(rows[1][f"difference{end}"]) for end in ("", "_low", "_high")] == pytest.approx([100 * x for x in gap])
    assert rows[1]["difference_n"] == "6"
    shown = capsys.readouterr().out
    assert "unified_bench_1 (layout)" in shown
    assert "the paper has no number for this benchmark" in shown
