"""Reads a page as a browser does, and checks that nothing in it came from outside."""

from html.parser import HTMLParser

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)> & "quoted"'


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.handlers = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def check(self):
        """No scripts, nothing that is loaded, no handlers of events; but pictures."""
        assert not self.tags & {"script", "link", "iframe", "object"}
        assert not self.handlers
        assert self.addresses
        assert all(address.startswith("data:image/") for address in self.addresses)

    def handle_data(self, data):
        self.texts.append(data)
