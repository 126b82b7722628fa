"""Memory that a program has freed, and soon asks for again."""

import ctypes

from llmtuner.extras.env import sets_malloc_thresholds

# numbers of mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the next step to use.

    By default it gives tensors of more than 32 MB back to the system at once, and the system fills
    new memory with zeros, page by page. To be called when everything that lives for the whole run
    is in place, so that the memory of passing things is not kept.

    Returns:
        Whether it does now; not with another C library than glibc, nor against the user's setting.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    if sets_malloc_thresholds():
        return False
    return all(set_option(option, _LARGEST_INT) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
