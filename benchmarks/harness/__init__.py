"""The parts of `compare_training.py`: jobs, environments, rows, runs, results, tables."""
