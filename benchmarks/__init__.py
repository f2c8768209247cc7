"""Measures the fast paths of the package against a plain textbook implementation.

``python -m benchmarks --help`` lists the parts; ``docs/performance.md`` explains the numbers.
"""
