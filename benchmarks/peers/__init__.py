"""The contenders of `compare_training.py`; each file here exports `PEER`, a new one adds a peer."""
