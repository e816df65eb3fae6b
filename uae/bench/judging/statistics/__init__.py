"""From the judges' answers to win rates, rankings and intervals."""
