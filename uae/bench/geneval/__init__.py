"""GenEval and GenEval++: do images show the objects, counts, colors and places of their prompts."""
