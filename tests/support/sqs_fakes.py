"""Two emulators of AWS SQS, and a network in front of them that can fail.

moto is close to what AWS documents, but slow if many messages are queued; fauxqs is fast enough for load.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import defaultdict, deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import MSG_DONTWAIT, MSG_PEEK, SHUT_RDWR, socket
from threading import Thread
from typing import TYPE_CHECKING, Any

import boto3
import urllib3
from botocore.config import Config

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.type_defs import MessageTypeDef

    Receipt = tuple[str, str]  # of a delivered message: the queue's URL and the receipt handle

REGION = "eu-central-1"
FAUXQS = Path(sys.prefix) / "node_modules" / "fauxqs" / "dist" / "server.js"
KINDS = ("moto", "fauxqs")


def missing(kind: str) -> str:
    """Return why an emulator cannot run, or ""."""
    if kind == "moto" or (shutil.which("node") and FAUXQS.exists()):
        return ""
    return "fauxqs, an emulator of AWS SQS, needs Node.js: install it, and make again"


# moto has no lock between checking that a message is visible and leasing it: two polls can lease the same message.
# With a long switch interval, a thread of moto runs until it waits, so that no other thread comes in between.
_START_MOTO = "import sys; sys.setswitchinterval(5); from moto.server import main; main(sys.argv[1:])"


class Server:
    """An emulator, started in a separate process, or already running on `port`. It keeps messages in memory."""

    def __init__(self, kind: str, port: int = 0) -> None:
        self.kind = kind
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if not port:
            self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "AWS_"))}
        if self.kind == "moto":
            command = [sys.executable, "-c", _START_MOTO, "-H", "127.0.0.1", "-p", str(self.port)]
        else:
            command = ["node", str(FAUXQS)]
            environment |= {"FAUXQS_PORT": str(self.port), "FAUXQS_HOST": "127.0.0.1", "FAUXQS_LOGGER": "false"}
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=nothing, stderr=nothing, env=environment)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=1).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                assert time.monotonic() < deadline, f"{self.kind} did not start"
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        assert self._process is not None, "the server was started by another process"
        self._process.kill()
        self._process.wait()


def environment(port: int) -> dict[str, str]:
    """Return the variables that make boto3 use an emulator, and ignore the settings of this machine."""
    return {
        "AWS_ENDPOINT_URL_SQS": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def client(port: int) -> SQSClient:
    """Return a client of an emulator."""
    return boto3.client(
        "sqs",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name=REGION,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(max_pool_connections=20),
    )


class Queue:
    """A queue with a redrive policy, and its dead-letter queue."""

    def __init__(self, server: Server, *, receives: int | None = 5, name: str = "") -> None:
        self.server = server
        self.name = name or f"q{uuid.uuid4().hex[:8]}"
        self.client = client(server.port)
        self._receives = receives
        self.create()

    def create(self) -> None:
        """Create both queues. Needed again after a restart of the server."""
        self.dead_url = self.client.create_queue(QueueName=f"{self.name}-dead")["QueueUrl"]
        self.queue_url = self.client.create_queue(QueueName=self.name)["QueueUrl"]
        if self._receives:
            response = self.client.get_queue_attributes(QueueUrl=self.dead_url, AttributeNames=["QueueArn"])
            policy = {"deadLetterTargetArn": response["Attributes"]["QueueArn"], "maxReceiveCount": self._receives}
            self.set_attributes(RedrivePolicy=json.dumps(policy))

    @property
    def url(self) -> str:
        return f"sqs://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        return {"QUEUE_URL": self.url, **environment(self.server.port)}

    def set_attributes(self, **attributes: str) -> None:
        self.client.set_queue_attributes(QueueUrl=self.queue_url, Attributes=attributes)  # type: ignore[arg-type]

    def publish(self, *bodies: bytes, **attributes: str) -> None:
        values = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        for start in range(0, len(bodies), 10):
            batch = enumerate(bodies[start : start + 10])
            entries: Any = [{"Id": str(n), "MessageBody": b.decode(), "MessageAttributes": values} for n, b in batch]
            assert not self.client.send_message_batch(QueueUrl=self.queue_url, Entries=entries).get("Failed")

    def pull(self, max_messages: int = 1000, *, wait: float = 0.0, dead: bool = False) -> list[MessageTypeDef]:
        """Receive and delete messages until there are `max_messages`, for up to `wait` seconds."""
        url = self.dead_url if dead else self.queue_url
        taken: list[MessageTypeDef] = []
        deadline = time.monotonic() + wait
        while True:
            batch = self.client.receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=min(10, max_messages - len(taken)),
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            ).get("Messages", [])
            for message in batch:
                self.client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
            taken += batch
            if len(taken) >= max_messages or (not batch and time.monotonic() > deadline):
                return taken
            time.sleep(0 if batch else 0.05)

    def wait_for(self, url: str, at_least: int) -> None:
        """Wait up to 20 seconds until a queue holds `at_least` messages."""
        deadline = time.monotonic() + 20.0
        while self.count(url) < at_least and time.monotonic() < deadline:
            time.sleep(0.05)

    def count(self, url: str = "") -> int:
        """Count the messages that were never settled: ready, delayed and leased."""
        response = self.client.get_queue_attributes(QueueUrl=url or self.queue_url, AttributeNames=["All"])
        return sum(
            int(value)
            for name, value in response["Attributes"].items()
            if name.startswith("ApproximateNumberOfMessages")
        )

    def read_all(self, url: str) -> list[tuple[bytes, dict[str, str]]]:
        """Return body and attributes of all messages on a queue. On moto, leased messages have no body."""
        if self.server.kind == "moto":
            ready = self.client.receive_message(
                QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=0, MessageAttributeNames=["All"]
            ).get("Messages", [])
            seen = [(m["Body"].encode(), _texts(m.get("MessageAttributes", {}))) for m in ready]
            return seen + [(b"", {})] * (self.count(url) - len(seen))
        path = f"_fauxqs/queues/{url.rpartition('/')[2]}"
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}/{path}", timeout=60) as response:
            queue = json.load(response)["messages"]
        messages = [*queue["ready"], *queue["delayed"], *(each["message"] for each in queue["inflight"])]
        return [(m["body"].encode(), _texts(m["messageAttributes"])) for m in messages]

    def dead_letters(self, at_least: int = 0, wait: float = 20.0) -> list[MessageTypeDef]:
        """Receive and delete the dead letters, waiting until there are `at_least`."""
        return self.pull(at_least, wait=wait, dead=True) if at_least else self.pull(dead=True)


def _texts(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: value["StringValue"] for name, value in attributes.items()}


def bodies(messages: list[MessageTypeDef]) -> list[bytes]:
    return [message["Body"].encode() for message in messages]


class Response:
    """A response of SQS: a document, or an error in the form of its JSON protocol."""

    def __init__(self, status: int, code: str = "", message: str = "because", **document: Any) -> None:
        self.status = status
        self.headers = {"x-amzn-query-error": f"{code};Sender"} if code else {}
        content = {"__type": f"com.amazonaws.sqs#{code}", "message": message} if code else document
        self.body = json.dumps(content).encode()


class ProxyResponse(Response):
    """A response that a proxy can send instead of SQS."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.body = body


