"""`cumulant recall`: multi-query associative recall."""
