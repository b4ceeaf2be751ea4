"""Who has which examples: four ways to deal a data set out to clients, all a function of the seed.

    iid         every client a random share of the same size
    dirichlet   each value of a field is spread by shares drawn from Dirichlet(alpha); small alpha, few values
                per client (Hsu, Qi and Brown, arXiv 1909.06335)
    field       whole values of a field, such as topics: natural non-IID edges
    size        random examples, but the n-th client has them in proportion to (n + 1) ** -skew

Every client gets at least `min_examples`. Numpy only.
"""

from collections.abc import Sequence

import numpy as np

from tightbeam.common.errors import DataError

__all__ = ["by_field", "by_size", "deal", "dirichlet", "iid"]

_TRIES = 50


def deal(
    by: str, labels: Sequence[str], clients: int, *, alpha: float, skew: float, min_examples: int, seed: int
) -> list[list[int]]:
    """Row numbers of each client, ascending; `labels` has one value per row, read by two of the ways.

    Raises:
        DataError: the clients need more rows, or more values of the field, than there are.

    """
    if clients * min_examples > len(labels):
        raise DataError(
            f"{clients} clients with at least {min_examples} examples each need {clients * min_examples}; "
            f"the data has {len(labels)}.",
            cure="Lower clients or partition.min_examples, or give more data.",
        )
    rng = np.random.default_rng(seed)
    if by == "iid":
        parts = iid(len(labels), clients, rng)
    elif by == "size":
        parts = by_size(len(labels), clients, skew, min_examples, rng)
    elif by == "field":
        parts = by_field(labels, clients)
    else:
        parts = dirichlet(labels, clients, alpha, min_examples, rng)
    if (fewest := min(map(len, parts))) < min_examples:
        raise DataError(
            f"The partition by {by} leaves a client with {fewest} examples, fewer than {min_examples}.",
            cure="Lower clients or partition.min_examples, or raise partition.alpha.",
        )
    return [sorted(part) for part in parts]


def iid(num_rows: int, clients: int, rng: np.random.Generator) -> list[list[int]]:
    """Shuffle and cut into parts whose sizes differ by one at most."""
    return [part.tolist() for part in np.array_split(rng.permutation(num_rows), clients)]


def by_size(
    num_rows: int, clients: int, skew: float, min_examples: int, rng: np.random.Generator
) -> list[list[int]]:
    """Shuffle and cut into parts that shrink by a power law; what is beyond the minimum follows it."""
    weights = (np.arange(clients) + 1.0) ** -skew
    spare = num_rows - clients * min_examples
    ends = np.floor(np.cumsum(weights / weights.sum()) * spare + 1e-9).astype(int)
    sizes = np.diff(ends, prepend=0) + min_examples
    sizes[0] += num_rows - sizes.sum()
    return [part.tolist() for part in np.split(rng.permutation(num_rows), np.cumsum(sizes)[:-1])]


def by_field(labels: Sequence[str], clients: int) -> list[list[int]]:
    """Give whole values away, the most frequent first, each to the client with the fewest rows so far."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    if len(rows) < clients:
        raise DataError(
            f"The field has {len(rows)} different values, too few for {clients} clients.",
            cure="Lower clients, or set partition.by to dirichlet.",
        )
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(rows, key=lambda label: (-len(rows[label]), label)):
        min(parts, key=len).extend(rows[label])
    return parts


def dirichlet(
    labels: Sequence[str], clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[list[int]]:
    """Draw until every client has its minimum; the best of `_TRIES` draws otherwise."""
    draws = (_draw(labels, clients, alpha, rng) for _ in range(_TRIES))
    best: list[list[int]] = []
    for parts in draws:
        if not best or min(map(len, parts)) > min(map(len, best)):
            best = parts
        if min(map(len, best)) >= min_examples:
            break
    return best


def _draw(labels: Sequence[str], clients: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    values = np.asarray(labels)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(values == label))
        shares = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1]
        for part, given in zip(parts, np.split(rows, np.floor(shares * len(rows)).astype(int)), strict=True):
            part.extend(given.tolist())
    return parts
