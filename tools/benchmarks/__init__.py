"""The measurements of `tools/benchmarks/bench.py`, one a file, and what they share.

Every measurement is a function `measure` of a `Setting` and of the sizes of its work, which tests make small.
Engines and other heavy things are imported inside the functions, so that `--help` needs none of them.
"""
