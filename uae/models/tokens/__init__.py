"""Images as tokens: one autoregressive network that captions and draws."""
