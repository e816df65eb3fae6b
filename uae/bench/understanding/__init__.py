"""MMMU and MMT-Bench: lmms-eval asks the questions, this package sums the scores up per subtask."""
