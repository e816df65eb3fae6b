"""An image model's server that fails, folders of others, and mistakes of the user."""

import json
import os

import pytest

from tests.bench.drawing.fake_images import CAPTIONS, PRICE, color, colors, draws, letters, records, serving
from tests.bench.judging.fake_judges import SECRET

ONE = {"0.png": "caption 0"}


def error(status, code=None, message="no", **headers):
    body = {"error": {"message": message, "code": code}}
    return {"status": status, "body": body, "headers": {"retry-after-ms": "1", **headers}}


@pytest.mark.parametrize("fault", [error(429, "rate_limit_exceeded"), error(500), error(503), {"drop": True}], ids=str)
def test_what_may_pass_is_tried_again(drawing, tmp_path, fault):
    with serving(lambda request: draws(request) if request["number"] else fault) as server:
        found = drawing(server, ONE)
        assert (found["status"], found["calls"]) == ("complete", 2)
    assert found["cost_usd"] == pytest.approx(PRICE * (2 if "drop" in fault else 1))  # what was sent may have been charged


@pytest.mark.parametrize(
    "fault",
    [
        error(401, "invalid_api_key", f"Incorrect API key provided: {SECRET}"),
        error(403, None, "Your organization must be verified to use this model"),
        error(404, "model_not_found"),
        error(429, "insufficient_quota"),
        error(400, "billing_hard_limit_reached"),
    ],
    ids=lambda fault: str(fault["status"]),
)
def test_what_no_further_call_can_mend_ends_the_run_at_once(drawing, tmp_path, fault, capsys):
    """Nothing was drawn, so the folder can be filled by the model that was meant."""
    with serving(lambda request: fault) as server:
        with pytest.raises(ValueError, match=r"^model paiinter is given up \(HTTP \d+: .*5 images are left to draw") as raised:
            drawing(server, model="paiinter")
        assert len(server.requests) == 1
        server.react = draws
        assert drawing(server)["status"] == "complete"
    assert SECRET not in str(raised.value) + capsys.readouterr().out


def test_a_mistake_of_the_call_is_no_refusal_and_ends_after_some_captions(drawing, tmp_path):
    """The message names a parameter that has to do with safety, but it is the same for every prompt."""
    fault = error(400, "invalid_value", "Invalid value for 'moderation': 'none'")
    with serving(lambda request: fault) as server:
        with pytest.raises(ValueError, match="given up"):
            drawing(server, {f"{i}.png": f"caption {i}" for i in range(9)})
        assert len(server.requests) == 5
        assert records(tmp_path / "out") == []
        server.react = lambda request: fault if request["number"] % 2 else draws(request)  # of some captions only
        found = drawing(server, {f"{i}.png": f"caption {i}" for i in range(13)})
        assert (len(found["failed"]), found["drawn"], found["calls"]) == (7, 6, 13)


@pytest.mark.parametrize(
    "reply",
    [
        {"data": []},
        {"data": [{}]},
        {"data": [{"b64_json": letters(b"no picture")}]},
        {"data": [{"url": "file:///etc/hostname"}]},
        {"raw": "<html>gateway</html>"},
        {"raw": "[]"},
    ],
    ids=str,
)
def test_a_paid_reply_without_a_picture_is_a_failure_that_is_not_paid_again(drawing, tmp_path, reply):
    with serving(lambda request: draws(request) if request["number"] else reply) as server:
        found = drawing(server)
        assert (found["status"], found["drawn"], list(found["failed"])) == ("complete", 4, ["0.png"])
        assert found["cost_usd"] == pytest.approx(5 * PRICE)
        assert drawing(server)["calls"] == 0
        assert drawing(server, retry_failed=True)["drawn"] == 5
    assert colors(tmp_path / "out") == {name: color(caption) for name, caption in CAPTIONS.items()}


def test_the_cap_holds_for_calls_whose_pictures_never_come(drawing, tmp_path):
    with serving(lambda request: {"drop": True}) as server:
        found = drawing(server, max_cost_usd=3.5 * PRICE)
        assert (found["status"], found["left"], len(server.requests)) == ("partial", 5, 3)
        assert found["cost_usd"] == pytest.approx(3 * PRICE)


