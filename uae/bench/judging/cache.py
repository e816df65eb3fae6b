"""Judges' answers, kept in a file."""

from __future__ import annotations

from uae.bench.judging.prompt import Prompt
from uae.bench.judging.requests import JudgeRequest
from uae.bench.vendors.records import Records

ASKED_AT_MOST = 2  # a request whose answer cannot be read is sent once more


class AnswerCache(Records):
    """The records of all requests to judges, by the requests' keys.

    A record is an answer (``text``), an answer of another model than the one that was asked (``error``), or a call whose answer
    never came and that may have been charged (``lost``).
    """

    def texts(self, key: str) -> list[str]:
        """Texts of the answers to a request, oldest first."""
        return [record["text"] for record in self.records.get(key, ()) if "text" in record]

    def answer(self, request: JudgeRequest, prompt: Prompt) -> str | None:
        """A judge's answer: one of the prompt's answers, "invalid" if none of its texts can be read, or None if there is none yet."""
        texts = self.texts(request.key)[:ASKED_AT_MOST]
        readable = [answer for text in texts if (answer := prompt.read(text)) is not None]
        return readable[0] if readable else "invalid" if len(texts) == ASKED_AT_MOST else None

    def errors(self, key: str) -> list[str]:
        """Descriptions of the answers that another model gave than the one that was asked."""
        return [record["error"] for record in self.records.get(key, ()) if "error" in record]
