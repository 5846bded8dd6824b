"""What the suite ``recurrent`` runs: models, cells and fits, and how a row is made of their times."""
