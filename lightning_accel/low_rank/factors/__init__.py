"""Factored layers, and the way between a dense layer and a factored one."""
