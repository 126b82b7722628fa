"""How sure a share is, and whether two models differ on the same questions."""

from math import comb, sqrt

_Z_95 = 1.959963984540054


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927; unlike the normal approximation it stays between 0 and 1 and holds for few questions.
    """
    if num_questions == 0:
        return 0.0, 1.0
    share, z2 = num_correct / num_questions, _Z_95**2
    scale = 1 + z2 / num_questions
    middle = (share + z2 / (2 * num_questions)) / scale
    spread = share * (1 - share) / num_questions + z2 / (4 * num_questions**2)
    half = _Z_95 * sqrt(spread) / scale
    low = 0.0 if num_correct == 0 else middle - half
    return low, 1.0 if num_correct == num_questions else middle + half


def mcnemar_p_value(num_gained: int, num_lost: int) -> float:
    """Return the exact two-sided probability of so uneven changes if the models were equally good.

    Args:
        num_gained: questions that only the new model answers rightly.
        num_lost: questions that only the old one answers rightly.

    Source: Q. McNemar, 1947, in its exact form: the changes are tosses of a fair coin.
    """
    tosses = num_gained + num_lost
    tail = sum(comb(tosses, heads) for heads in range(min(num_gained, num_lost) + 1))
    return float(min(1.0, 2 * tail / 2**tosses))
