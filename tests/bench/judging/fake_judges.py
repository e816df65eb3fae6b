"""A server on this machine that speaks both vendors' shapes and fails as it is told; and small comparisons to judge."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from PIL import Image

from uae.bench.judging.stages import ask

INPUT_TOKENS, OUTPUT_TOKENS = 200, 10
PRICES = {"usd_per_million_input": 10.0, "usd_per_million_output": 50.0}
PAID = INPUT_TOKENS * 10e-6 + OUTPUT_TOKENS * 50e-6
OPENAI, ANTHROPIC = "judge-o-2024-08-06", "judge-a-20250805"
SECRET = "sk-5ecret-5ecret"
FIRST = '{"better": "first"}'
PROMPT = str(Path(__file__).parents[3] / "configs/bench/judges/prompts/caption_pair.yaml")


class FakeServer:
    """Answers requests as ``react(request)`` says: a string is the judge's text, a dictionary something else.

    Attributes:
        requests: Everything that came, in order: path, model, texts, headers, when it came.
        paid: Texts of the requests that were answered with status 200.
    """

    def __init__(self, react):
        self.react, self.requests, self.paid = react, [], []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    def handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                request = {"path": self.path, "model": body["model"], "at": time.monotonic(), "body": body}
                request |= {"text": texts(body), "headers": {name.lower(): value for name, value in self.headers.items()}}
                with fake.lock:
                    request["number"] = len(fake.requests)
                    fake.requests.append(request)
                fake.answer(self, request)

            def log_message(self, *args):
                pass

        return Handler

    def answer(self, handler, request):
        reaction = self.react(request)
        if isinstance(reaction, str):
            reaction = {"text": reaction}
        if reaction.get("hang"):
            self.over.wait(30)
        if reaction.get("hang") or reaction.get("drop"):
            handler.close_connection = True
            return
        status = reaction.get("status", 200)
        if status == 200:
            with self.lock:
                self.paid.append((request["model"], request["text"]))
        content = reaction.get("raw") or json.dumps(self.shape(request, reaction) if status == 200 else reaction.get("body", {}))
        handler.send_response(status)
        for name, value in {"content-type": "application/json", **reaction.get("headers", {})}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(content.encode())))
        handler.end_headers()
        handler.wfile.write(content.encode())

    @staticmethod
    def shape(request, reaction):
        model, text = reaction.get("model", request["model"]), reaction["text"]
        if request["path"].endswith("/chat/completions"):
            usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS, "total_tokens": 210}
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            return {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
        usage = {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
        content = [{"type": "text", "text": text}]
        return {"id": "1", "type": "message", "role": "assistant", "model": model, "content": content, "usage": usage}


def texts(body):
    """The user's text of a request in either shape of judges, or the prompt of an image."""
    if "prompt" in body:
        return body["prompt"]
    (user,) = [message for message in body["messages"] if message["role"] == "user"]
    return "".join(part["text"] for part in user["content"] if part["type"] == "text")


@contextmanager
def serving(react, server=FakeServer):
    """A fake server while it is needed."""
    fake = server(react)
    threading.Thread(target=fake.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield fake
    finally:
        fake.over.set()
        fake.http.shutdown()
        fake.http.server_close()


def prefers(word):
    """A judge that prefers the caption with more of a word, wherever it stands."""

    def react(request):
        first, second = (re.search(rf"<caption_{n}>\n(.*)\n</caption_{n}>", request["text"])[1] for n in ("one", "two"))
        a, b = first.count(word), second.count(word)
        return json.dumps({"better": "first" if a > b else "second" if b > a else "tie"})

    return react


def judge_entry(api, address, **changes):
    """A judge's settings, at a fake server."""
    entry = {
        "api": api,
        "model": OPENAI if api == "openai" else ANTHROPIC,
        "base_url": f"{address}/v1" if api == "openai" else address,
        "family": api,
        "key_env": "FAKE_KEY",
        "params": {"max_tokens": 20},
        "image_tokens": 10,
        "first_pause": 0.01,
        "timeout": 30,
        **PRICES,
    }
    return entry | changes


def write_judges(path, **judges):
    path.write_text(yaml.safe_dump(judges, sort_keys=False))
    return str(path)


def write_captions(folder: Path, systems):
    """Images a.png, b.png, ... and a caption file per system; ``systems`` is name to captions by image name."""
    (folder / "images").mkdir(exist_ok=True)
    for i, name in enumerate(sorted({name for captions in systems.values() for name in captions})):
        Image.new("RGB", (4, 4), (i % 256, i // 256, 7)).save(folder / "images" / name)
    files = {}
    for system, captions in systems.items():
        files[system] = str(folder / f"{system}.json")
        rows = [{"name": name, "caption": caption, "id": 0} for name, caption in captions.items()]
        Path(files[system]).write_text(json.dumps(rows))
    return files


def records(folder):
    """What the cache of a comparison holds."""
    return [json.loads(line) for line in Path(folder, "answers.jsonl").read_text().splitlines()]


def run(folder, cap=10.0, **more):
    """Ask what has no answer yet."""
    return ask(folder, cap, **{"dry_run": False, "cache": None, "retry_errors": False, **more})


def once(reaction, after=FIRST):
    """A server that reacts so to its first request."""
    return lambda request: reaction if request["number"] == 0 else after
