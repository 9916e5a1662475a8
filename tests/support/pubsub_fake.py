"""A fake Subscriber service that has flow control, permissions and failing calls, which Google's emulator lacks."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import grpc
from google.iam.v1 import iam_policy_pb2
from google.protobuf import any_pb2, empty_pb2
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import types
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import Iterator

LEASE_SECONDS = 60.0
NOTHING = bytes(empty_pb2.Empty().SerializeToString())


class AckResults(dict[str, str]):
    """The results of ack ids in exactly-once delivery: the metadata of an error."""

    def __init__(self, code: grpc.StatusCode, **verdicts: str) -> None:
        super().__init__(verdicts)
        self.code = code

    def abort(self, context: grpc.ServicerContext) -> None:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason="EXACTLY_ONCE_ACKID_FAILURE", metadata=self))
        status = status_pb2.Status(code=self.code.value[0], message="some failed", details=[detail])
        context.abort_with_status(rpc_status.to_status(status))


class FakeSubscriber(grpc.GenericRpcHandler):
    """One subscription on its own port.

    A call of `method` first returns the results in `answers[method]`, in order. A message is outstanding until it is
    acknowledged, or its lease is set to 0 or expires; the number of outstanding messages is limited by the stream's
    request, as the API describes for `StreamingPullRequest.max_outstanding_messages`.
    """

    def __init__(self, *bodies: bytes) -> None:
        self.answers: dict[str, deque[grpc.StatusCode | AckResults]] = defaultdict(deque)
        self.permissions = {"pubsub.subscriptions.consume"}
        self.description = types.Subscription(name="s", ack_deadline_seconds=60)
        self.end_of_stream: grpc.StatusCode | None = None  # of a stream whose requests have ended
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self._waiting = deque(bodies)
        self._leases: dict[str, float] = {}  # ack id: monotonic seconds
        self._lock = Lock()
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        self.host = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def set_retry_policy(self) -> None:
        self.description.retry_policy = types.RetryPolicy(minimum_backoff=Duration(seconds=10))

    def stop(self) -> None:
        self._server.stop(None).wait()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = details.method.rpartition("/")[2]
        if method == "StreamingPull":
            return grpc.stream_stream_rpc_method_handler(
                self._stream, types.StreamingPullRequest.deserialize, types.StreamingPullResponse.serialize
            )
        calls = {
            "Acknowledge": (self._acknowledge, types.AcknowledgeRequest.deserialize),
            "ModifyAckDeadline": (self._modify_ack_deadline, types.ModifyAckDeadlineRequest.deserialize),
            "GetSubscription": (self._get, types.GetSubscriptionRequest.deserialize),
            "TestIamPermissions": (self._test, iam_policy_pb2.TestIamPermissionsRequest.FromString),
        }
        call, deserialize = calls[method]

        def handle(request: Any, context: grpc.ServicerContext) -> bytes:
            self.requests[method].append(request)
            if self.answers[method]:
                answer = self.answers[method].popleft()
                answer.abort(context) if isinstance(answer, AckResults) else context.abort(answer, "as configured")
            return call(request)

        return grpc.unary_unary_rpc_method_handler(handle, deserialize)

    def _acknowledge(self, request: Any) -> bytes:
        return self._end_leases(request.ack_ids)

    def _modify_ack_deadline(self, request: Any) -> bytes:
        if not request.ack_deadline_seconds:
            return self._end_leases(request.ack_ids)
        with self._lock:
            until = time.monotonic() + request.ack_deadline_seconds
            self._leases |= {name: until for name in request.ack_ids if name in self._leases}
        return NOTHING

    def _end_leases(self, ack_ids: list[str]) -> bytes:
        with self._lock:
            for name in ack_ids:
                self._leases.pop(name, None)
        return NOTHING

    def _get(self, _: Any) -> bytes:
        return bytes(types.Subscription.serialize(self.description))

    def _test(self, request: Any) -> bytes:
        allowed = self.permissions.intersection(request.permissions)
        return bytes(iam_policy_pb2.TestIamPermissionsResponse(permissions=allowed).SerializeToString())

    def _stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        first = next(requests)
        self.requests["StreamingPull"].append(first)
        ended = Event()
        Thread(target=_consume, args=(requests, ended), daemon=True).start()
        while context.is_active() and not ended.wait(0.02):
            if messages := self._lease(first.max_outstanding_messages):
                yield types.StreamingPullResponse(received_messages=messages)
        if ended.is_set() and self.end_of_stream is not None:
            context.abort(self.end_of_stream, "as configured")

    def _lease(self, max_messages: int) -> list[types.ReceivedMessage]:
        with self._lock:
            now = time.monotonic()
            self._leases = {name: until for name, until in self._leases.items() if until > now}
            room = min(max_messages - len(self._leases), len(self._waiting))
            bodies = [self._waiting.popleft() for _ in range(room)]
            self._leases |= {body.decode(): now + LEASE_SECONDS for body in bodies}
        return [
            types.ReceivedMessage(
                ack_id=body.decode(), message=types.PubsubMessage(data=body, message_id=body.decode())
            )
            for body in bodies
        ]


def _consume(requests: Iterator[Any], ended: Event) -> None:
    try:
        for _ in requests:
            pass
    except grpc.RpcError:
        return
    ended.set()
