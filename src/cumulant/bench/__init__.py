"""Measurements that anyone can repeat: `cumulant bench`."""
