"""Refuse a request with a status, a code and one sentence."""

from __future__ import annotations

from fastapi import HTTPException

CODES = {
    400: "malformed",
    401: "no_token",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "changed",
    413: "too_large",
    415: "wrong_kind",
    422: "invalid",
    500: "internal",
    503: "busy",
}


def refusal(status: int, message: str) -> HTTPException:
    """Return the error that ends a request; ``message`` is one sentence for the person who asked."""
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return HTTPException(status, message, headers)


def problem(status: int, message: str) -> dict[str, dict[str, str]]:
    """Return the body of an error."""
    return {"error": {"code": CODES.get(status, "error"), "message": message}}
