"""Fuzzing of everything that takes arguments from outside: docs/robustness.md says what is fuzzed, and how.

`python -m fuzz` (with tests/ on the path) is the nightly; test_fuzz.py a fixed part of it in `make test`.
"""
