"""Tests of inmerge-wrap."""

import shutil

import pytest

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
