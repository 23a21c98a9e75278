"""Benchmarks: `python -m benchmarks.run`; bench_<op>.py declare cases, harness.py gates and times them."""
