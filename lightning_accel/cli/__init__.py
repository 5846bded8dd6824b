"""The command ``lightning-accel``: one name in front, Hydra overrides behind.

Nothing heavy is imported before it is known what to do: help and mistakes answer without torch.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_accel.cli.words import NotAnOverrideError, hydra_overrides


@dataclass(frozen=True)
class Command:
    """A command: ``lightning_accel.cli.<name>.<name>`` is called with the configuration ``conf/<name>.yaml``.

    Attributes:
        summary: What it does, one line.
        example: What to type behind ``lightning-accel``.
    """

    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "Compose, fit and test a model, with any accelerators",
        "train model=mlp data=digits callbacks=[rank_quantization,sequential_freezing]",
    ),
    "compare": Command(
        "Train with and without the accelerators in turns and say whether they pay here",
        "compare callbacks=[rank_quantization]",
    ),
    "plan": Command(
        "Show, without training, what the accelerators would do to this model on this machine",
        "plan model=mlp callbacks=[rank_quantization]",
    ),
    "bench": Command("Time the core of an accelerator against its peers on this machine", "bench low_rank quick=true"),
    "evidence": Command(
        "Gather comparisons, sweeps and benchmarks into one page with what to do next",
        "evidence outputs/compare outputs/bench",
    ),
    "run": Command(
        "Add accelerators to every Trainer of a script that is not changed",
        "run callbacks=[rank_quantization] -- python their_train.py --epochs 3",
    ),
    "export": Command(
        "Turn a checkpoint into a plain model that loads without this package",
        "export ckpt=outputs/last.ckpt model=mlp out=plain.pt",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 not understood, 130 interrupted.

    Args:
        arguments: What stands behind ``lightning-accel``; by default that of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        show_commands()
        return
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lightning-accel {version('lightning-accel')}")
        return
    name, *rest = words
    if name not in COMMANDS:
        sys.exit(_not_a_command(name))
    try:
        overrides = hydra_overrides(name, rest)
    except NotAnOverrideError as error:
        print(f"lightning-accel {name}: {error}", file=sys.stderr)
        sys.exit(2)
    from lightning_accel.cli.launch import launch

    sys.exit(launch(name, overrides))


def show_commands() -> None:
    """Print the commands with an example each."""
    from rich.table import Table
    from rich.text import Text

    from lightning_accel.cli.terminal import open_console

    console = open_console()
    console.print("Usage: lightning-accel COMMAND [key=value ...]\n", markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(name, style="bold cyan"), command.summary)
    console.print(table)
    console.print("\nExamples:", markup=False)
    for command in COMMANDS.values():
        console.print(f"  lightning-accel {command.example}", markup=False, soft_wrap=True)
    console.print(
        "\nlightning-accel COMMAND --help shows the options and groups of a command; -m a=1,2 runs all combinations;"
        "\n--version the version. Every command runs without an argument on data that come with the package.",
        markup=False,
        soft_wrap=True,
    )


def _not_a_command(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean `lightning-accel {close[0]}`?" if close else ""
    print(f"lightning-accel: `{name}` is not a command.{hint} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2
