"""Files: where checkpoints are, how a picture is read, and how a file is written that is never half there."""
