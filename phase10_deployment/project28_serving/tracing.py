"""
Tracing

This file implements optional traces of requests by OpenTelemetry: its library makes a span of every request, and what
only the server knows of it is added under the names that OpenTelemetry has for generative models. Where they are sent
to, the library reads from the environment (OTEL_EXPORTER_OTLP_ENDPOINT and its like). Nothing of a text is in them.
"""

from fastapi import FastAPI

from phase10_deployment.project28_serving.choices import Choice
from phase10_deployment.project28_serving.shapes import Usage


def trace_requests(app: FastAPI) -> None:
    """Let every request of an app be a span; raises ModuleNotFoundError without the libraries."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(app, excluded_urls="health,metrics", exclude_spans=["receive", "send"])


def note(model: str, usage: Usage, choices: list[Choice]) -> None:
    """Add to the span of this request what it asked for and what it cost; nothing where none is recorded."""
    try:
        from opentelemetry.trace import get_current_span
    except ImportError:
        return
    get_current_span().set_attributes({
        "gen_ai.request.model": model, "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.completion, "gen_ai.usage.cache_read.input_tokens": usage.cached,
        "gen_ai.response.finish_reasons": [choice.finish_reason or "" for choice in choices],
    })  # fmt: skip
