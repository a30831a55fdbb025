"""Measurements that anyone can repeat: `cumulant bench`, `recall` and `compare`."""
