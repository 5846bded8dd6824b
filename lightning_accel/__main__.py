"""``python -m lightning_accel``: the same as the command ``lightning-accel``."""

from lightning_accel.cli import main

if __name__ == "__main__":
    main()
