"""What a run says on the terminal, or in the log of a batch job: its parts, its progress, and what to do when it has ended."""
