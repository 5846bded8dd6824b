"""Where the process that called for a run looks for modules and files, told to its actors on other machines."""

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Whereabouts:
    """Where the process that called for a run looks for modules and files; its actors look there, too.

    Attributes:
        modules: Its `sys.path`.
        folder: Its working directory.
    """

    modules: tuple[str, ...]
    folder: str

    @staticmethod
    def here() -> "Whereabouts":
        """Return those of this process."""
        return Whereabouts(tuple(sys.path), os.getcwd())

    def follow(self) -> None:
        """Go there; what this machine has not is left out."""
        sys.path.extend(path for path in self.modules if path not in sys.path)
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
