"""The responses of commercetools: expanded references only on request, and some resources late."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.cases.case import Step
    from worker.model import Json
    from worker.sandbox import Sandbox
    from worker.sandbox.http import ApiRequest, ApiResponse


class View:
    """The responses of the sandbox's commercetools during a run."""

    def __init__(self, sandbox: Sandbox, step: Step) -> None:
        self._sandbox = sandbox
        self._later = dict(step.later or {})
        now = time.monotonic()
        self._hidden_until = {resource: now + seconds for resource, seconds in step.hidden.items()}

    def handle(self, request: ApiRequest) -> ApiResponse:
        """Return the response to a request."""
        response = self._sandbox.commercetools_api.handle(request)
        collection = request.path.rpartition("/")[2]
        if collection in self._later:
            self._sandbox.shop.replace({collection: self._later.pop(collection)})
        document = response.document
        if response.status != 200 or not isinstance(document, dict) or "results" not in document:
            return response
        shown = [each for each in document["results"] if not self._is_hidden(each)]
        expanded = frozenset(request.query.get("expand", ()))
        results = [_without_unexpanded(each, expanded) for each in shown]
        return replace(response, document=document | {"results": results, "count": len(results)})

    def _is_hidden(self, resource: Json) -> bool:
        return time.monotonic() < self._hidden_until.get(resource["id"], 0.0)


def _without_unexpanded(value: Any, expanded: frozenset[str], path: str = "") -> Any:
    """Return a copy without the `obj` of references whose path was not to be expanded."""
    if isinstance(value, list):
        return [_without_unexpanded(each, expanded, f"{path}[*]") for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_unexpanded(each, expanded, f"{path}.{name}" if path else name)
        for name, each in value.items()
        if name != "obj" or path in expanded
    }
