"""Time grids: the N + 1 times of an N-step solution, from t = 0 (prior) to t = 1 (data)."""


def uniform(steps: int) -> list[float]:
    """0, 1/N, ..., 1. Raises ValueError for fewer than one step."""
    if steps < 1:
        raise ValueError(f"{steps} steps: must be at least 1")
    return [i / steps for i in range(steps + 1)]
