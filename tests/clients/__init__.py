"""One script for each client whose package is no development dependency; see README.md."""
