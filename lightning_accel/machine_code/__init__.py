"""Machine code at run time: the C compiler of a machine, and functions of generated C."""

from lightning_accel.machine_code.toolchain import CannotCompileError, find_compiler, load

__all__ = ["CannotCompileError", "find_compiler", "load"]
