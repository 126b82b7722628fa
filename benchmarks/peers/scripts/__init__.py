"""Scripts that run inside the environments of peers; they import nothing of this checkout."""
