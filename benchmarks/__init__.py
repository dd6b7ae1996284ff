"""Measured figures: `python benchmarks/run.py`. A package, so that its modules have names of their own; see docs/performance.md."""
