"""What the suite ``gpu`` checks, builds and trains."""