DENIED = Response(400, "AccessDenied", "not authorized to perform that")
NO_QUEUE = Response(400, "AWS.SimpleQueueService.NonExistentQueue")
BUSY = Response(400, "ThrottlingException")
BROKEN = Response(500, "InternalError")


class Network:
    """A relay to an emulator. It records requests, can send its own responses, and can be taken down.

    It sends each response in `responses[operation]` once, in order, and the response in `always[operation]` every time.
    """

    def __init__(self, server: Server) -> None:
        self.port = free_port()
        self.responses: dict[str, deque[Response]] = defaultdict(deque)
        self.always: dict[str, Response] = {}
        self.requests: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.links: dict[socket, list[Receipt]] = {}
        self._lost: list[Receipt] = []  # of messages delivered over closed connections
        self._client = client(server.port)
        self._upstream = f"http://127.0.0.1:{server.port}/"
        self._pool = urllib3.PoolManager(maxsize=20)
        self.up()

    def up(self) -> None:
        network = self

        class Handler(_Handler):
            relay = network

        self._listener = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._listener.daemon_threads = True
        Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Close all connections, and refuse new ones."""
        self._listener.shutdown()
        self._listener.server_close()
        for link in list(self.links):
            with suppress(OSError):
                link.shutdown(SHUT_RDWR)

    def end_leases(self) -> None:
        """End the leases of messages that were delivered over closed connections, as if they had expired."""
        for link in [link for link in list(self.links) if _is_closed(link)]:  # their threads have not noticed yet
            self.on_disconnect(link)
        while self._lost:
            url, receipt = self._lost.pop()
            with suppress(self._client.exceptions.ClientError):
                self._client.change_message_visibility(QueueUrl=url, ReceiptHandle=receipt, VisibilityTimeout=0)

    def on_disconnect(self, link: socket) -> None:
        """Record that a connection was closed."""
        self._lost += self.links.pop(link, ())

    def handle(self, link: socket, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        operation, request = headers["X-Amz-Target"].rpartition(".")[2], json.loads(body)
        self.requests[operation].append(request)
        queued = self.responses[operation]
        fixed = queued.popleft() if queued else self.always.get(operation)
        if fixed is not None:
            return fixed.status, fixed.headers, fixed.body
        response = self._pool.request("POST", self._upstream, body=body, headers=headers, retries=False, timeout=30)
        if operation == "ReceiveMessage" and response.status == 200:
            messages = response.json().get("Messages") or []
            self.links.setdefault(link, []).extend(
                (request["QueueUrl"], message["ReceiptHandle"]) for message in messages
            )
            if _is_closed(link):  # the worker was killed during the poll
                self.on_disconnect(link)
                self.end_leases()
        kept = {name: value for name, value in response.headers.items() if name.lower() == "x-amzn-query-error"}
        return response.status, kept, response.data


class _Handler(BaseHTTPRequestHandler):
    relay: Network
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.relay.links[self.connection] = []

    def handle(self) -> None:
        with suppress(OSError):  # a killed worker closes the connection at any time
            super().handle()

    def finish(self) -> None:
        self.relay.on_disconnect(self.connection)
        with suppress(OSError):
            super().finish()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        names = {name: value for name, value in self.headers.items() if name.lower() not in {"host", "content-length"}}
        with suppress(OSError, urllib3.exceptions.HTTPError):
            status, headers, data = self.relay.handle(self.connection, names, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def _is_closed(link: socket) -> bool:
    try:
        return link.recv(1, MSG_PEEK | MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
