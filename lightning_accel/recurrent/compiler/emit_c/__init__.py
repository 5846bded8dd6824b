"""C text of a loop: expressions, rows, and the whole function."""