def test_the_key_is_nowhere(drawing, tmp_path, capfd, caplog):
    """The server repeats it in messages of errors, in revised prompts and in replies that are none."""
    caplog.set_level("DEBUG")
    reactions = [
        lambda request: error(400, None, f"content policy, {SECRET}"),
        lambda request: error(400, None, f"bad key {SECRET}"),
        lambda request: {"data": [{"revised_prompt": SECRET}]},
        lambda request: {"raw": f"<html>{SECRET}</html>"},
        lambda request: {"data": [draws(request)["data"][0] | {"revised_prompt": SECRET}]},
    ]
    with serving(lambda request: reactions[request["number"]](request)) as server:
        drawing(server)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    out, err = capfd.readouterr()
    assert "bad key [key]" in out
    assert not [text for text in written if SECRET.encode() in text]
    assert SECRET not in out + err + caplog.text


def test_another_server_gets_no_key_of_openai(drawing, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as server:
        drawing(server, ONE, key_env=None, usd_per_image=0.0, max_cost_usd=0.0)
    assert SECRET not in str(server.requests)


@pytest.mark.parametrize(
    ("change", "key"), [({"model": "painter-2"}, "model"), ({"size": "512x512"}, "size"), ({"params": {"quality": "low"}}, "quality")]
)
def test_a_folder_of_another_model_is_not_continued(drawing, change, key):
    with serving() as server:
        drawing(server, ONE)
        with pytest.raises(ValueError, match=rf"another system or of other settings \(they differ in [\w.]*{key}"):
            drawing(server, **change)
        assert len(server.requests) == 1


def test_a_folder_of_other_captions_is_not_continued(drawing, tmp_path):
    with serving() as server:
        drawing(server)
        with pytest.raises(ValueError, match="holds images of other prompts"):
            drawing(server, dict.fromkeys(CAPTIONS, "of another captioner"))
        assert len(server.requests) == 5
        (tmp_path / "out" / "drawn_by.json").unlink()
        with pytest.raises(ValueError, match="has no drawn_by.json that says which system made it"):
            drawing(server)


def test_changed_captions_are_drawn_again_and_nothing_paid_is_lost(drawing, tmp_path, capsys):
    changed = {name: caption for name, caption in CAPTIONS.items() if name != "4.png"} | {"0.png": "changed"}
    with serving() as server:
        drawing(server)
        found = drawing(server, changed)
        assert (found["calls"], found["captions"], found["status"]) == (1, 4, "complete")
    assert colors(tmp_path / "out") == {name: color(caption) for name, caption in changed.items()}
    assert sorted(os.listdir(tmp_path / "out" / ".gone")) == ["0.png", "4.png"]
    rows = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert {row["name"]: row["caption"] for row in rows} == changed
    out = capsys.readouterr().out
    assert "1 captions have changed" in out
    assert "1 images moved to" in out
    assert found["cost_usd"] == pytest.approx(6 * PRICE)


def test_two_runs_at_once_are_refused(drawing):
    messages = []

    def react(request):
        with pytest.raises(ValueError, match="another run is writing") as raised:
            drawing(server)
        messages.append(raised)
        return draws(request)

    with serving(react) as server:
        drawing(server, ONE)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"params": {"n": 4}}, "--params is with 'n', but a caption is drawn once"),
        ({"params": {"size": "1x1"}}, "--params is with 'size', which --size sets"),
        ({"usd_per_image": -1.0}, "--usd_per_image is -1.0; allowed: the vendor's price"),
        ({"concurrency": 0}, "--concurrency is 0; allowed: a whole number, 1 or more"),
        ({"base_url": f"http://{SECRET}@host/v1"}, "--base_url is not a plain"),
        ({"encoders": "x.yaml"}, "--sources is missing"),
        ({"sources": "nowhere"}, "no folder of images at 'nowhere'; correct --sources"),
        ({"output": "."}, "captions.json' would be written over, with the captions that are drawn; give another --output"),
        ({"captions": {"a": "x", "a.png": "y"}}, "would both be written to 'a.png'"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_paid(drawing, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
            drawing(server, **change)
        assert not server.requests
    assert SECRET not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_sources_of_other_names_are_found_before_anything_is_paid(drawing, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "else.png").touch()
    with serving() as server:
        with pytest.raises(ValueError, match="photos' holds none of the 5 images that --captions names; correct --sources"):
            drawing(server, sources=str(tmp_path / "photos"))
        assert not server.requests
