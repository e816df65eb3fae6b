import csv
import json
import random
import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.bench.geneval.test_detection import picture
from tests.bench.understanding import seeing
from uae.bench.dpg import command as dpg
from uae.bench.dpg.command import cut_tiles
from uae.bench.dpg.rules import COLUMNS, YesNoQuestion, read_questions, score_items, score_tile
from uae.bench.dpg.visual_questions import TransformersAnswerer
from uae.bench.result import read_result

WHOLE, COLOR = "entity - whole (cat)", "attribute - color (cat, red)"


def rows_of(item, questions):
    """number, dependency, tuple."""
    return [(item, number, parents, what, f"is there {number} ?") for number, parents, what in questions]


def written(path, *items):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", *COLUMNS])
        table.writerows(['a, quoted "text"', *row] for rows in items for row in rows)
    return str(path)


def tree(**parents):
    """q1=(), q2=(1,) and so on, in the order given."""
    return {int(name[1:]): YesNoQuestion(name, above, "entity - whole") for name, above in parents.items()}


def yes(*numbers, of):
    return {number: number in numbers for number in of}


# ------------------------------------------------------------------------------------------------------- one tile


@pytest.mark.parametrize("mode", ["official", "fixed"])
def test_without_its_parent_a_question_is_no(mode):
    item = tree(q1=(), q2=(1,), q3=(2,), q4=(), q5=(1, 4))
    assert score_tile("a", item, yes(1, 2, 3, 4, 5, of=item), mode) == 1
    assert score_tile("a", item, yes(2, 3, 4, 5, of=item), mode) == pytest.approx(1 / 5)  # the root is no: all below it too
    assert score_tile("a", item, yes(1, 3, 4, 5, of=item), mode) == pytest.approx(3 / 5)
    assert score_tile("a", item, yes(1, 2, 3, 5, of=item), mode) == pytest.approx(3 / 5)  # one of two parents is enough


def test_the_order_of_the_file_matters_to_the_official_script_alone():
    item = tree(q3=(2,), q2=(1,), q1=())  # children first
    answers = yes(2, 3, of=item)
    assert score_tile("a", item, answers, "official") == pytest.approx(1 / 3)  # 3 saw 2 before 1 made it no
    assert score_tile("a", item, answers, "fixed") == 0


def test_random_trees_against_a_search_of_ancestors():
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randint(1, 8)
        parents = {n: tuple(rng.sample(range(1, n), rng.randint(0, min(2, n - 1)))) for n in range(1, size + 1)}
        order = rng.sample(list(parents), size)
        answers = {n: rng.random() < 0.7 for n in parents}

        def holds(n, parents=parents, answers=answers):
            return answers[n] and all(holds(parent) for parent in parents[n])

        expected = sum(map(holds, parents)) / size
        shuffled = {n: YesNoQuestion("", parents[n], "") for n in order}
        assert score_tile("a", shuffled, answers, "fixed") == pytest.approx(expected)
        sorted_item = {n: YesNoQuestion("", parents[n], "") for n in sorted(order)}
        assert score_tile("a", sorted_item, answers, "official") == pytest.approx(expected)  # parents first: no difference


# ------------------------------------------------------------------------------------------------------ both modes

FIRST = rows_of("first", [(1, "0", WHOLE), (2, "1", COLOR)])
SECOND = rows_of("second", [(1, "0", WHOLE), (2, "0", COLOR), (3, "1, 2", "relation - spatial (cat, dog, left of)")])


def test_the_first_row_is_lost_and_its_item_with_it(tmp_path):
    path = written(tmp_path / "q.csv", FIRST, SECOND)
    official, fixed = read_questions(path, "official"), read_questions(path, "fixed")
    assert list(official["first"]) == [2]
    assert list(fixed["first"]) == [1, 2]
    assert official["second"] == fixed["second"]
    assert fixed["second"][3] == YesNoQuestion("is there 3 ?", (1, 2), "relation - spatial")
    answers = {name: [dict.fromkeys(item, True)] * 4 for name, item in fixed.items()}
    scores = score_items(official, answers, "official")
    assert scores.items == {"second": 1.0}
    assert scores.dropped == {"first": "question 1 is skipped, and others depend on it"}
    assert score_items(fixed, answers, "fixed").items == {"first": 1.0, "second": 1.0}


def test_an_item_whose_first_question_nobody_needs_survives_in_part(tmp_path):
    alone = rows_of("first", [(1, "0", WHOLE), (2, "0", COLOR)])
    path = written(tmp_path / "q.csv", alone, SECOND)
    answers = {"first": [{1: False, 2: True}]}
    assert score_items(read_questions(path, "official"), answers, "official").items == {"first": 1.0}
    assert score_items(read_questions(path, "fixed"), answers, "fixed").items == {"first": 0.5, "second": 0.0}


