"""What the suite ``growth`` measures of each core."""
