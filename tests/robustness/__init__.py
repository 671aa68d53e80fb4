"""Tests of inmerge_wrap.robustness, file by file."""
