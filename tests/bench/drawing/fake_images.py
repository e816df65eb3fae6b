"""A server on this machine that speaks the images API: its pictures have one colour, which their prompt decides."""

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench.judging.fake_judges import FakeServer
from tests.bench.judging.fake_judges import serving as serving_any

PRICE = 0.04
CAPTIONS = {f"{i}.png": f"caption {i}" for i in range(5)}


def color(prompt):
    return tuple(hashlib.sha256(prompt.encode()).digest()[:3])


def picture(prompt, size=(8, 6), format="PNG"):
    content = BytesIO()
    Image.new("RGB", size, color(prompt)).save(content, format=format)
    return content.getvalue()


def letters(content):
    return base64.b64encode(content).decode()


def draws(request):
    """The reaction of a server that draws what it is asked for."""
    return {"data": [{"b64_json": letters(picture(request["text"]))}]}


def refuses(word, code="moderation_blocked", status=400, message="Your request was rejected by the safety system."):
    """A server that refuses prompts with a word, and draws the others."""
    body = {"error": {"message": message, "code": code, "type": "image_generation_user_error"}}
    return lambda request: {"status": status, "body": body} if word in request["text"] else draws(request)


class FakeImages(FakeServer):
    """Answers ``images/generations``; ``GET /pictures/PROMPT.png`` has the picture of a prompt.

    Attributes:
        fetched: Paths and headers of the pictures that were fetched.
    """

    fetched: list

    def handler(self):
        fake, self.fetched = self, []

        class Handler(super().handler()):
            def do_GET(self):
                fake.fetched.append((self.path, dict(self.headers)))
                content = picture(Path(self.path).stem)
                self.send_response(200 if len(fake.fetched) > 1 else 503)  # the first try fails
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler

    @staticmethod
    def shape(request, reaction):
        assert request["path"] == "/v1/images/generations"
        return {"created": 1, "data": reaction["data"]}


def serving(react=draws):
    return serving_any(react, FakeImages)


def write_captions(path, captions, **more):
    path.write_text(json.dumps([{"name": name, "caption": caption, **more} for name, caption in captions.items()]))
    return str(path)


def colors(folder):
    """Name to colour of the pictures of a folder."""
    files = [file for file in Path(folder).rglob("*.png") if ".gone" not in file.parts]
    return {str(file.relative_to(folder)): tuple(int(x) for x in np.asarray(Image.open(file))[0, 0]) for file in files}


def records(folder):
    return [json.loads(line) for line in Path(folder, "draws.jsonl").read_text().splitlines()]
