"""The sender for profiles: it reads Klaviyo's profiles of a batch, and writes only what differs.

A batch takes several rounds if necessary. Each round reads the profiles (profile_directory.py), decides whose each is
and what to write (profile_plan.py), and writes: many profiles in a bulk job, the others individually
(profile_writes.py). A job ignores null and has no 409 that would protect an identifier, so a job neither clears
attributes nor creates a profile with the email address or phone number of a customer: the next round adds them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import orjson

from worker.errors import EndpointRefused, JobUnfinished, Rejected, Transient, WorkerError
from worker.json_access import as_text
from worker.model import Effect, Json, Operation, OperationKind, SendResult
from worker.send.claims import Claims
from worker.send.consent import has_new_consent
from worker.send.identifiers import report_dropped
from worker.send.jobs import PROFILES, BulkJobType, JobEntry
from worker.send.profile_directory import Adoptions, Directory, Identifier, identifier, read_profile, read_profiles
from worker.send.profile_plan import Plan, Planner, Upsert, has_nulls
from worker.send.profile_writes import MERGE_WAIT, ProfileWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from worker.klaviyo.client import KlaviyoClient
    from worker.send.bulk import OperationId
    from worker.send.consent import Consents
    from worker.send.jobs import BulkJobs

KINDS = frozenset({OperationKind.UPSERT_PROFILE, OperationKind.UPSERT_GUEST})
MAX_ROUNDS = 6  # creation, both identifiers after two conflicts each, and a merge
LAG_WAIT = 1.0  # seconds until a profile that Klaviyo does not show yet is read again
GUEST_JOB_TIMEOUT = 30.0  # seconds that orders wait for a job of guests; then they are sent individually for a while
_IMPORT = BulkJobType(PROFILES, "profiles", 10_000)  # https://developers.klaviyo.com/en/reference/bulk_import_profiles
_CHANGING = "other writers keep changing the profiles with these identifiers in Klaviyo"


class Profiles:
    """The sender for profiles. Safe for many threads: two threads never write the same identifier.

    More than `threshold` profiles are sent in a bulk job. `guest_jobs` runs the jobs of guests. `merges_guests`: see
    Planner.
    """

    def __init__(
        self,
        client: KlaviyoClient,
        jobs: BulkJobs,
        guest_jobs: BulkJobs,
        executors: Mapping[Effect, Executor],
        consents: Consents,
        threshold: int,
        *,
        merges_guests: bool,
    ) -> None:
        self._client = client
        self._jobs = jobs
        self._guest_jobs = guest_jobs
        self._executors = executors
        self._threshold = threshold
        self._merges_guests = merges_guests
        self._adoptions = Adoptions()
        self._writer = ProfileWriter(client, self._adoptions)
        self._claims = Claims()
        self._consents = consents

    def select(self, operations: Sequence[Operation]) -> list[OperationId]:
        """Return the ids of all operations on profiles: one read serves all of them."""
        return [(operation.kind, operation.key) for operation in operations if operation.kind in KINDS]

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        """Write the profiles and return the results in the same order."""
        upserts = [Upsert(operation) for operation in operations]
        with ExitStack() as claims:
            claims.enter_context(
                self._claims.for_customers(_identifiers(each for each in upserts if not each.is_guest))
            )
            guests = [upsert for upsert in upserts if upsert.is_guest]
            free = claims.enter_context(self._claims.for_guests(_identifiers(guests)))
            for guest in guests:
                if not _identifiers([guest]) <= free:  # the message of a customer writes this profile
                    guest.finish()
            self._send(upserts)
            self._send_consents(upserts)
        return [upsert.result or SendResult(Transient(_CHANGING, MERGE_WAIT), upsert.requests) for upsert in upserts]

    def _send(self, upserts: Sequence[Upsert]) -> None:
        for number in range(1, MAX_ROUNDS + 1):
            pending = [upsert for upsert in upserts if upsert.result is None]
            if not pending:
                return
            try:
                self._run_round(pending, can_defer=number < MAX_ROUNDS)
            except WorkerError as error:
                for upsert in pending:
                    if upsert.result is None:
                        upsert.finish(error)

    def _send_consents(self, upserts: Sequence[Upsert]) -> None:
        """Subscribe and unsubscribe the customers with a new consent, then write it to their profiles."""
        written = [each for each in upserts if each.operation.consents and each.result and not each.result.error]
        changed = [each for each in written if not self._consents.finish_if_stale(each) and each.has_new_consent]
        if changed:
            self._consents.update(changed)
            self._send(changed)
            self._consents.remember(changed)

    def _run_round(self, upserts: Sequence[Upsert], *, can_defer: bool) -> None:
        """Read and write profiles once. Raises WorkerError if they cannot be read."""
        directory = self._read(upserts)
        for upsert in upserts:
            if upsert.operation.consents:
                profiles = directory.find("external_id", upsert.operation.key)
                upsert.has_new_consent = has_new_consent(upsert.operation, profiles)
        pending = [upsert for upsert in upserts if upsert.result is None]
        plans = self._plan(directory, pending, can_defer=can_defer)
        if all(plan.is_deferred for _, plan in plans):  # they wait for each other
            plans = self._plan(directory, pending, can_defer=False)
        for upsert, plan in plans:
            if upsert.is_created and not plan.profile_id:
                upsert.finish(Transient("Klaviyo does not show the new profile yet", LAG_WAIT))
        work = [(upsert, plan) for upsert, plan in plans if not plan.is_deferred and upsert.result is None]
        for upsert, plan in work:
            for name in plan.dropped:
                if name not in upsert.dropped:
                    report_dropped(name, "profile")
        in_job = self._select_for_job(work)
        self._run_job(in_job)
        started = {id(upsert) for upsert, _ in in_job}
        self._write_individually([(upsert, plan) for upsert, plan in work if id(upsert) not in started])

    def _plan(self, directory: Directory, upserts: Sequence[Upsert], *, can_defer: bool) -> list[tuple[Upsert, Plan]]:
        planner = Planner(directory, upserts, merges_guests=self._merges_guests, can_defer=can_defer)
        return [(upsert, planner.plan(upsert)) for upsert in upserts]

    # Reading

    def _read(self, upserts: Sequence[Upsert]) -> Directory:
        """Return the profiles of the upserts. Raises WorkerError.

        A customer's email address and phone number are looked up only if the customer's profile has others.
        """
        directory = Directory()
        customers = {upsert: _customer_of(upsert) for upsert in upserts if _customer_of(upsert) and not upsert.is_blind}
        try:
            self._look_up(directory, "external_id", customers)
            self._name_just_written(directory, upserts)
            for name in ("email", "phone_number"):
                self._look_up(directory, name, _unknown(directory, name, upserts))
            self._read_named(directory, upserts)
        except EndpointRefused:  # the scope profiles:read is missing
            for upsert in upserts:
                _cannot_read(upsert)
        return directory

    def _name_just_written(self, directory: Directory, upserts: Iterable[Upsert]) -> None:
        """Let the profiles with consents that this process has just written be read by their id, too."""
        for upsert in upserts:
            if upsert.operation.consents and self._consents.has_just_written(upsert.operation.key):
                upsert.named |= {profile.id for profile in directory.find("external_id", upsert.operation.key)}

    def _look_up(self, directory: Directory, name: str, values: Mapping[Upsert, str]) -> None:
        """Add the profiles with these identifiers to the directory. Raises WorkerError."""
        if not values:
            return
        profiles, failures = read_profiles(self._client, name, values.values())
        for profile in profiles:
            directory.add(self._adoptions.complete(profile))
        for upsert, value in values.items():
            upsert.requests += 1
            error = failures.get(identifier(name, value))
            if isinstance(error, Rejected):
                _cannot_read(upsert)
            elif error:
                upsert.finish(error)

    def _read_named(self, directory: Directory, upserts: Iterable[Upsert]) -> None:
        """Add the profiles that conflicts named to the directory. Raises EndpointRefused."""
        for upsert in upserts:
            for profile_id in upsert.named:
                upsert.requests += 1
                try:
                    profile = read_profile(self._client, profile_id)
                except EndpointRefused:
                    raise
                except WorkerError as error:
                    upsert.finish(error)
                    continue
                if profile:
                    directory.add(profile)

    # Writing

    def _select_for_job(self, work: Sequence[tuple[Upsert, Plan]]) -> list[tuple[Upsert, Plan]]:
        """Return the profiles to write in a bulk job: none if they are few."""
        fitting = [(upsert, plan) for upsert, plan in work if _fits_in_job(upsert, plan)]
        return fitting if len(fitting) > self._threshold else []

    def _run_job(self, work: Sequence[tuple[Upsert, Plan]]) -> None:
        """Write profiles in a bulk job. Upserts without a result need another round."""
        entries = [_job_entry(upsert, plan) for upsert, plan in work]
        adopting = [(upsert, plan) for upsert, plan in work if plan.adopts]
        for upsert, plan in adopting:
            self._adoptions.add(plan.profile_id, upsert.get("external_id"))
        jobs = self._guest_jobs if _are_guests(work) else self._jobs
        executor = self._executors[_effect_of(work)]
        for (upsert, plan), result in zip(work, jobs.run(_IMPORT, entries, executor), strict=True):
            if result is None:
                upsert.is_single = True
                continue
            upsert.requests += result.requests
            if upsert.is_guest and isinstance(result.error, JobUnfinished):
                # An order must not wait until the job can no longer write: it could only repeat this write.
                upsert.finish(Transient(result.error.reason))
            elif result.error or plan.profile_id or upsert.is_guest or not _identifiers([upsert]):
                upsert.finish(result.error)
            upsert.is_created = True
        for upsert, plan in adopting:
            if not upsert.result or (upsert.result.error and not isinstance(upsert.result.error, JobUnfinished)):
                self._adoptions.remove(plan.profile_id)

    def _write_individually(self, work: Sequence[tuple[Upsert, Plan]]) -> None:
        """Write profiles in concurrent requests."""
        if len(work) <= 1:  # in the calling thread, because a thread switch would only add latency
            for upsert, plan in work:
                self._writer.write(upsert, plan)
            return
        list(self._executors[_effect_of(work)].map(lambda each: self._writer.write(*each), work))


def _are_guests(work: Sequence[tuple[Upsert, Plan]]) -> bool:
    """Return whether the profiles are those of guests. A batch has only guests or only customers."""
    return bool(work) and work[0][0].is_guest


def _effect_of(work: Sequence[tuple[Upsert, Plan]]) -> Effect:
    return Effect.EVENTS if _are_guests(work) else Effect.PROFILES


def _identifiers(upserts: Iterable[Upsert]) -> set[Identifier]:
    """Return the identifiers that can belong to other people."""
    found = ((name, as_text(upsert.attributes.get(name))) for upsert in upserts for name in ("email", "phone_number"))
    return {identifier(name, value) for name, value in found if value}


def _unknown(directory: Directory, name: str, upserts: Iterable[Upsert]) -> dict[Upsert, str]:
    """Return the values of an identifier that the upserts write, except those that their own profile has."""
    wanted = {upsert: upsert.get(name) for upsert in upserts if upsert.result is None and not upsert.is_blind}
    own = {
        upsert: {identifier(name, profile.get(name)) for profile in directory.find("external_id", upsert.operation.key)}
        for upsert in wanted
        if not upsert.is_guest
    }
    return {u: value for u, value in wanted.items() if value and identifier(name, value) not in own.get(u, ())}


def _customer_of(upsert: Upsert) -> str:
    """Return the external_id of the customer whose profile it is, or "" for a guest."""
    return upsert.get("external_id") if upsert.is_guest else upsert.operation.key


def _cannot_read(upsert: Upsert) -> None:
    """Let an upsert be written although its profile cannot be read. A guest's can be a customer's: leave it alone."""
    if upsert.is_guest and not upsert.operation.any_profile:
        upsert.finish()
    else:
        upsert.is_blind = True


def _fits_in_job(upsert: Upsert, plan: Plan) -> bool:
    is_write = bool(plan.attributes) and not plan.merge_from
    return is_write and not (upsert.is_blind or upsert.is_single or upsert.conflicts or has_nulls(plan.attributes))


def _job_entry(upsert: Upsert, plan: Plan) -> JobEntry:
    """Return the entry of a profile. A customer's new profile gets its email address and phone number afterwards."""
    name = "external_id" if upsert.get("external_id") else "email"
    attributes: Json = {name: upsert.attributes[name]} | plan.attributes
    resource: Json = {"type": "profile", "attributes": attributes}
    if plan.profile_id:
        resource["id"] = plan.profile_id
    elif name == "external_id":
        resource["attributes"] = {n: v for n, v in attributes.items() if n not in {"email", "phone_number"}}
    return JobEntry(as_text(attributes[name]), orjson.dumps(resource))
