"""Foundations every op family stands on: the native library, the choice of backend, argument checks."""
