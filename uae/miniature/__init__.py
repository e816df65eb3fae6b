"""The miniature: a procedural world, two tiny unified models of it, how they are pretrained and measured. Nothing else imports it."""
