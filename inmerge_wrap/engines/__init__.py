"""The ways in which a pass can be computed, all of them equal to the plain functions."""
