from uae.bench.ledger import Ledger


def test_any_character_of_unicode_is_kept(tmp_path):
    """Some of them are line breaks to Python, but not to JSON Lines."""
    text = "a\u2028b\x85c\u2029d\x0b\x1ce"
    Ledger(tmp_path / "l.jsonl", {"name": text}).add(text, answer=text)
    again = Ledger(tmp_path / "l.jsonl", {"name": text})
    assert again.rows == {text: {"answer": text}}
