"""Statistics of the judges' answers: win rates, agreement, rankings and intervals."""