def test_categories_are_of_the_last_tile_or_of_all_and_never_zeroed(tmp_path):
    path = written(tmp_path / "q.csv", [*rows_of("skipped", [(1, "0", WHOLE)]), *FIRST])
    tiles = [{1: True, 2: True}, {1: True, 2: False}, {1: False, 2: False}, {1: False, 2: True}]
    official = score_items(read_questions(path, "official"), {"first": tiles}, "official")
    fixed = score_items(read_questions(path, "fixed"), {"first": tiles}, "fixed")
    assert official.items["first"] == fixed.items["first"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert official.categories == {"entity - whole": [("first", 0)], "attribute - color": [("first", 1)]}
    assert [answer for _, answer in fixed.categories["attribute - color"]] == [1, 0, 0, 1]
    assert [answer for _, answer in fixed.categories["entity - whole"]] == [1, 1, 0, 0]


def test_a_missing_image_is_left_out_or_counts_nothing(tmp_path):
    path = written(tmp_path / "q.csv", rows_of("skipped", [(1, "0", WHOLE)]), FIRST, SECOND)
    answers = {"second": [{1: True, 2: True, 3: True}]}
    official = score_items(read_questions(path, "official"), answers, "official")
    assert official.items == {"second": 1.0}
    fixed = score_items(read_questions(path, "fixed"), answers, "fixed")
    assert fixed.items == {"second": 1.0, "first": 0.0, "skipped": 0.0}
    assert fixed.dropped == dict.fromkeys(("first", "skipped"), "it has no image, or no answers")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (rows_of("a", [(1, "2", WHOLE), (2, "1", WHOLE)]), "depend on each other in a circle"),
        (rows_of("a", [(1, "7", WHOLE)]), "item a has no question 7"),
        (rows_of("a", [(1, "0", WHOLE), (1, "0", WHOLE)]), "row 3 .*question 1 of a is there twice"),
        (rows_of("a", [(1, "x", WHOLE)]), "row 2 .*is no question"),
    ],
)
def test_questions_that_make_no_sense(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        read_questions(written(tmp_path / "q.csv", rows), "fixed")


def test_questions_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="git clone .*ELLA"):
        read_questions(tmp_path / "q.csv", "fixed")
    (tmp_path / "q.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column dependency, item_id"):
        read_questions(tmp_path / "q.csv", "fixed")


# ------------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror")
    seeing.blip(folder / seeing.BLIP)
    return folder


@pytest.fixture
def bench(mirror, tmp_path, monkeypatch):
    """Questions, grids of 2 x 2 tiles of 20 pixels, and the words of a command that scores them."""
    monkeypatch.setenv("UAE_CHECKPOINTS", str(mirror))
    monkeypatch.setattr(dpg, "TransformersAnswerer", partial(TransformersAnswerer, max_tokens=1))
    path = written(tmp_path / "q.csv", FIRST, SECOND)
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(("first", "second")):
        picture(40, 40, seed).save(tmp_path / f"images/{name}.png")
    return ["score", "--csv", path, "--output", str(tmp_path / "r.json"), "--images", str(tmp_path / "images"),
            "--resolution", "20", "--device", "cpu"]  # fmt: skip


def test_a_folder_is_scored_and_nothing_is_asked_twice(bench, tmp_path, monkeypatch):
    dpg.main(bench)
    result, file = read_result(tmp_path / "r.json"), tmp_path / "r.answers.jsonl"
    assert result["benchmark"] == "DPG-Bench (own questions) fixed [hf]"
    assert result["backend"]["vqa"] == seeing.BLIP
    assert list(result["scores"])[:2] == ["overall", "L1 attribute"]
    assert result["scores"]["L2 attribute - color"]["n"] == 8  # two questions, four tiles
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 4 * (2 + 3)
    assert {json.loads(line)["answer"] for line in lines[1:]} == {"yes", "no"}
    by_hand = {name: [{} for _ in range(4)] for name in ("first", "second")}
    for line in map(json.loads, lines[1:]):
        name, tile, number = line["key"].split("/")
        by_hand[name][int(tile)][int(number)] = line["answer"] == "yes"
    expected = score_items(read_questions(bench[2], "fixed"), by_hand, "fixed").items
    assert result["items"] == expected
    assert result["scores"]["overall"]["value"] == pytest.approx(sum(expected.values()) / 2)

    file.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])  # killed while it wrote
    asked = []
    answer = TransformersAnswerer.__call__
    monkeypatch.setattr(TransformersAnswerer, "__call__", lambda self, image, texts: asked.extend(texts) or answer(self, image, texts))
    dpg.main(bench)
    assert len(asked) == 20 - 8
    assert read_result(tmp_path / "r.json") == result
    apart = ["score", "--csv", bench[2], "--output", str(tmp_path / "o.json"), "--answers", str(file)]
    dpg.main([*apart, "--mode", "official"])  # the same answers, without images or models
    official = read_result(tmp_path / "o.json")
    assert official["benchmark"] == "DPG-Bench (own questions) official [hf]"
    assert list(official["items"]) == ["second"]
    assert "first" in official["dropped"]
    file.write_text("\n".join(lines[:8]) + "\n")
    with pytest.raises(ValueError, match="lacks .* answers"):
        dpg.main(apart)


