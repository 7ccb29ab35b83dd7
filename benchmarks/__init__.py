"""What bench.py runs on and compares with, and what it measured."""
