"""Files in the layout that lmms-eval 0.7.2 writes with --log_samples, with known answers."""

import json
import random
from pathlib import Path

import pytest

from uae.bench.__main__ import main
from uae.bench.result import read_result
from uae.metrics.intervals import wilson


@pytest.fixture
def score(tmp_path):
    def run(*words, output="result.json"):
        main(["understanding", *map(str, words), "--output", str(tmp_path / output)])
        return read_result(tmp_path / output)

    return run


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(doc_id, said, target, text, **metrics):
    """A line as lmms-eval writes it: the document is left out, metrics stay."""
    return {"doc_id": doc_id, "target": target, "filtered_resps": said, "doc_hash": "x", "input": text, **metrics}


def mmt(right=(9, 10, 0)):
    """Questions of three subtasks in two meta-tasks, and lmms-eval's samples: of each subtask the first ones are right."""
    names, sizes = ("small_object_detection", "person_reid", "ocr_text"), (20, 10, 20)
    questions, samples = [], []
    for k, name in enumerate(names):
        group = "localization" if k < 2 else "ocr"
        for i in range(sizes[k]):
            asked = {"index": 100 * k + i, "question": f"what is {k}/{i}", "answer": "ABCD"[i % 4], "category": name}
            text = f"Question: <image>\n{asked['question']}\nA: cat\nB: dog\nAnswer the question using a single character"
            accuracy = dict.fromkeys(("overall", group), float(i < right[k]))
            samples.append(sample(len(questions), "B", asked["answer"], text, accuracy=accuracy, submission={}))
            questions.append(asked | {"l2-category": group})
    return questions, samples


@pytest.fixture
def mmt_files(tmp_path):
    """The samples in any order, and the questions in that of the split."""

    def write(questions=None, samples=None, **changes):
        given = mmt(**changes)
        rows = list(samples or given[1])
        random.Random(1).shuffle(rows)
        return write_lines(tmp_path / "p.jsonl", rows), write_lines(tmp_path / "q.jsonl", questions or given[0])

    return write


def test_mmt_bench_per_subtask(mmt_files, score, capsys):
    samples, questions = mmt_files()
    words = ["--benchmark", "mmt", "--predictions", samples, "--questions", questions]
    result = score(*words, "--subtasks", "SMALL.?object|person.?re.?id", "--variant", "val")
    scores, shown = result["scores"], capsys.readouterr().out
    assert result["benchmark"] == "MMT-Bench (val) [lmms-eval]"
    assert scores["overall"] == {"value": 19 / 50, "n": 50, **dict(zip(("low", "high"), wilson(19, 50)[1:], strict=True))}
    assert scores["small_object_detection"] == {"value": 0.45, "n": 20, **dict(zip(("low", "high"), wilson(9, 20)[1:], strict=True))}
    assert scores["meta-task localization"]["value"] == pytest.approx((0.45 + 1.0) / 2)  # of subtasks, not of questions: 19/30
    assert scores["selected subtasks"]["value"] == pytest.approx(19 / 30)
    assert result["subtasks"]["matched"] == {"person_reid": 10, "small_object_detection": 20}
    assert "2 subtasks match 'SMALL.?object|person.?re.?id': person_reid (n = 10), small_object_detection (n = 20)" in shown
    assert "| ocr_text |" not in shown
    samples, _ = mmt_files(right=(8, 10, 0))
    again = score(*words, output="b.json")
    assert again["inputs"]["questions"] == result["inputs"]["questions"]
    assert again["inputs"]["p.jsonl"] != result["inputs"]["p.jsonl"]


def test_the_questions_must_be_those_that_were_asked(mmt_files, tmp_path, score, capsys):
    questions, samples = mmt()
    same = [{**question, "question": "what"} for question in questions]  # told apart by their answer alone
    for others in (same[1:] + same[:1], [{**question, "question": "why"} for question in questions], questions[:-1]):
        files = mmt_files(others)
        with pytest.raises(SystemExit):
            score("--benchmark", "mmt", "--predictions", files[0], "--questions", files[1])
        assert "give the questions of the same split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score("--benchmark", "mmt", "--predictions", write_lines(tmp_path / "s.jsonl", samples))
    assert "--questions" in capsys.readouterr().err


