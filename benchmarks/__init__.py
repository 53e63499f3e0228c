"""Runnable measurements: `python -m benchmarks.<name>`. Results are committed in `results/`."""
