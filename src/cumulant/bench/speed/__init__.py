"""`cumulant bench`: time and memory of each mechanism by length."""
