"""The identifiers that threads of this process currently read and write. No two threads write the same one."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Condition
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from worker.send.profile_directory import Identifier


class Claims:
    """Claims of identifiers by the threads that send profiles. Safe for many threads.

    A thread claims all identifiers of its batch at once, before it reads the profiles, and so never waits for a thread
    that waits for it. Without claims, two lanes could read that a phone number is free, and both write it.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._of_customers: set[Identifier] = set()
        self._of_guests: set[Identifier] = set()

    @contextmanager
    def for_customers(self, identifiers: AbstractSet[Identifier]) -> Iterator[None]:
        """Claim the identifiers of customers. Wait while another thread claims one of them."""
        with self._changed:
            self._changed.wait_for(lambda: self._are_free(identifiers))
            self._of_customers |= identifiers
        try:
            yield
        finally:
            self._release(self._of_customers, identifiers)

    @contextmanager
    def for_guests(self, identifiers: AbstractSet[Identifier]) -> Iterator[AbstractSet[Identifier]]:
        """Claim the identifiers of guests, and yield those that no customer claims.

        Wait while another thread claims one of them for a guest, but not for customers: their bulk jobs take minutes,
        and an order must not wait for them.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._of_guests.isdisjoint(identifiers))
            free = identifiers - self._of_customers
            self._of_guests |= free
        try:
            yield free
        finally:
            self._release(self._of_guests, free)

    def _are_free(self, identifiers: AbstractSet[Identifier]) -> bool:
        return self._of_customers.isdisjoint(identifiers) and self._of_guests.isdisjoint(identifiers)

    def _release(self, claimed: set[Identifier], identifiers: AbstractSet[Identifier]) -> None:
        with self._changed:
            claimed -= identifiers
            self._changed.notify_all()
