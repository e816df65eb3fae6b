"""``python -m uae.cli``."""

from uae.cli.command import main

if __name__ == "__main__":
    main()
