"""MMBench, MMMU and MMT-Bench: what lmms-eval measured, per subtask."""
