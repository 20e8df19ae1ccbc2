"""Every error Outpace raises on purpose.

OutpaceError
├── InvalidRequestError      the request is at fault        HTTP 400
│   └── NotFoundError        it names what is not here      HTTP 404
├── OverloadedError          the queue is full              HTTP 429
├── ShuttingDownError        the server is draining         HTTP 503
├── ConfigError              a setting is at fault          one line on the terminal
│   └── UnsupportedModelError
└── EngineDeadError          the engine stopped on a bug    HTTP 500, the server exits
"""

from __future__ import annotations


class OutpaceError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class InvalidRequestError(OutpaceError):
    """The request cannot be served as asked.

    Attributes:
        param: Name of the field at fault, as the client wrote it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(InvalidRequestError):
    """The request names a model that is not served."""


class OverloadedError(OutpaceError):
    """The queue is full; the client may try again later."""


class ShuttingDownError(OutpaceError):
    """The server is draining and accepts no new work."""


class ConfigError(OutpaceError):
    """A setting, file or model given at start-up cannot be used."""


class UnsupportedModelError(ConfigError):
    """The model asks for something the decoder does not implement; the text says what is."""


class EngineDeadError(OutpaceError):
    """The engine thread ended on an unexpected error; no further request can be served."""
