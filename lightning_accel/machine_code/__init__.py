"""Machine code at run time: the C compiler of a machine, and functions of generated C."""

from lightning_accel.machine_code.toolchain import CannotCompileError, compile_budget, find_compiler, load

__all__ = ["CannotCompileError", "compile_budget", "find_compiler", "load"]
