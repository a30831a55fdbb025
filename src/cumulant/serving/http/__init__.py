"""The HTTP server of `cumulant serve`."""
