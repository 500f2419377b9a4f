"""Close connections of clients that are too slow, for which uvicorn's protocol would wait for ever."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol, which in addition closes connections of clients that are too slow.

    A client has so many seconds to send a whole request, from the moment it connects or begins with it, its body and
    what the server no longer wants of it included; and so many to take in what it was sent before more follows.
    """

    class Patient(H11Protocol):
        _sending: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._expect_request()
            else:
                _cancel(self._sending)
                self._sending = None

        def pause_writing(self) -> None:
            super().pause_writing()
            _cancel(self._taking)
            self._taking = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            _cancel(self._taking)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._sending)
            _cancel(self._taking)
            super().connection_lost(exc)

        def _expect_request(self) -> None:
            if self._sending is None:
                self._sending = self.loop.call_later(seconds, self.transport.abort)

    return Patient


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
