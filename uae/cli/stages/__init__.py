"""Several stages of training by one command: ``fit --config RUN --stage "FILE OPTIONS" --stage "FILE OPTIONS"``.

Each stage is a run of its own, in the same process. The first has a folder like any run, the others have theirs below it. A
stage starts from what the one before exported, so the last export holds all that was learnt.
"""
