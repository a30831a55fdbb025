"""`cumulant compare`: mechanisms trained on one text under one budget."""
