"""How well captions and pictures of scenes agree with the scenes."""
