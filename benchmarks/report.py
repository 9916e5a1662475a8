"""Benchmark results as text tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rows import Row

# heading, name of the figure, format
_COLUMNS = {
    "throughput": (
        ("QUEUE", "queue", "{}"),
        ("LATENCY MS", "latency_ms", "{:.0f}"),
        ("MSG/S", "messages_per_s", "{:.0f}"),
        ("CPU MS/MSG", "cpu_ms_per_message", "{:.2f}"),
        ("KLAVIYO/MSG", "klaviyo_calls_per_message", "{:.3f}"),
        ("CT/MSG", "commercetools_calls_per_message", "{:.3f}"),
        ("AGE P50 S", "age_p50_s", "{:.1f}"),
        ("AGE P99 S", "age_p99_s", "{:.1f}"),
        ("START S", "start_up_s", "{:.2f}"),
        ("PEAK MB", "peak_rss_mb", "{:.0f}"),
        ("429", "klaviyo_calls_answered_429", "{}"),
    ),
    "idle": (
        ("QUEUE", "queue", "{}"),
        ("LATENCY MS", "latency_ms", "{:.0f}"),
        ("P50 MS", "publish_to_processed_p50_ms", "{:.0f}"),
        ("P99 MS", "publish_to_processed_p99_ms", "{:.0f}"),
        ("CALLS' P50", "latency_of_calls_p50_ms", "{:.0f}"),
        ("CALLS' P99", "latency_of_calls_p99_ms", "{:.0f}"),
        ("CALLS/MSG", "calls_per_message", "{:.2f}"),
    ),
    "memory": (
        ("QUEUE", "queue", "{}"),
        ("MESSAGES", "messages", "{}"),
        ("PEAK MB IDLE", "peak_rss_without_backlog_mb", "{:.0f}"),
        ("WITH BACKLOG", "peak_rss_with_backlog_mb", "{:.0f}"),
        ("MSG/S", "messages_per_s", "{:.0f}"),
        ("CPU MS/MSG", "cpu_ms_per_message", "{:.2f}"),
    ),
    "limits": (
        ("ORDERS", "messages", "{}"),
        ("WORKERS", "workers", "{}"),
        ("SECONDS", "seconds", "{:.1f}"),
        ("EVENTS/S", "events_per_s", "{:.0f}"),
        ("OF LIMIT", "share_of_limit", "{:.1%}"),
        ("CALLS", "klaviyo_calls", "{}"),
        ("BULK CALLS", "bulk_calls", "{}"),
        ("BULK 429", "bulk_calls_answered_429", "{}"),
        ("ALL 429", "klaviyo_calls_answered_429", "{}"),
        ("429 SHARE", "share_answered_429", "{:.1%}"),
    ),
}
_PROCESS = (
    "{messages} messages, {klaviyo_requests} requests, {klaviyo_requests_answered_429} of them answered 429, "
    "first message settled after {first_settled_s:.1f} s, {cpu_s:.1f} s CPU, {peak_rss_mb:.0f} MB"
)
_NAME, _NARROWEST = 34, 9


def heading(table: str) -> str:
    """Return the heading of a table."""
    return f"\n{table.upper():<{_NAME}}" + "".join(f"{title:>{_width(title)}}" for title, _, _ in _COLUMNS[table])


def line(table: str, row: Row) -> str:
    """Return a row, followed by a line per worker process."""
    cells = (f"{style.format(row[name]):>{_width(title)}}" for title, name, style in _COLUMNS[table])
    first = f"{row['row']:<{_NAME}}" + "".join(cells)
    return "\n".join([first, *(f"    {_PROCESS.format(**process)}" for process in row.get("processes", ()))])


def _width(title: str) -> int:
    return max(len(title) + 2, _NARROWEST)