def test_names_with_dots_are_items(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    texts = {"v1.0.txt": "a cat", "v1.1.txt": "\ufeffa dog", "old.TXT": "a cow", "._v1.0.txt": "\0", "README.md": "no prompt"}
    for name, text in texts.items():
        (prompts / name).write_text(text)
    job = dpg.generate(str(prompts), str(tmp_path / "g"), tiles=1)
    assert {drawing.path.name: drawing.prompt for drawing in job.drawings} == {
        "old.png": "a cow", "v1.0.png": "a cat", "v1.1.png": "a dog",
    }  # fmt: skip
    for drawing in job.drawings:
        drawing.path.parent.mkdir(exist_ok=True)
        picture(20, 20).save(drawing.path)
    assert list(dpg.find_grids(tmp_path / "g", 20, 1)) == ["old", "v1.0", "v1.1"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.txt", b" \n", "b.txt is empty"),
        ("b.txt", "caf\u00e9".encode("latin-1"), "b.txt is no text in UTF-8"),
        ("a.TXT", b"a dog", "both of item 'a'"),
    ],
)
def test_prompts_that_nobody_can_draw_are_named(tmp_path, name, content, said):
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        dpg.generate(str(tmp_path), str(tmp_path / "g"))


def test_tiles_are_cut_row_by_row():
    image = Image.new("RGB", (4, 4))
    for i, (x, y) in enumerate([(0, 0), (2, 0), (0, 2), (2, 2)]):
        image.paste((i, i, i), (x, y, x + 2, y + 2))
    assert [tile.getcolors() for tile in cut_tiles(image, 4)] == [[(4, (i, i, i))] for i in range(4)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--resolution", "21"], "has 40 x 40 pixels, a grid of 4 tiles of --resolution 21 has 42 x 42"),
        (["--tiles", "1"], "a grid of 1 tiles of --resolution 20 has 20 x 20"),
        (["--tiles", "3"], "a grid is square"),
    ],
)
def test_a_wrong_size_is_an_error_and_not_garbage(bench, change, said):
    with pytest.raises(ValueError, match=said):
        dpg.main([*bench, *change])


def test_a_torn_image_counts_nothing_and_is_named(bench, tmp_path):
    torn = tmp_path / "images/second.png"
    torn.write_bytes(torn.read_bytes()[:900])
    dpg.main(bench)
    result = read_result(tmp_path / "r.json")
    assert "truncated" in result["dropped"]["second"]
    assert result["items"]["second"] == 0


def test_blip_answers_one_by_one_as_in_a_batch(bench):
    questions = ["is there a cat ?", "is the dog red ?", "a red cat ?", "is there a red dog ?", "no ?", "the cat ?", "the dog ?"]
    image = picture(30, 44)
    batch = TransformersAnswerer(batch_size=5)(image, questions)
    assert len(set(batch)) > 1
    assert TransformersAnswerer(batch_size=2)(image, questions) == batch
    single = TransformersAnswerer(batch_size=1)
    assert [single(image, [question])[0] for question in questions] == batch
    inputs = single.processor(images=image, text=questions[0], return_tensors="pt")
    with torch.no_grad():
        tokens = single.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert single.processor.decode(tokens[0], skip_special_tokens=True) == batch[0]


def test_a_chat_model_answers(mirrored):
    answerer = TransformersAnswerer("Qwen/Qwen2.5-VL-3B-Instruct", batch_size=2, max_tokens=4)
    assert answerer.backend["instruction"] == "Answer with yes or no only."
    image, questions = picture(60, 44), ["Is there a cat?", "Is the dog of the neighbors red or not?", "A cat?"]
    answers = answerer(image, questions)
    assert answers == [answerer(image, [question])[0] for question in questions]
    assert all(isinstance(answer, str) for answer in answers)


def test_a_model_that_cannot_be_asked(mirrored):
    with pytest.raises(ValueError, match="neither BLIP nor has it a chat template"):
        TransformersAnswerer("openai/clip-vit-large-patch14")


def test_answers_of_other_weights_behind_the_same_name_are_not_taken(bench, mirror, tmp_path, monkeypatch):
    dpg.main(bench)
    before = (tmp_path / "r.answers.jsonl").read_bytes()
    shutil.copytree(mirror, tmp_path / "mirror")
    file = next((tmp_path / "mirror").rglob("*.safetensors"))
    weights = {name: value + 0.01 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path / "mirror"))
    with pytest.raises(ValueError, match="was made by vqa_sha256=.* now it is vqa_sha256="):
        dpg.main(bench)
    assert (tmp_path / "r.answers.jsonl").read_bytes() == before
