import csv
import json
import random

import pytest

from uae.bench.__main__ import main
from uae.bench.result import read_result
from uae.bench.understanding.answer_parsing import choice, open_answer
from uae.metrics.intervals import wilson

PETS = {"A": "cat", "B": "dog", "C": "hamster", "D": "goldfish"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("B.", "B"), (" (C) ", "C"), ("(A) is wrong, (D) is right", "D"), ("The answer is C", "C"),
        ("A or B, so B it is", "B"), ("B. dog", "B"), ("I first thought (A) but B", "A"), ("dog", "B"), ("Dog.", "B"),
        ("what is seen here is a dog, not a hamster", "C"), ("it is a DOG and nothing else here", "B"),
        ("", None), ("yes", None), ("E", None), ("catalogue", None), ("NABA. no", None), ("a dog", None),
    ],
)  # fmt: skip
def test_letters_are_read_by_the_rules_and_never_guessed(said, letter):
    assert choice(said, PETS) == letter


@pytest.mark.parametrize(
    ("said", "truths", "right"),
    [
        ("The total is 1,024.", ["1024"], True), ("x = 3.1415", ["3.14"], True), ("x = 3.2", ["3.14"], False),
        ("It says so. Therefore Paris", ["paris"], True), ("the answer is 12 apples", ["12"], True), ("12", ["1"], False),
        ("so the answer is mitochondria", ["Mitochondria", "cell"], True), ("", ["5"], False), ("12 minus 5 gives 7", ["7"], True),
        ("therefore Paris \nor so", ["paris"], True),
        ("The result is 5\nno, the result is 6", ["5"], True), ("1e3", ["1000"], True), ("-5", ["5"], False),
    ],
)  # fmt: skip
def test_open_answers(said, truths, right):
    assert open_answer(said, truths) is right


def write_tsv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rotations(index, right, said, **more):
    """The four rows of a question of MMBench whose first option was the right one; ``said`` per row."""
    texts = [right, "x1", "x2", "x3"]
    rows = []
    for turn in range(4):
        turned = texts[-turn:] + texts[:-turn] if turn else texts
        options = dict(zip("ABCD", turned, strict=True))
        letter = next(name for name, text in options.items() if text == right)
        rows.append({"index": index + turn * 10**6, "question": f"q{index}", **options, "answer": letter, **more,
                     "prediction": letter if said[turn] else "ABCD"[("ABCD".index(letter) + 1) % 4]})  # fmt: skip
    return rows


@pytest.fixture
def score(tmp_path):
    def run(*words, output="result.json"):
        main(["understanding", *map(str, words), "--output", str(tmp_path / output)])
        return read_result(tmp_path / output)

    return run


def test_mmbench_counts_a_question_when_every_rotation_is_right(tmp_path, score, capsys):
    said = {1: [1, 1, 1, 1], 2: [1, 1, 1, 0], 3: [0, 1, 1, 1], 4: [1, 1, 1, 1], 5: [1, 1, 1, 1]}
    groups = {i: {"category": "ocr" if i < 3 else "color", "L2-category": "fine"} for i in said}
    rows = [row for i in said for row in rotations(i, f"t{i}", said[i], **groups[i])]
    rows = rows[:-1]  # question 5 lacks a rotation
    random.Random(0).shuffle(rows)
    result = score("--benchmark", "mmbench", "--predictions", write_tsv(tmp_path / "p.tsv", rows), "--variant", "dev_en_v11")
    values = {name: (one["value"], one["n"]) for name, one in result["scores"].items()}
    assert values == {"overall": (0.4, 5), "vanilla": (0.8, 5), "ability fine": (0.4, 5), "color": (1 / 3, 3), "ocr": (0.5, 2)}
    assert result["benchmark"] == "MMBench (dev_en_v11) [VLMEvalKit]"
    assert result["incomplete"] == ["5"]
    assert "1 questions lack rotations: wrong (5)" in capsys.readouterr().out
    assert result["chance"]["overall"]["random"] == pytest.approx((4 * 4**-4 + 4**-3) / 5)


def mmt(n=20, right=9):
    names = ("small_object_detection", "person_reid", "ocr_text")
    return [
        {"index": 100 * k + i, "question": f"what is {k}/{i}", **PETS, "answer": "ABCD"[i % 4], "category": name,
         "l2-category": "localization" if k < 2 else "ocr", "prediction": "ABCD"[i % 4] if i < (right, n, 0)[k] else "who knows"}
        for k, name in enumerate(names) for i in range(n - 10 * (k == 1))
    ]  # fmt: skip


