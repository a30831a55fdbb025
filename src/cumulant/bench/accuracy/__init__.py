"""`cumulant bench accuracy`: error against float64 by length."""
