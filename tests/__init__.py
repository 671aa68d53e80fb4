"""Tests of inmerge-wrap."""
