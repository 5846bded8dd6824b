"""``python -m lightning_accel.cli``."""

from lightning_accel.cli import main

if __name__ == "__main__":
    main()
