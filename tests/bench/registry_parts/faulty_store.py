"""A real store whose connection breaks where it is told to: before a call is done, or after, when its reply is lost."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from infra.errors import StoreUnreachableError
from infra.storage import Store

WRITES = ("create", "replace", "upload", "delete")
# (method, path) -> None, "cut" or "lost"
Decide = Callable[[str, str], str | None]


class _Faulty(Store):
    """Every method of `inner`, with the faults that `decide` asks for."""

    def __init__(self, inner: Store, decide: Decide) -> None:
        self.inner, self.url, self.decide = inner, inner.url, decide


def _breaking(method: str) -> Callable[..., Any]:
    def call(self: _Faulty, path: Any = "", *arguments: Any, **options: Any) -> Any:
        fault = self.decide(method, path)
        if fault == "cut":
            raise StoreUnreachableError(f"{method} {path}: cut")
        result = getattr(self.inner, method)(path, *arguments, **options)
        if fault == "lost":
            raise StoreUnreachableError(f"{method} {path}: reply lost")
        return result

    return call


# Made so, it goes on standing for the whole of Store when that grows.
FaultyStore: Callable[[Store, Decide], Store] = type(
    "FaultyStore", (_Faulty,), {method: _breaking(method) for method in Store.__abstractmethods__}
)


class NthWrite:
    """Breaks at the nth write and at no other; `left` is above 0 while that has not come."""

    def __init__(self, nth: int, fault: str) -> None:
        self.left, self.fault = nth, fault

    def __call__(self, method: str, path: str) -> str | None:
        self.left -= method in WRITES
        return self.fault if method in WRITES and self.left == 0 else None


class Share:
    """Breaks a share of all calls, chosen by a seed, half of them after the call was done; counts them."""

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate, self.counts = rate, Counter[str]()
        self._random = random.Random(seed)

    def __call__(self, method: str, path: str) -> str | None:
        if self._random.random() >= self.rate:
            return None
        fault = self._random.choice(("cut", "lost"))
        self.counts[fault] += 1
        return fault
