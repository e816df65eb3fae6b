"""``python -m uae.check SYSTEM.yaml``."""

from uae.check.command import main

if __name__ == "__main__":
    main()
