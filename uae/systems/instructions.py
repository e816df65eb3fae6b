"""Instructions of the captioner for systems without an official one.

A run replaces them with ``model.init_args.system.init_args.reading.instruction``.
"""

IN_DETAIL = (
    "Describe this image in so much detail that someone who cannot see it could draw it again: every object with its "
    "color, size, material and place, how many there are, the background, the light, the style, and any text word for word."
)
COMPLETELY = (
    "Describe this image so completely that it can be drawn again from your words alone: objects with their attributes, "
    "counts, places and relations, background, light, viewpoint, style, and any text word for word."
)
