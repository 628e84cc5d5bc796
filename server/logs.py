"""Where and how this process logs: JSON lines, those of the libraries among them."""

import logging
import sys
from typing import Any

import structlog


def configure_logging(stream: Any = None) -> None:
    """JSON lines, the libraries' own among them; by default to standard error, where a worker's go."""
    output = stream if stream is not None else sys.stderr
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*common, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    final: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.JSONRenderer(),
    ]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=final, foreign_pre_chain=common))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # What it warns of are requests, which have their own line.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
