"""Benchmarks: ``python bench/run.py <family>``, where a family is a file of this folder with ``cases`` in it."""