def test_mmt_bench_per_subtask(tmp_path, score, capsys):
    rows = mmt()
    file = tmp_path / "p.json"
    file.write_text(json.dumps(rows))
    result = score("--benchmark", "mmt", "--predictions", file, "--subtasks", "SMALL.?object|person.?re.?id")
    scores, shown = result["scores"], capsys.readouterr().out
    assert scores["overall"] == {"value": 19 / 50, "n": 50, **dict(zip(("low", "high"), wilson(19, 50)[1:], strict=True))}
    assert scores["small_object_detection"] == {"value": 0.45, "n": 20, **dict(zip(("low", "high"), wilson(9, 20)[1:], strict=True))}
    assert scores["meta-task localization"]["value"] == pytest.approx((0.45 + 1.0) / 2)  # of subtasks, not of questions: 19/30
    assert scores["selected subtasks"]["value"] == pytest.approx(19 / 30)
    assert result["subtasks"]["matched"] == {"person_reid": 10, "small_object_detection": 20}
    assert "2 subtasks match 'SMALL.?object|person.?re.?id': person_reid (n = 10), small_object_detection (n = 20)" in shown
    assert "| ocr_text |" not in shown
    assert result["unparsed"] == 31
    assert "31 of 50 answers name no option: wrong" in shown
    assert result["chance"]["overall"] == {"random": 0.25, "frequent": pytest.approx(13 / 50)}
    rows[0]["prediction"] = "D"
    file.write_text(json.dumps(rows))
    again = score("--benchmark", "mmt", "--predictions", file, output="b.json")
    assert again["inputs"]["questions"] == result["inputs"]["questions"]
    assert again["inputs"]["p.json"] != result["inputs"]["p.json"]


def sample(doc_id, said, target, text, **more):
    """A line as lmms-eval 0.7.3 writes it: the document is left out, metrics stay."""
    return {"doc_id": doc_id, "target": target, "filtered_resps": said, "token_counts": [None], "doc_hash": "x", "input": text, **more}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_of_lmms_eval_get_their_subtask_from_the_questions(tmp_path, score, capsys):
    questions = [{k: v for k, v in row.items() if k != "prediction"} for row in mmt()]
    text = "Question: <image>\n{question}\nA: cat\nB: dog\nC: hamster\nD: goldfish\nAnswer"
    said = [row["prediction"] for row in mmt()]
    rows = [sample(i, said[i], q["answer"], text.format(**q), accuracy={"overall": 0.0}) for i, q in enumerate(questions)]
    random.Random(1).shuffle(rows)
    file, asked = write_lines(tmp_path / "s.jsonl", rows), write_lines(tmp_path / "q.jsonl", questions)
    result = score("--benchmark", "mmt", "--predictions", file, "--questions", asked)
    assert result["benchmark"] == "MMT-Bench [lmms-eval]"
    assert result["scores"]["small_object_detection"]["value"] == 0.45
    assert result["scores"]["overall"]["n"] == 50
    same = [{**question, "question": "what"} for question in questions]  # told apart by their answer alone
    for others in (same[1:] + same[:1], [{**question, "question": "why"} for question in questions], questions[:-1]):
        write_lines(asked, others)
        with pytest.raises(SystemExit):
            score("--benchmark", "mmt", "--predictions", file, "--questions", asked)
        assert "give the" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score("--benchmark", "mmt", "--predictions", file)


def test_mmmu_samples_are_read_again_not_taken_as_the_harness_parsed_them(tmp_path, score):
    def row(i, said, answer, kind="multiple-choice"):
        name = f"validation_{'Art_Theory' if i < 2 else 'Math'}_{i}"
        meta = {"id": name, "subdomain": name[11:-2], "question_type": kind, "answer": answer, "parsed_pred": [answer]}
        text = "How many?" if kind == "open" else "What?\nA. one of them\nB. another\n\nAnswer"
        return sample(i, [said], answer, text, mmmu_acc=meta)

    rows = [row(0, "B", "B"), row(1, "no idea", "A"), row(2, "the answer is 7", "7", "open"), row(3, "(A)", "B")]
    files = write_lines(tmp_path / "a.jsonl", rows[:2]), write_lines(tmp_path / "b.jsonl", rows[2:])
    result = score("--benchmark", "mmmu", "--predictions", *files)
    assert {name: one["value"] for name, one in result["scores"].items()} == {"overall": 0.5, "Art_Theory": 0.5, "Math": 0.5}
    assert result["unparsed"] == 1  # counted as wrong although the harness drew the right letter


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[3].pop("answer"), "p.jsonl line 4: has no answer to compare with"),
        (lambda rows: rows[3].pop("prediction"), "p.jsonl line 4: has none of prediction"),
        (lambda rows: rows[3].update(answer="G"), "p.jsonl line 4: has the answer 'G', which is none of its options (A, B, C, D)"),
        (lambda rows: rows[3].update(index=0), "question '0' is answered twice"),
        (lambda rows: rows.insert(3, [1]), "p.jsonl line 4 is no row"),
        (lambda rows: [row.pop("category") for row in rows], "--questions"),
    ],
)
def test_bad_rows_are_named(tmp_path, score, capsys, change, said):
    rows = mmt()
    change(rows)
    with pytest.raises(SystemExit):
        score("--benchmark", "mmt", "--predictions", write_lines(tmp_path / "p.jsonl", rows))
    assert said in capsys.readouterr().err


def test_bad_files_are_named(tmp_path, score, capsys):
    (tmp_path / "p.jsonl").write_text('{"index": 1\n')
    (tmp_path / "p.xlsx").write_bytes(b"PK")
    write_lines(tmp_path / "good.jsonl", mmt())
    for words, said in (
        (["--predictions", tmp_path / "p.jsonl"], "line 1 is no JSON"), (["--predictions", tmp_path / "p.xlsx"], ".tsv"),
        (["--predictions", tmp_path / "gone.tsv"], "no file"),
        (["--predictions", tmp_path / "good.jsonl", "--subtasks", "nothing"], "finds none of 3 subtasks"),
        (["--predictions", tmp_path / "good.jsonl", "--subtasks", "("], "no regular expression"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            score("--benchmark", "mmt", *words)
        assert said in capsys.readouterr().err
