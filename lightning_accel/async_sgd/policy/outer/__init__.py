"""What becomes of ways that workers have gone on their own: when they count, and how they move the parameters."""
