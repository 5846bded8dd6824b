"""The study of feature selection by projection: its runs, pictures and page."""
