"""What is asked, of whom, and what is refused before it is."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.bench.judging.fake_judges import judge_entry, write_captions, write_judges
from uae.bench.__main__ import main
from uae.bench.judging import command as judge
from uae.bench.judging.captions import plain, read_captions
from uae.bench.judging.judges import judge_of, read_judges
from uae.bench.judging.prompt import read_prompt
from uae.bench.judging.requests import read_plan

CONFIGS = Path(__file__).parents[3] / "configs" / "bench" / "judges"
PROMPT = str(CONFIGS / "prompts" / "caption_pair.yaml")
SERVER = "http://localhost:1"


@pytest.fixture
def build(tmp_path):
    def build_with(systems, prompt=PROMPT, entry=None, **more):
        judges = write_judges(tmp_path / "judges.yaml", one=entry or judge_entry("openai", SERVER))
        files, work = write_captions(tmp_path, systems), str(tmp_path / "work")
        return judge.build(files, str(tmp_path / "images"), work, judges=judges, prompt=prompt, **more)

    return build_with


def keys(plan):
    return [question.key for question in plan.requests]


def test_both_orders_of_every_pair(build):
    systems = {"a": {"1.png": "x", "2.png": "y"}, "b": {"1.png": "p", "2.png": "q"}, "c": {"1.png": "m", "2.png": "n"}}
    plan = build(systems, system="b")
    asked = [(q.about["image"], q.about["a"], q.about["b"], q.about["order"], dict(q.given)) for q in plan.requests]
    expected = []
    for image in ("1.png", "2.png"):
        for rival in ("a", "c"):
            ours, theirs = systems["b"][image], systems[rival][image]
            expected.append((image, "b", rival, "ab", {"first": ours, "second": theirs}))
            expected.append((image, "b", rival, "ba", {"first": theirs, "second": ours}))
    assert asked == expected
    assert len(build(systems, all_pairs=True).requests) == 2 * 3 * 2
    assert read_plan(Path(plan.requests[0].image).parents[1] / "work").requests


def test_keys_are_of_all_that_an_answer_depends_on(build, tmp_path):
    systems = {"a": {"1.png": "x"}, "b": {"1.png": "y"}}
    entry, first = judge_entry("openai", SERVER), keys(build(systems))
    assert len(set(first)) == 2
    same = [entry | {"usd_per_million_input": 1.0, "concurrency": 9, "timeout": 1, "base_url": f"{SERVER}/v2"}]
    other = [entry | {"model": "judge-o-2025-01-01"}, entry | {"params": {"max_tokens": 21}}]
    assert all(keys(build(systems, entry=changed)) == first for changed in same)
    assert all(not set(keys(build(systems, entry=changed))) & set(first) for changed in other)
    assert keys(build({"other": systems["a"], "names": systems["b"]})) == first
    assert keys(build({"a": systems["b"], "b": systems["a"]})) == first[::-1]
    words = yaml.safe_load(Path(PROMPT).read_text())
    changed = tmp_path / "prompt.yaml"
    for change in ({"version": "2"}, {"system": "Judge."}, {"user": words["user"] + "!"}, {"image": False}):
        changed.write_text(yaml.safe_dump(words | change))
        assert not set(keys(build(systems, prompt=str(changed)))) & set(first)
    build(systems)
    (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "1.png").read_bytes() + b"\0")
    files = {name: str(tmp_path / f"{name}.json") for name in systems}
    again = judge.build(files, str(tmp_path / "images"), str(tmp_path / "w"), judges=str(tmp_path / "judges.yaml"), prompt=PROMPT)
    assert not set(keys(again)) & set(first)


def test_nothing_is_dropped_silently_and_equal_captions_are_ties(build, tmp_path, capsys):
    systems = {"a": {"1.png": "x", "2.png": "same", "3.png": "z"}, "b": {"1.png": "y", "2.png": "**same**", "4.png": "w"}}
    write_captions(tmp_path, systems)
    plan = build(systems)
    assert len(plan.requests) == 2
    assert plan.about["without_caption"] == {"a": ["4.png"], "b": ["3.png"]}
    assert [case[-1] for case in plan.about["cases"]] == [False, True]
    (tmp_path / "images" / "1.png").unlink()
    files = {name: str(tmp_path / f"{name}.json") for name in systems}
    judge.build(files, str(tmp_path / "images"), str(tmp_path / "w"), judges=str(tmp_path / "judges.yaml"), prompt=PROMPT)
    said = capsys.readouterr().out
    assert "NOT COMPARED, no image: 1, e.g. 1.png" in said
    assert "NOT COMPARED, no caption of b: 1, e.g. 3.png" in said
    assert "1 pairs are equal" in said


def test_images_that_judges_cannot_read_are_refused(build, tmp_path):
    systems = {"a": {"1.tiff": "x"}, "b": {"1.tiff": "y"}}
    with pytest.raises(ValueError, match=r"judges read JPEG, PNG, GIF and WebP, .*1.tiff' is none"):
        build(systems)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("A cat.", "A cat."),
        ("Sure! Here is a detailed caption of the image:\n\n**A cat** on a `mat`.", "A cat on a mat."),
        ("Here's the description: 1 cat: Tom", "1 cat: Tom"),
        ("## Scene\n- a cat\n- a 3 * 4 grid, __red__", "Scene a cat a 3 * 4 grid, red"),
        ("Caption: A cat", "A cat"),
        ("Here are two cats. They say: hello", "Here are two cats. They say: hello"),
        ("```\nA cafe\u0301\n```", "A caf\u00e9"),
        ("  ", ""),
    ],
)
def test_captions_lose_their_dress_and_no_word(raw, expected):
    assert plain(raw) == expected
    assert plain(expected) == expected


def test_caption_files_of_every_kind(tmp_path):
    rows = [{"name": "a.png", "caption": "x"}, {"name": "b.png", "caption": "y", "id": 3}]
    contents = [json.dumps(rows), "\n".join(map(json.dumps, rows)) + "\n", json.dumps({"a.png": "x", "b.png": "y"})]
    for content in contents:
        (tmp_path / "c").write_text(content)
        assert read_captions(tmp_path / "c") == {"a.png": "x", "b.png": "y"}
    for content, said in [("[]", "must hold"), ('[{"name": 1, "caption": "x"}]', "must hold"), ("x", "must hold"),
                          (json.dumps([*rows, rows[0]]), "1 images")]:  # fmt: skip
        (tmp_path / "c").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_captions(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "gpt-4o"}, "an alias; give an id with a date, or set allow_alias"),
        ({"usd_per_million_input": None}, "usd_per_million_input is None; allowed: the vendor's price"),
        ({"params": {}}, "without a positive max_tokens or max_completion_tokens"),
        ({"api": "grpc"}, "allowed: openai, anthropic"),
        ({"base_url": "https://me:5ecret@host"}, "keys belong into the variable"),
        ({"base_url": "https://host/v1?key=5ecret"}, "keys belong into the variable"),
        ({"api_key": "5ecret"}, "has unknown api_key"),
        ({"concurrency": 0}, "a whole number, 1 or more"),
        ({"timeout": "long"}, "timeout is 'long'; allowed: seconds"),
    ],
)
def test_judges_that_are_refused(tmp_path, change, said):
    path = write_judges(tmp_path / "judges.yaml", one=judge_entry("openai", SERVER) | change)
    with pytest.raises(ValueError, match="judge 'one'") as caught:
        read_judges(path)
    assert said in str(caught.value)
    assert "5ecret" not in str(caught.value)


def test_a_judge_given_twice_is_refused_without_its_name(tmp_path):
    path = Path(write_judges(tmp_path / "judges.yaml", one=judge_entry("openai", SERVER)))
    lines = path.read_text().splitlines()
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match=f"has a key twice, in line 1 and in line {len(lines) + 1}; remove one of them"):
        read_judges(path)


def test_a_judge_without_a_price_is_refused(tmp_path):
    entry = judge_entry("openai", SERVER)
    del entry["usd_per_million_output"]
    with pytest.raises(ValueError, match="has no usd_per_million_output"):
        read_judges(write_judges(tmp_path / "judges.yaml", one=entry))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"better": "first"}', "first"),
        ('```json\n{"better": "Second "}\n```', "second"),
        ('I see {a cat}. Thus {"why": "{}", "better": "tie"}', "tie"),
        ('{"better": "first"} or {"better": "second"}', None),
        ('{"better": "first"} {"better": "both"}', None),
        ('{"better": "first"} {"better": "first"}', "first"),
        ('{"better": "fir', None),
        ('{"better": 1}', None),
        ("first", None),
        ("", None),
        ("{" * 100000, None),
    ],
)
def test_answers_are_read_strictly(text, answer):
    assert read_prompt(PROMPT, judge.ANSWERS).read(text) == answer


def test_captions_cannot_fill_in_anything_else():
    prompt = read_prompt(PROMPT, judge.ANSWERS)
    text = prompt.texts({"first": "costs $second ${x} {y} %s", "second": "b"})[1]
    assert "costs $second ${x} {y} %s" in text
    with pytest.raises(ValueError, match="can only fill in"):
        prompt.texts({"prompt": "x"})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_judges_that_come_with_the_project(path):
    entries = yaml.safe_load(path.read_text())
    if path.name == "paper_panel.yaml":
        with pytest.raises(ValueError, match="'grok-4': usd_per_million_input is None"):
            read_judges(path)
        prices = {"usd_per_million_input": 1.0, "usd_per_million_output": 1.0}
        entries = {name: {**entry, **prices} for name, entry in entries.items()}
    for name, entry in entries.items():
        assert judge_of(name, entry).max_tokens >= 100
        assert not {"key", "api_key", "token"} & entry.keys()


def test_the_command_line(tmp_path, capsys):
    files = write_captions(tmp_path, {"Qwen2.5-VL": {"1.png": "a = b"}, "B c": {"1.png": "y"}})
    judges = write_judges(tmp_path / "j.yaml", one=judge_entry("openai", SERVER))
    words = ["--images", str(tmp_path / "images"), "--folder", str(tmp_path / "w"), "--judges", judges, "--prompt", PROMPT]
    pairs = [word for name, file in files.items() for word in ("--captions", f"{name}={file}")]
    main(["judge", "build", *pairs, *words])
    assert read_plan(tmp_path / "w").about["systems"] == ["Qwen2.5-VL", "B c"]
    assert read_plan(tmp_path / "w").about["system"] == "Qwen2.5-VL"  # named first, though not first in the alphabet
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"captions": files, "system": "B c"}))
    main(["judge", "build", "--config", str(tmp_path / "c.yaml"), *words])
    assert read_plan(tmp_path / "w").about["system"] == "B c"
    main(["judge", "run", "--folder", str(tmp_path / "w"), "--dry_run=true"])
    assert "USD about" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["judge", "score", "--folder", str(tmp_path / "w"), "--output", str(tmp_path / "r.json")])
    assert "no pair of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["judge", "score", "--folder", str(tmp_path / "none"), "--output", str(tmp_path / "r.json"), "--families", "B c=x"])
    error = capsys.readouterr().err
    assert "build first" in error
    assert error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["judge", "build", *pairs, *words[2:], "--images", str(tmp_path / "empty")])
    assert "holds none of the images" in capsys.readouterr().err


def test_two_files_under_one_name_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["judge", "build", "--captions", "a=x.json", "--captions=a=y.json", "--images", "i", "--folder", str(tmp_path)])
    said = capsys.readouterr().err
    assert "--captions a=... is given twice (x.json and y.json)" in said
    assert said.count("\n") == 1


def test_captions_of_other_pictures_are_refused(build, tmp_path):
    build({"a": {"1.png": "x"}, "b": {"1.png": "y"}})  # writes the image
    image = tmp_path / "images/1.png"
    rows = [{"name": "1.png", "caption": "x", "source_sha256": hashlib.sha256(image.read_bytes()).hexdigest()}]
    files = {"a": str(tmp_path / "recorded.json"), "b": str(tmp_path / "b.json")}
    (tmp_path / "recorded.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"1.png": "y"}))
    words = [str(tmp_path / "images"), str(tmp_path / "again")]
    judges = {"judges": str(tmp_path / "judges.yaml"), "prompt": PROMPT}
    assert len(judge.build(files, *words, **judges).requests) == 2
    Image.new("RGB", (9, 9)).save(image)
    with pytest.raises(ValueError, match=r"recorded.json' has captions of other pictures than --images holds now \(1, e.g. 1.png\)"):
        judge.build(files, *words, **judges)
