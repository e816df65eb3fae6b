"""DPG-Bench: do images show what dense prompts ask for."""
