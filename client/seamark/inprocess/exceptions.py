"""The exceptions of restart in process, named as in NVRx's ``inprocess``."""

from __future__ import annotations

ABORT_EXIT_CODE = 130


class RestartError(Exception):
    """Base of the errors of the restart wrapper."""


class MissingEnvironmentError(RestartError):
    """The process was not started by Seamark; the sentence says how to start it."""


class HealthCheckError(RestartError):
    """A health check failed: this rank leaves the job."""


class StoreUnreachableError(RestartError):
    """Nobody answers where the job's TCPStore should be."""


class TimeoutError(RestartError):
    """A part of a restart took longer than it may."""


class RankDiscarded(RestartError):
    """The rank assignment dropped this rank: it leaves the job, which goes on without it."""


class StaleMemberError(RestartError):
    """This process has been replaced, or its job has ended: it must end."""


class AgentConnectionError(RestartError):
    """The thread by which this process hears of failures has failed; the sentence says of what. It must end."""


class RestartAbort(SystemExit):
    """Raised by the training function to end the whole job: every process exits with code 130, none is restarted.

    Args:
        reason: a sentence for people.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = ABORT_EXIT_CODE


class RestartInterrupt(BaseException):
    """Raised by the wrapper in the main thread, inside the wrapped function, when the iteration was given up.

    Not for catching: a function that swallows it is interrupted again.
    """
