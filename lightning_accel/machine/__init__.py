"""What a program can have of its machine beside torch: functions of generated C, OpenMP threads at rest, copies."""

from lightning_accel.machine.toolchain import CannotCompileError, compile_budget, find_compiler, load

__all__ = ["CannotCompileError", "compile_budget", "find_compiler", "load"]
