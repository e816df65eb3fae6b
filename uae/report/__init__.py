"""A page that shows what a run has done, in one file that needs neither a network nor scripts."""
