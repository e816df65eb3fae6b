"""Image to text."""