def mmmu(number, answer, parsed, kind="multiple-choice"):
    name = f"validation_{'Art_Theory' if number < 2 else 'Math'}_{number}"
    metric = {"id": name, "subdomain": name[11:-2], "question_type": kind, "answer": answer, "parsed_pred": parsed}
    return sample(number, "whatever", answer, "What?", mmmu_acc=metric, mmmu_acc_pass_at_k=metric, submission={name: parsed[0]})


def test_mmmu_counts_what_lmms_eval_understood(tmp_path, score):
    """Letters, numbers to two decimals and words count; "X" is what lmms-eval writes where it found no letter."""
    rows = [mmmu(0, "B", ["B"]), mmmu(1, "A", ["X"]), mmmu(3, "B", ["C", "B"])]
    rows += [mmmu(2, "7", ["7.0"], "open"), mmmu(4, "Oak", ["elm"], "open")]
    files = write_lines(tmp_path / "a.jsonl", rows[:2]), write_lines(tmp_path / "b.jsonl", rows[2:])
    result = score("--benchmark", "mmmu", "--predictions", *files)
    values = {name: (one["value"], one["n"]) for name, one in result["scores"].items()}
    assert values == {"overall": (0.6, 5), "Art_Theory": (0.5, 2), "Math": (2 / 3, 3)}
    assert result["benchmark"] == "MMMU [lmms-eval]"


def test_two_models_are_paired_question_by_question(mmt_files, score, tmp_path, capsys):
    for system, right in (("before", (3, 10, 0)), ("after", (9, 10, 0))):
        samples, questions = mmt_files(right=right)
        score("--benchmark", "mmt", "--predictions", samples, "--questions", questions, "--system", system, output=f"{system}.json")
    main(["report", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| small_object_detection")]
    assert lines[-1].rstrip(" |").endswith(f"n=20 p={2 / 2**6:.2g}")  # six better, none worse


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[3].pop("accuracy"), "p.jsonl line 4 lacks what lmms-eval writes for mmt (KeyError 'accuracy')"),
        (lambda rows: rows[3].update(accuracy=1.0), "p.jsonl line 4 lacks what lmms-eval writes for mmt"),
        (lambda rows: rows[3].update(doc_id=0), "p.jsonl line 4 is not question 0"),
        (lambda rows: rows.insert(3, rows[2]), "question '2' is answered twice"),
        (lambda rows: rows.insert(3, [1]), "p.jsonl line 4 is not a JSON object"),
        (lambda rows: rows.clear(), "no line in"),
    ],
)
def test_bad_rows_are_named(tmp_path, score, capsys, change, said):
    questions, rows = mmt()
    change(rows)
    files = write_lines(tmp_path / "p.jsonl", rows), write_lines(tmp_path / "q.jsonl", questions)
    with pytest.raises(SystemExit):
        score("--benchmark", "mmt", "--predictions", files[0], "--questions", files[1])
    assert said in capsys.readouterr().err


def test_bad_files_and_patterns_are_named(tmp_path, mmt_files, score, capsys):
    (tmp_path / "broken.jsonl").write_text('{"index": 1\n')
    good = ["--predictions", *mmt_files()[:1], "--questions", tmp_path / "q.jsonl"]
    for words, said in (
        (["--predictions", tmp_path / "broken.jsonl"], "broken.jsonl line 1 is not a JSON object"),
        (["--predictions", tmp_path / "gone.jsonl"], "does not exist"),
        ([*good, "--subtasks", "nothing"], "finds none of 3 subtasks"), ([*good, "--subtasks", "("], "no regular expression"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            score("--benchmark", "mmt", *words)
        assert said in capsys.readouterr().err


def test_files_of_one_name_in_two_folders_are_both_recorded(tmp_path, mmt_files, score):
    samples, questions = mmt_files()
    lines = Path(samples).read_text().split("\n")
    files = [tmp_path / name / "samples.jsonl" for name in ("a", "b")]
    for file, some in zip(files, (lines[:20], lines[20:]), strict=True):
        file.parent.mkdir()
        file.write_text("\n".join(some))
    result = score("--benchmark", "mmt", "--predictions", *map(str, files), "--questions", questions)
    assert {str(file) for file in files} < result["inputs"].keys()
