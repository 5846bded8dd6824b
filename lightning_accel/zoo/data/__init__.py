"""Embedded data: nothing is downloaded."""
