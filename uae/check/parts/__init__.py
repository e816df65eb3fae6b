"""What is checked of one part of a system (captioner, renderer, image policy, reward) through its protocol alone."""
